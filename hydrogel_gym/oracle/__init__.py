"""The best design for each patient: the yardstick that turns a reward into a regret.

    python -m hydrogel_gym.oracle --cohort mine.csv --output best_designs.csv

`search` finds the best design, `best` measures how far its result can be trusted.
"""

from hydrogel_gym.oracle.best import BestDesigns, best_designs, cached_best_designs

__all__ = ["BestDesigns", "best_designs", "cached_best_designs"]
