"""One HTML page about a run, or about several: what was learnt, and what it designs for whom."""
