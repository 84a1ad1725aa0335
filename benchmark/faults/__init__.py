"""Faults that a run of the trainer has to survive, a module each; `runs.py` is what they share."""
