"""Checks of designs on a patient whose response is hidden: what is measured, recorded and paid.

Pure batched functions, as in `dynamics`, which calls them where `EnvParams.adaptive` is set.
Shapes: B environments, H slots of a history (the horizon), W columns of a slot, R fields of a
response, K outcomes, L levels of a draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hydrogel_gym.problem.belief import prior_belief, sample_belief
from hydrogel_gym.problem.fields import (
    COVERAGES,
    FORMULATION_FIELDS,
    OUTCOME_FIELDS,
    Design,
    Field,
    Outcomes,
)
from hydrogel_gym.problem.polymers import NUM_POLYMERS
from hydrogel_gym.problem.response import draw_response, response_levels
from hydrogel_gym.problem.reward import RewardConfig
from hydrogel_gym.problem.streams import draw_levels, level_middles

# What an observation ends with: the checks, or factors of the response.
Observe = Literal["history", "estimate", "sample", "response"]
# An observation has finite bounds; at this logit a probability is 0 or 1 to float32.
_MAX_LOGIT = 40.0
# What can be measured of each outcome: its physical range.
MEASURED_FIELDS = tuple(
    item._replace(low=max(item.low, -_MAX_LOGIT), high=min(item.high, _MAX_LOGIT))
    if item.name == "optimal_logit"
    else item
    for item in OUTCOME_FIELDS
)


def slot_fields(config: RewardConfig) -> tuple[Field, ...]:
    """The W columns of one slot of a history: a design and what was measured; 0 while empty.

    Polymers and coverages are numbers: with a column for each, an observation would be three times
    as wide, and a step of 2,000 environments slower by a fifth.

    Args:
        config: bounds the score.
    """
    measured = (item._replace(name=f"measured_{item.name}") for item in MEASURED_FIELDS)
    score = Field("measured_score", config.min_score, config.max_score, "score as measured, reward")
    columns = (
        Field("polymer_number", 0.0, float(NUM_POLYMERS), "polymer_id + 1, index"),
        *FORMULATION_FIELDS,
        Field("coverage", 0.0, len(COVERAGES) - 1.0, "index"),
        *measured,
        score,
    )
    return tuple(x._replace(low=min(x.low, 0.0), high=max(x.high, 0.0)) for x in columns)


SLOT_WIDTH = len(slot_fields(RewardConfig()))


class Checks(NamedTuple):
    """What a `State` has besides, where patients respond otherwise than predicted."""

    response: Tensor  # (B, R), factors of this episode; hidden
    # (B, H, W), of which only what was tried in this episode counts: nothing at its beginning, and
    # the slots from `iteration` on are 0 after its first check. (B, 0, W) where it is not observed.
    history: Tensor
    best_measured: Tensor  # (B,), max(0, scores measured in this episode)
    belief: Tensor  # (B, R, 1 + R), mean and root, see `belief`; (B, R, 0) where none is observed


@dataclass(frozen=True, eq=False)
class AdaptiveParams:
    """What a user may vary of an adaptive problem; `response_sd` is in `response_levels`.

    Attributes:
        response_levels: (L, R), see `response.response_levels`.
        normal_levels: (L,), the middles of equally likely parts of a standard normal distribution.
        outcome_noise: K deviations of measured outcomes, each in the outcome's unit.
        num_slots: H, or 0 where no history is observed.
        prior: (R, 1 + R), see `belief.prior_belief`; (R, 0) where no belief is observed.
        observe: what an observation ends with.
        check_cost: what each check takes off the reward.
    """

    response_levels: Tensor
    normal_levels: Tensor
    outcome_noise: tuple[float, ...]
    num_slots: int
    prior: Tensor
    observe: Observe = "history"
    check_cost: float = 0.0

    @classmethod
    def make(
        cls,
        response_sd: float,
        outcome_noise: tuple[float, ...],
        horizon: int,
        check_cost: float,
        observe: Observe,
        like: Tensor,
    ) -> AdaptiveParams:
        """Parameters with tables in the dtype and on the device of a tensor."""
        normal = torch.special.ndtri(level_middles())
        levels = response_levels(response_sd)
        prior = prior_belief(levels)
        return cls(
            response_levels=levels.to(like),
            normal_levels=normal.to(like),
            outcome_noise=outcome_noise,
            num_slots=horizon if observe == "history" else 0,
            prior=(prior if observe in ("estimate", "sample") else prior[:, :0]).to(like),
            observe=observe,
            check_cost=check_cost,
        )

    def begin(self, seed: Tensor, episode: Tensor, history: Tensor | None) -> Checks:
        """The beginning of an episode.

        Args:
            seed: (B,) int64 stream keys.
            episode: (B,) int64 counters.
            history: of the episode before, which is overwritten later: blanking it now would take
                as long as a check.
        """
        response = draw_response(seed, episode, self.response_levels)
        if history is None:
            history = response.new_zeros(seed.shape[0], self.num_slots, SLOT_WIDTH)
        belief = self.prior.expand(seed.shape[0], -1, -1).clone()
        return Checks(response, history, response.new_zeros(seed.shape[0]), belief)


def with_history(columns: Tensor, checks: Checks, iteration: Tensor) -> Tensor:
    """(B, F + H W) of (B, F) columns and the history as it is observed: blank in a first step."""
    joined: Tensor = torch.ops.hydrogel_gym.join_history(columns, checks.history, iteration)
    return joined


def observed_response(
    checks: Checks, params: AdaptiveParams, seed: Tensor, episode: Tensor, step: Tensor
) -> Tensor:
    """(B, R) logarithms of the true factors, of their estimates, or of a draw of the belief.

    Logarithms, since what is best depends on the ratios of factors.

    Args:
        checks: what was measured so far.
        params: what is observed.
        seed: (B,) int64 stream keys; a draw depends on these three and the belief alone.
        episode: (B,) int64 counters.
        step: (B,) int64, checks so far.
    """
    if params.observe == "response":
        return checks.response.log()
    if params.observe == "estimate":
        return checks.belief[..., 0].log()
    levels = draw_levels(checks.response.shape[-1], seed, episode, step, 1)
    return sample_belief(checks.belief, params.normal_levels[levels]).log()


def _blanked(history: Tensor, iteration: Tensor) -> Tensor:
    """(B, H W) history, 0 where an episode has just begun."""
    begun, rows = iteration == 0, history.flatten(1)
    if rows.device.type == "cpu" and not begun.any():  # elsewhere to look would be to wait
        return rows
    return rows * (~begun).unsqueeze(-1).to(rows.dtype)  # a choice by a mask is far slower


def _join(columns: Tensor, history: Tensor, iteration: Tensor) -> Tensor:
    return torch.cat([columns, _blanked(history, iteration)], -1)


def _record(history: Tensor, iteration: Tensor, slot: Tensor) -> Tensor:
    num_envs, num_slots, width = history.shape
    first = torch.arange(num_envs, device=history.device) * num_slots
    # An episode that has ended and is not reset overwrites its last slot.
    index = first + iteration.clamp(0, num_slots - 1)
    return _blanked(history, iteration).view(-1, width).index_copy(0, index, slot).view_as(history)


def _like_joined(columns: Tensor, history: Tensor, iteration: Tensor) -> Tensor:
    return columns.new_empty(columns.shape[0], columns.shape[1] + history[0].numel())


def _like_recorded(history: Tensor, iteration: Tensor, slot: Tensor) -> Tensor:
    return torch.empty_like(history)


# Operators of their own, since a compiler that sees into them moves the numbers of a history one by
# one, which takes six times as long. Registered one by one, since a call of what `custom_op` makes
# takes as long as half of such an operator.
_LIBRARY = torch.library.Library("hydrogel_gym", "DEF")
_LIBRARY.define("join_history(Tensor columns, Tensor history, Tensor iteration) -> Tensor")
_LIBRARY.define("record_slot(Tensor history, Tensor iteration, Tensor slot) -> Tensor")
_LIBRARY.impl("join_history", _join, "CompositeExplicitAutograd")
_LIBRARY.impl("record_slot", _record, "CompositeExplicitAutograd")
torch.library.register_fake("hydrogel_gym::join_history", _like_joined, lib=_LIBRARY)
torch.library.register_fake("hydrogel_gym::record_slot", _like_recorded, lib=_LIBRARY)


def measured(
    outcomes: Outcomes, params: AdaptiveParams, seed: Tensor, episode: Tensor, step: Tensor
) -> Outcomes:
    """Outcomes as measured: with normal noise, clipped to their ranges; as they are without noise.

    Args:
        outcomes: true ones, (B,) each.
        params: deviations and levels.
        seed: (B,) int64 stream keys; the noise depends on these three alone.
        episode: (B,) int64 counters.
        step: (B,) int64, checks before this one.
    """
    if not any(params.outcome_noise):
        return outcomes
    levels = draw_levels(len(outcomes), seed, episode, step + 1)  # counter 0 is the response
    noise = params.normal_levels[levels].unbind(-1)
    rows = zip(outcomes, params.outcome_noise, noise, MEASURED_FIELDS, strict=True)
    return Outcomes(
        *((value + sd * z).clamp(x.low, x.high) if sd else value for value, sd, z, x in rows)
    )


def recorded(
    history: Tensor,
    iteration: Tensor,
    design: Design,
    outcomes: Outcomes,
    score: Tensor,
) -> Tensor:
    """(B, H, W) history with the slot of this check filled, if it has any."""
    if not history.shape[1]:
        return history
    rows = zip(outcomes, MEASURED_FIELDS, strict=True)
    columns = [
        (design.polymer_id + 1).to(score.dtype),
        *design.formulation.unbind(-1),
        design.coverage.to(score.dtype),
        *(x.clamp(item.low, item.high) for x, item in rows),
        score,
    ]
    # Finite also for an action that is not allowed; times 0 it would not be blank.
    slot = torch.stack(columns, -1).nan_to_num()
    recorded: Tensor = torch.ops.hydrogel_gym.record_slot(history, iteration, slot)
    return recorded
