"""Parameters of the design problem, its state and what a transition produces: types alone.

Shapes: B environments, P patients, C columns of a patient, D parameters of a formulation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from hydrogel_gym.problem.adaptive import AdaptiveParams, Checks
from hydrogel_gym.problem.fields import Outcomes
from hydrogel_gym.problem.reward import RewardConfig, RewardTerms

RewardMode = Literal["score", "improvement"]
PatientAssignment = Literal["fixed", "random"]


@dataclass(frozen=True, eq=False)
class EnvParams:
    """What a user may vary, fixed for the life of an environment.

    `patients` is the (P, C) table in the order of `PATIENT_FIELDS`. Every real number of a step
    has its dtype, float32 unless somebody checks rounding.
    """

    patients: Tensor
    horizon: int = 1
    reward_config: RewardConfig = field(default_factory=RewardConfig)
    reward_mode: RewardMode = "score"
    patient_assignment: PatientAssignment = "fixed"
    observe_explored: bool = False
    max_episode_steps: int | None = None
    adaptive: AdaptiveParams | None = None  # None where patients respond as predicted

    @property
    def num_patients(self) -> int:
        """Number of rows of the patient table."""
        return self.patients.shape[0]


class State(NamedTuple):
    """State of B environments; every tensor has leading dimension B."""

    seed: Tensor  # (B,) int64, key of the environment's stream of patient draws
    episode: Tensor  # (B,) int64, episodes begun under that seed: the counter of the stream
    home_index: Tensor  # (B,) int64, the patient it keeps under `fixed` assignment
    patient_index: Tensor  # (B,) int64, the patient of this episode
    best_score: Tensor  # (B,) float32, max(0, scores of this episode)
    iteration: Tensor  # (B,) int64, steps of this episode
    explored: Tensor  # (B,) int64, bit i is set once polymer i was used in this episode
    checks: Checks | tuple[()] = ()  # where patients respond otherwise than predicted

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state under its own name."""
        own = self._asdict()
        del own["checks"]
        return own | self.checks._asdict() if self.checks else own

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> State:
        """The inverse of `tensors`."""
        own = {name: tensors[name] for name in cls._fields if name in tensors}
        rest = {name: value for name, value in tensors.items() if name not in own}
        return cls(**own, checks=Checks(**rest) if rest else ())


class Transition(NamedTuple):
    """Everything one step produces; (B,) tensors unless noted."""

    state: State
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    score: Tensor  # the sum of `terms`, whatever `reward_mode` pays
    terms: RewardTerms
    outcomes: Outcomes
    formulation: Tensor  # (B, D), the formulation that was evaluated
    formulation_clipped: Tensor
    is_optimal: Tensor
