"""Trainers that a user could take instead of ours, on the same environment and clock."""
