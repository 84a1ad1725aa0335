"""What every method is compared by: the reward of designs for one patient, and the calls made.

One design is one call of the reward model, in a batch or alone.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from hydrogel_gym import RewardConfig, RewardModel, compute_reward
from hydrogel_gym.problem.fields import FORMULATION_HIGH, FORMULATION_LOW, Design, Outcomes

LOW, HIGH = torch.from_numpy(FORMULATION_LOW), torch.from_numpy(FORMULATION_HIGH)


class BudgetExceededError(RuntimeError):
    """More designs were to be evaluated than the budget has left; none of them was."""


def design_at(share: Tensor, polymer_id: Tensor, coverage: Tensor) -> Design:
    """Designs whose formulation is given as the share of the way through its box.

    Args:
        share: (B, 4) in [0, 1].
        polymer_id: (B,) integer row of the polymer table.
        coverage: (B,) integer coverage level.
    """
    # lerp is exact at both ends, so that no formulation leaves its box by a rounding error.
    formulation = torch.lerp(LOW, HIGH, share.to(LOW.dtype))
    return Design(polymer_id.long(), formulation, coverage.long())


class CountingModel:
    """A reward model that counts the designs it has evaluated and the CPU seconds it took."""

    def __init__(self, model: RewardModel) -> None:
        self.model = model
        self.calls = 0
        self.cpu_seconds = 0.0

    def __call__(
        self, patient: Tensor, polymer_id: Tensor, formulation: Tensor, coverage: Tensor
    ) -> Outcomes:
        """Outcomes of a batch; see `RewardModel`."""
        start = time.process_time()
        outcomes = self.model(patient, polymer_id, formulation, coverage)
        self.cpu_seconds += time.process_time() - start
        self.calls += outcomes.delta_ef_pct.numel()
        return outcomes


class PatientObjective:
    """Reward of designs for one patient, with a budget that cannot be overrun.

    Args:
        patient: (11,) features in the order and units of `PATIENT_FIELDS`.
        model: the Stage-1 model.
        budget: calls allowed, at least 1.
        reward_config: weights and limits of the reward; the source's by default.

    Attributes:
        budget: calls allowed.
        best_design: the best design so far, a batch of one; None before the first call.

    Raises:
        ValueError: `budget` is below 1, or `patient` is not one row.
    """

    def __init__(
        self,
        patient: Tensor,
        model: RewardModel,
        budget: int,
        reward_config: RewardConfig | None = None,
    ) -> None:
        if budget < 1:
            raise ValueError(f"budget is {budget}; allowed: at least 1")
        if patient.dim() != 1:
            raise ValueError(f"{patient.shape=}; expected the features of one patient, (11,)")
        self.budget = budget
        self.best_design: Design | None = None
        self._patient = patient.to(torch.float32)
        self._model = model
        self._config = reward_config
        self._best = -np.inf
        self._trace: list[np.ndarray] = []
        self._overhead: list[np.ndarray] = []
        self._calls = 0
        self._model_seconds = 0.0
        self._start = time.process_time()

    @property
    def calls(self) -> int:
        """Designs evaluated so far."""
        return self._calls

    @property
    def remaining(self) -> int:
        """Calls left of the budget."""
        return self.budget - self._calls

    @property
    def trace(self) -> np.ndarray:
        """(calls,) float64, the best reward after each call."""
        return np.concatenate([np.empty(0), *self._trace])

    @property
    def overhead_seconds(self) -> np.ndarray:
        """(calls,) CPU seconds spent outside the reward model before each call, cumulative."""
        return np.concatenate([np.empty(0), *self._overhead])

    @torch.no_grad()
    def __call__(self, design: Design) -> Tensor:
        """Evaluate B designs.

        Args:
            design: a batch as `Design` describes it.

        Returns:
            (B,) float32 rewards.

        Raises:
            BudgetExceededError: B is more than `remaining`; nothing was evaluated.
        """
        count = len(design.polymer_id)
        if count > self.remaining:
            raise BudgetExceededError(
                f"{count} designs to evaluate, but {self.remaining} of {self.budget} calls remain"
            )
        entered = time.process_time()
        spent = entered - self._start - self._model_seconds
        patients = self._patient.expand(count, -1)
        outcomes = self._model(patients, design.polymer_id, design.formulation, design.coverage)
        rewards = compute_reward(outcomes, True, self._config)
        self._model_seconds += time.process_time() - entered

        running = np.maximum.accumulate(rewards.numpy().astype(np.float64))
        if running[-1] > self._best:
            top = int(rewards.argmax())
            self.best_design = Design(*(part[top : top + 1].clone() for part in design))
        self._trace.append(np.maximum(running, self._best))
        self._best = float(self._trace[-1][-1])
        self._overhead.append(np.full(count, spent))
        self._calls += count
        return rewards
