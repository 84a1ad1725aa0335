"""The designs of largest reward among millions, no two the same."""

from __future__ import annotations

import numpy as np

from hydrogel_gym.designs.grid import NUM_CELLS, design_keys
from hydrogel_gym.designs.schema import NUMBERS, REWARD


class TopDesigns:
    """The designs of largest reward among all that were shown, no two the same.

    Whatever the order they come in and the batches they come in, the result is the same: of equal
    rewards the smaller key is kept.

    Args:
        size: how many to keep.
        per_cell: keep so many of each polymer and coverage instead of all together.
    """

    def __init__(self, size: int, *, per_cell: bool = False) -> None:
        self.size, self.per_cell = size, per_cell
        self.cell = np.empty(0, np.uint8)
        self.numbers = np.empty((len(NUMBERS), 0), np.float32)
        # What a design has to reach to matter, by cell; it only rises.
        self.floor = np.full(NUM_CELLS, -np.inf, np.float32)

    def promising(self, cell: np.ndarray, reward: np.ndarray) -> np.ndarray:
        """Indices of the designs, (B,) each, that may be among the best; safe in any thread."""
        floor = self.floor
        if self.per_cell and self.size == 1:
            # What is worse than another of the same batch is out, however low the floor still is.
            floor = floor.copy()
            np.maximum.at(floor, cell, reward)
        return np.flatnonzero(reward >= (floor[cell] if self.per_cell else floor[0]))

    def add(self, cell: np.ndarray, numbers: np.ndarray) -> None:
        """Show designs: (B,) cells and (R, B) rows of `NUMBERS`."""
        if not len(cell):
            return
        if not self.per_cell and len(cell) > 16 * self.size:
            # The first designs pass any floor, and telling all of them apart would take as long as
            # making them. Any `size` that are unlike each other are a floor for the rest.
            few = np.argpartition(-numbers[REWARD], 8 * self.size)[: 8 * self.size]
            if len(np.unique(design_keys(cell[few], numbers[:, few]))) >= self.size:
                rows = np.flatnonzero(numbers[REWARD] >= numbers[REWARD, few].min())
                cell, numbers = cell[rows], numbers[:, rows]
        cell = np.concatenate([self.cell, cell])
        numbers = np.concatenate([self.numbers, numbers], axis=1)
        keys = design_keys(cell, numbers)
        _, unlike = np.unique(keys, return_index=True)
        order = unlike[np.lexsort((keys[unlike], -numbers[REWARD, unlike]))]
        if self.per_cell:
            order = order[_rank_within(cell[order]) < self.size]
        else:
            order = order[: self.size]
        self.cell, self.numbers = cell[order], numbers[:, order]
        reward = self.numbers[REWARD]
        if self.per_cell:
            count = np.bincount(self.cell, minlength=NUM_CELLS)
            worst = np.full(NUM_CELLS, np.inf, np.float32)
            np.minimum.at(worst, self.cell, reward)
            self.floor = np.where(count == self.size, worst, -np.inf).astype(np.float32)
        elif len(order) == self.size:
            self.floor = np.full(NUM_CELLS, reward[-1])


def _rank_within(group: np.ndarray) -> np.ndarray:
    """How many of the entries before each are of its group."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    rank = np.arange(len(group)) - np.repeat(starts, np.diff(np.r_[starts, len(group)]))
    result = np.empty_like(rank)
    result[order] = rank
    return result
