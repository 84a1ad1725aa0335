"""The grid that designs lie on.

A design is given to the precision that a laboratory can keep, `RESOLUTION`, and evaluated as given;
so two designs are the same when all their numbers are.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hydrogel_gym.problem.fields import COVERAGES, FORMULATION_FIELDS
from hydrogel_gym.problem.polymers import NUM_POLYMERS

RESOLUTION = tuple(field.resolution for field in FORMULATION_FIELDS)
NUM_LEVELS = tuple(
    round((field.high - field.low) / step) + 1
    for field, step in zip(FORMULATION_FIELDS, RESOLUTION, strict=True)
)
NUM_CELLS = NUM_POLYMERS * len(COVERAGES)  # a cell is a polymer and a coverage


def on_grid(share: Tensor) -> Tensor:
    """Formulations of `RESOLUTION` nearest to a share of the way through their ranges.

    Args:
        share: (..., D), 0 to 1.

    Returns:
        (..., D) in the units of `FORMULATION_FIELDS`.
    """
    columns = zip(share.unbind(-1), FORMULATION_FIELDS, RESOLUTION, NUM_LEVELS, strict=True)
    values = []
    for part, field, step, n in columns:
        # A quotient of whole numbers is the float nearest to the decimal, and prints as it.
        per_unit = round(1.0 / step)
        values.append(((part * (n - 1)).round() + field.low * per_unit) / per_unit)
    return torch.stack(values, dim=-1)


def design_keys(cell: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """(B,) int64, one number for each design of the grid.

    Args:
        cell: (B,) polymer * number of coverages + coverage.
        numbers: (R, B) rows of `NUMBERS`, the first of which are a formulation on the grid.
    """
    keys = cell.astype(np.int64)
    formulation = numbers[: len(FORMULATION_FIELDS)]
    for row, field, step, n in zip(
        formulation, FORMULATION_FIELDS, RESOLUTION, NUM_LEVELS, strict=True
    ):
        keys = keys * n + np.rint((row.astype(np.float64) - field.low) / step).astype(np.int64)
    return keys
