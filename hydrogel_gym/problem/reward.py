"""The reward of a design: weights, safety limits and terms.

Pure batched functions, as in `dynamics`. The reward is section 2.1 of the HYDRA-BERT Stage-2
document, whole; its section 4.2 forgets the fibrosis penalty and the novelty bonus.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from hydrogel_gym.problem.fields import OUTCOME_FIELDS, Outcomes

RewardFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Outcomes]


@dataclass(frozen=True)
class RewardConfig:
    """Weights, safety limits and thresholds of the reward; defaults are the source's, section 2.1.

    Raises:
        ValueError: a value is not a finite number.
    """

    delta_ef_weight: float = 3.0  # per percentage point
    stress_reduction_weight: float = 1.5  # per 100 %
    optimal_prob_weight: float = 1.0
    toxicity_limit: float = 0.15
    toxicity_penalty: float = 2.0
    integrity_limit: float = 0.80
    integrity_penalty: float = 1.0
    fibrosis_limit: float = 0.20
    fibrosis_penalty: float = 0.5
    novelty_bonus: float = 0.1
    # The hard label `is_optimal`: Stage-1 definition, not part of the reward.
    optimal_delta_ef_pct: float = 3.0
    optimal_stress_reduction_pct: float = 15.0

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
        return replace(
            self,
            toxicity_limit=self.toxicity_limit - margin,
            integrity_limit=self.integrity_limit + margin,
            fibrosis_limit=self.fibrosis_limit - margin,
            toxicity_penalty=self.toxicity_penalty * penalty_scale,
            integrity_penalty=self.integrity_penalty * penalty_scale,
            fibrosis_penalty=self.fibrosis_penalty * penalty_scale,
        )

    @property
    def max_score(self) -> float:
        """Largest reward of one step for outcomes within their physical ranges."""
        delta_ef, stress_reduction = OUTCOME_FIELDS[0].high, OUTCOME_FIELDS[1].high
        return (
            abs(self.delta_ef_weight) * delta_ef
            + abs(self.stress_reduction_weight) * stress_reduction / 100.0
            + sum(
                max(0.0, gain)
                for gain in (
                    self.optimal_prob_weight,
                    -self.toxicity_penalty,
                    -self.integrity_penalty,
                    -self.fibrosis_penalty,
                    self.novelty_bonus,
                )
            )
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

    def penalty(breached: Tensor, size: float) -> Tensor:
        return breached.to(outcomes.delta_ef_pct.dtype) * -size

    return RewardTerms(
        reward_delta_ef=config.delta_ef_weight * outcomes.delta_ef_pct,
        reward_stress_reduction=config.stress_reduction_weight
        * outcomes.stress_reduction_pct
        / 100.0,
        reward_optimal_prob=config.optimal_prob_weight * outcomes.optimal_logit.sigmoid(),
        reward_toxicity=penalty(
            outcomes.toxicity_risk > config.toxicity_limit, config.toxicity_penalty
        ),
        reward_integrity=penalty(
            outcomes.structural_integrity < config.integrity_limit, config.integrity_penalty
        ),
        reward_fibrosis=penalty(
            outcomes.fibrosis_risk > config.fibrosis_limit, config.fibrosis_penalty
        ),
        reward_novelty=penalty(novel.expand_as(outcomes.delta_ef_pct), -config.novelty_bonus),
    )


def sum_terms(terms: RewardTerms) -> Tensor:
    """Score of a design, of the terms' shape and dtype."""
    return torch.stack(terms).sum(0)


def compute_reward(
    outcomes: Outcomes, is_novel: Tensor | bool = True, config: RewardConfig | None = None
) -> Tensor:
    """Score of a design: 3 dEF + 1.5 R/100 + P(optimal) - safety penalties + novelty bonus.

    Args:
        outcomes: Stage-1 predictions, any batch shape.
        is_novel: whether the polymer was not yet used in this episode (true in a first step).
        config: weights and limits; the source's by default.

    Returns:
        Reward of the batch shape, in the outcomes' dtype, dimensionless.
    """
    return sum_terms(reward_terms(outcomes, is_novel, config))
