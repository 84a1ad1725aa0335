"""The reward of a design: weights, safety limits and terms.

Pure batched functions, as in `dynamics`. The reward is section 2.1 of the HYDRA-BERT Stage-2
document, whole; its section 4.2 forgets the fibrosis penalty and the novelty bonus.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hydrogel_gym.problem.fields import OUTCOME_FIELDS, Outcomes

# Of a patient, a polymer, a formulation, a coverage and, of some models, a response.
RewardFunction = Callable[..., Outcomes]


class SafetyLimit(NamedTuple):
    """An outcome that is penalised beyond `{name}_limit` of a `RewardConfig`."""

    name: str
    outcome: str  # field of `Outcomes`
    is_ceiling: bool  # else a floor


SAFETY = (
    SafetyLimit("toxicity", "toxicity_risk", is_ceiling=True),
    SafetyLimit("integrity", "structural_integrity", is_ceiling=False),
    SafetyLimit("fibrosis", "fibrosis_risk", is_ceiling=True),
)
SAFETY_LIMITS = tuple(item.name for item in SAFETY)


def described(default: float, meaning: str) -> Any:
    """Field of `RewardConfig` with a default, and its meaning in `metadata`."""
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class RewardConfig:
    """Weights, safety limits and thresholds of the reward; defaults are the source's, section 2.1.

    Raises:
        ValueError: a value is not a finite number.
    """

    delta_ef_weight: float = described(3.0, "reward per percentage point of LVEF gained")
    stress_reduction_weight: float = described(1.5, "reward per 100 % of stress reduction")
    optimal_prob_weight: float = described(1.0, "reward of a certainly optimal design")
    toxicity_limit: float = described(0.15, "largest toxicity risk without penalty")
    toxicity_penalty: float = described(2.0, "what a design beyond it loses")
    integrity_limit: float = described(0.80, "smallest structural integrity without penalty")
    integrity_penalty: float = described(1.0, "what a design below it loses")
    fibrosis_limit: float = described(0.20, "largest fibrosis risk without penalty")
    fibrosis_penalty: float = described(0.5, "what a design beyond it loses")
    novelty_bonus: float = described(0.1, "reward of a polymer that is new in the episode")
    optimal_delta_ef_pct: float = described(
        3.0, "least gain of LVEF of the hard label `is_optimal`, which the reward does not use"
    )
    optimal_stress_reduction_pct: float = described(
        15.0, "least stress reduction of that label, by the Stage-1 definition"
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not (isinstance(value, Real) and math.isfinite(value)):
                raise ValueError(f"RewardConfig.{item.name} is {value!r}; allowed: a finite number")

    def stricter(self, margin: float = 0.0, penalty_scale: float = 1.0) -> RewardConfig:
        """The same reward with safety limits moved to the safe side and penalties multiplied.

        Args:
            margin: by how much each limit moves, in its own unit (all run from 0 to 1).
            penalty_scale: what each safety penalty is multiplied with.
        """
        toward_safety = {item.name: -margin if item.is_ceiling else margin for item in SAFETY}
        limits = {f"{name}_limit": self.limit(name) + toward_safety[name] for name in SAFETY_LIMITS}
        penalties = {
            f"{name}_penalty": self.penalty(name) * penalty_scale for name in SAFETY_LIMITS
        }
        return replace(self, **limits, **penalties)

    def limit(self, name: str) -> float:
        """Safety limit of one of `SAFETY_LIMITS`."""
        value: float = getattr(self, f"{name}_limit")
        return value

    def penalty(self, name: str) -> float:
        """What a design beyond one of `SAFETY_LIMITS` loses."""
        value: float = getattr(self, f"{name}_penalty")
        return value

    @property
    def max_score(self) -> float:
        """Largest reward of one step for outcomes within their physical ranges."""
        return self._extreme_score(1.0)

    @property
    def min_score(self) -> float:
        """Smallest reward of one step for outcomes within their physical ranges."""
        return -self._extreme_score(-1.0)

    def _extreme_score(self, sign: float) -> float:
        """Largest score times a sign; the ranges of the weighted outcomes are symmetric about 0."""
        high = {item.name: item.high for item in OUTCOME_FIELDS}
        gains = [self.optimal_prob_weight, *(-self.penalty(name) for name in SAFETY_LIMITS)]
        gains.append(self.novelty_bonus)
        return (
            abs(self.delta_ef_weight) * high["delta_ef_pct"]
            + abs(self.stress_reduction_weight) * high["stress_reduction_pct"] / 100.0
            + sum(max(0.0, sign * gain) for gain in gains)
        )


class RewardTerms(NamedTuple):
    """The signed terms whose sum is the score of a design; each a tensor of the batch shape."""

    reward_delta_ef: Tensor
    reward_stress_reduction: Tensor
    reward_optimal_prob: Tensor
    reward_toxicity: Tensor
    reward_integrity: Tensor
    reward_fibrosis: Tensor
    reward_novelty: Tensor


def breaches(outcomes: Outcomes, config: RewardConfig) -> dict[str, Tensor]:
    """Which of `SAFETY_LIMITS` are broken, bool tensors of the batch shape by name."""
    found = {}
    for item in SAFETY:
        value, limit = getattr(outcomes, item.outcome), config.limit(item.name)
        found[item.name] = value > limit if item.is_ceiling else value < limit
    return found


def safety_margins(outcomes: Outcomes, config: RewardConfig) -> dict[str, Tensor]:
    """How far each risk is from its limit, in its own unit and the batch shape; below 0 beyond it.

    The names are those of `SAFETY_LIMITS` with `_margin` after them.
    """
    margins = {}
    for item in SAFETY:
        value, limit = getattr(outcomes, item.outcome), config.limit(item.name)
        margins[f"{item.name}_margin"] = limit - value if item.is_ceiling else value - limit
    return margins


def is_optimal(outcomes: Outcomes, config: RewardConfig) -> Tensor:
    """The hard label of the Stage-1 definition, bool of the batch shape."""
    return (outcomes.delta_ef_pct >= config.optimal_delta_ef_pct) & (
        outcomes.stress_reduction_pct >= config.optimal_stress_reduction_pct
    )


def reward_terms(
    outcomes: Outcomes, is_novel: Tensor | bool, config: RewardConfig | None = None
) -> RewardTerms:
    """Signed terms of the reward.

    Args:
        outcomes: Stage-1 predictions, any batch shape.
        is_novel: whether the polymer was not yet used in this episode, bool or a bool tensor that
            broadcasts against the outcomes.
        config: weights and limits; the source's by default.
    """
    config = config or RewardConfig()
    novel = torch.as_tensor(is_novel, device=outcomes.delta_ef_pct.device)

    def where(mask: Tensor, size: float) -> Tensor:
        return mask.to(outcomes.delta_ef_pct.dtype) * size

    penalties = {
        f"reward_{name}": where(broken, -config.penalty(name))
        for name, broken in breaches(outcomes, config).items()
    }
    return RewardTerms(
        reward_delta_ef=config.delta_ef_weight * outcomes.delta_ef_pct,
        reward_stress_reduction=config.stress_reduction_weight
        * outcomes.stress_reduction_pct
        / 100.0,
        reward_optimal_prob=config.optimal_prob_weight * outcomes.optimal_logit.sigmoid(),
        reward_novelty=where(novel.expand_as(outcomes.delta_ef_pct), config.novelty_bonus),
        **penalties,
    )


def sum_terms(terms: RewardTerms) -> Tensor:
    """Score of a design, of the terms' shape and dtype."""
    return torch.stack(terms).sum(0)


def compute_reward(
    outcomes: Outcomes, is_novel: Tensor | bool = True, config: RewardConfig | None = None
) -> Tensor:
    """Score of a design: weighted gains, less safety penalties, plus the novelty bonus.

    Args:
        outcomes: Stage-1 predictions, any batch shape.
        is_novel: whether the polymer was not yet used in this episode (true in a first step).
        config: weights and limits; the source's by default.

    Returns:
        Reward of the batch shape, in the outcomes' dtype, dimensionless.
    """
    return sum_terms(reward_terms(outcomes, is_novel, config))
