"""What every method is compared by: the reward of designs for one patient, and the calls made.

One design is one call of the reward model, in a batch or alone.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from hydrogel_gym import RewardModel, compute_reward
from hydrogel_gym.problem.fields import FORMULATION_HIGH, FORMULATION_LOW, Design, Outcomes

LOW, HIGH = torch.from_numpy(FORMULATION_LOW), torch.from_numpy(FORMULATION_HIGH)


def design_at(share: Tensor, polymer_id: Tensor, coverage: Tensor) -> Design:
    """Designs whose formulation is given as the share (B, 4) of the way through its box."""
    # lerp is exact at both ends, so that no formulation leaves its box by a rounding error.
    formulation = torch.lerp(LOW, HIGH, share.to(LOW.dtype))
    return Design(polymer_id.long(), formulation, coverage.long())


def design_rows(design: Design, index: Tensor) -> Design:
    """The designs at `index`."""
    return Design(*(part[index] for part in design))


class CountingModel:
    """A reward model that counts the designs it has evaluated and the CPU seconds it took."""

    def __init__(self, model: RewardModel) -> None:
        self.model = model
        self.calls = 0
        self.cpu_seconds = 0.0

    def __call__(self, patient: Tensor, *design: Tensor) -> Outcomes:
        """Outcomes of a batch; see `RewardModel`."""
        start = time.process_time()
        outcomes = self.model(patient, *design)
        self.cpu_seconds += time.process_time() - start
        self.calls += outcomes.delta_ef_pct.numel()
        return outcomes


class PatientObjective:
    """Reward of designs for one (11,) patient, with a budget of calls that cannot be overrun."""

    def __init__(self, patient: Tensor, model: RewardModel, budget: int) -> None:
        self.budget = budget
        self._patient = patient.to(torch.float32)
        self._model = CountingModel(model)
        self._rewards: list[np.ndarray] = []
        self.overhead_seconds = (
            0.0  # CPU seconds spent outside the reward model before the last call
        )
        self._start = time.process_time()

    @property
    def remaining(self) -> int:
        """Calls left of the budget."""
        return self.budget - self._model.calls

    @property
    def trace(self) -> np.ndarray:
        """(calls,) float64, the best reward after each call."""
        return np.maximum.accumulate(np.concatenate(self._rewards).astype(float))

    @torch.no_grad()
    def __call__(self, design: Design) -> Tensor:
        """(B,) float32 rewards of B designs, unless B is more than `remaining`."""
        count = len(design.polymer_id)
        if count > self.remaining:
            raise RuntimeError(
                f"{count} designs to evaluate, but {self.remaining} of {self.budget} calls remain"
            )
        self.overhead_seconds = time.process_time() - self._start - self._model.cpu_seconds
        rewards = compute_reward(self._model(self._patient.expand(count, -1), *design), True)
        self._rewards.append(rewards.numpy())
        return rewards
