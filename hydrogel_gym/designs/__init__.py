"""Many designs for one patient: the grid they lie on, the best of them, and the files they are in.

Every outcome is a prediction of the reward model, for a virtual patient, and no clinical fact.
"""

from hydrogel_gym.designs.grid import NUM_CELLS, NUM_LEVELS, RESOLUTION, design_keys, on_grid
from hydrogel_gym.designs.schema import FORMULATION_COLUMNS, NUMBERS, SCHEMA, numbers_of
from hydrogel_gym.designs.store import load_designs, partition
from hydrogel_gym.designs.top import TopDesigns

__all__ = [
    "FORMULATION_COLUMNS",
    "NUMBERS",
    "NUM_CELLS",
    "NUM_LEVELS",
    "RESOLUTION",
    "SCHEMA",
    "TopDesigns",
    "design_keys",
    "load_designs",
    "numbers_of",
    "on_grid",
    "partition",
]
