"""The spaces of observations and actions, and the flat forms of an action.

Order, unit and bounds come from the field tables of `problem.fields`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor
from torch.nn import functional

from hydrogel_gym.problem.fields import (
    COVERAGES,
    FORMULATION_FIELDS,
    FORMULATION_HIGH,
    FORMULATION_LOW,
    NUM_PATIENT_FEATURES,
    PATIENT_FIELDS,
    Design,
    Field,
    bounds,
    formulation_at,
    formulation_shares,
    from_unit_range,
    to_unit_range,
)
from hydrogel_gym.problem.polymers import NUM_POLYMERS

ActionFormat = Literal["dict", "tuple", "box", "multidiscrete"]
ObsFormat = Literal["box", "dict"]

# Levels per formulation parameter of the `multidiscrete` format, both bounds included: zero
# conductivity must be reachable, since most polymers can be made at no other value.
FORMULATION_LEVELS = (11,) * len(FORMULATION_FIELDS)

# Layout of the `box` format: formulation, one score per polymer, one score per coverage.
_SCORES = slice(len(FORMULATION_FIELDS), len(FORMULATION_FIELDS) + NUM_POLYMERS)
FLAT_ACTION_DIM = _SCORES.stop + len(COVERAGES)


def episode_fields(horizon: int, max_score: float) -> tuple[Field, Field]:
    """Observation fields that change within an episode of `horizon` steps."""
    return (
        Field("current_best_score", 0.0, max_score, "max(0, best score of the episode so far)"),
        Field("iteration", 0.0, float(horizon), "steps taken in the episode"),
    )


def observation_space(
    obs_format: ObsFormat,
    *,
    horizon: int,
    max_score: float,
    observe_explored: bool,
    slot: tuple[Field, ...] = (),
    response: tuple[Field, ...] = (),
) -> spaces.Box | spaces.Dict:
    """Space of one observation.

    Args:
        obs_format: `"box"` for one float32 vector, `"dict"` for the source's groups.
        horizon: steps per episode.
        max_score: upper bound of `current_best_score`.
        observe_explored: append one 0/1 entry per polymer, 1 once it was used in the episode.
        slot: append a history of `horizon` slots with these fields each.
        response: append these factors.

    Raises:
        ValueError: `obs_format` is unknown.
    """
    if obs_format not in get_args(ObsFormat):
        raise ValueError(f"obs_format is {obs_format!r}; allowed: {get_args(ObsFormat)}")
    score, iteration = episode_fields(horizon, max_score)
    mask = tuple(Field(f"explored_{i}", 0.0, 1.0, "used") for i in range(NUM_POLYMERS))
    groups = {
        "patient_features": PATIENT_FIELDS[:NUM_PATIENT_FEATURES],
        "tissue_features": PATIENT_FIELDS[NUM_PATIENT_FEATURES:],
        "current_best_score": (score,),
        "iteration": (iteration,),
    } | ({"explored_polymers": mask} if observe_explored else {})
    if obs_format == "box":
        return spaces.Box(*bounds((*sum(groups.values(), ()), *slot * horizon, *response)))
    boxes: dict[str, spaces.Space[Any]]
    boxes = {name: spaces.Box(*bounds(fields)) for name, fields in groups.items()}
    if slot:
        low, high = (np.tile(bound, (horizon, 1)) for bound in bounds(slot))
        boxes["history"] = spaces.Box(low, high)
    if response:
        boxes["response"] = spaces.Box(*bounds(response))
    return spaces.Dict(boxes)


def split_observation(
    obs: Tensor, slot_width: int = 0, has_response: bool = False
) -> dict[str, Tensor]:
    """Group a (..., F) observation as the `dict` format does (views, no copy).

    Args:
        obs: as the `box` format has it.
        slot_width: of a history, if it has one, which then is (..., slots, slot_width).
        has_response: whether it ends with one.
    """
    num_patient_fields = len(PATIENT_FIELDS)
    groups = {
        "patient_features": obs[..., :NUM_PATIENT_FEATURES],
        "tissue_features": obs[..., NUM_PATIENT_FEATURES:num_patient_fields],
        "current_best_score": obs[..., num_patient_fields : num_patient_fields + 1],
        "iteration": obs[..., num_patient_fields + 1 : num_patient_fields + 2],
    }
    rest = obs[..., num_patient_fields + 2 :]
    if slot_width:
        groups["history"] = rest.unflatten(-1, (-1, slot_width))
    elif rest.shape[-1]:
        groups["response" if has_response else "explored_polymers"] = rest
    return groups


def action_space(
    action_format: ActionFormat,
    *,
    num_levels: Sequence[int] = FORMULATION_LEVELS,
    rescaled: bool = False,
) -> spaces.Dict | spaces.Tuple[Any] | spaces.Box | spaces.MultiDiscrete:
    """Space of one action.

    Args:
        action_format: `"dict"` or `"tuple"` for the hybrid action; `"box"` for one vector in
            [-1, 1] (formulation, then a score per polymer and per coverage, the largest of which is
            chosen); `"multidiscrete"` for polymer, one level per formulation parameter, coverage.
        num_levels: of each formulation parameter, for `"multidiscrete"`.
        rescaled: have the formulation of `"dict"` and `"tuple"` in [-1, 1], as `"box"` has it.

    Raises:
        ValueError: `action_format` is unknown.
    """
    if action_format not in get_args(ActionFormat):
        raise ValueError(f"action_format is {action_format!r}; allowed: {get_args(ActionFormat)}")
    if action_format == "box":
        return spaces.Box(-1.0, 1.0, (FLAT_ACTION_DIM,))
    if action_format == "multidiscrete":
        return spaces.MultiDiscrete([NUM_POLYMERS, *num_levels, len(COVERAGES)])
    physical = spaces.Box(FORMULATION_LOW, FORMULATION_HIGH)
    heads = {
        "polymer_id": spaces.Discrete(NUM_POLYMERS),
        "formulation": spaces.Box(-1.0, 1.0, physical.shape) if rescaled else physical,
        "coverage": spaces.Discrete(len(COVERAGES)),
    }
    # The order is the contract of the tuple format, so the Dict must not be sorted into it.
    return spaces.Dict(heads) if action_format == "dict" else spaces.Tuple(tuple(heads.values()))


def decode_box(action: Tensor) -> Design:
    """Design of a (B, FLAT_ACTION_DIM) action; the formulation is left unclipped."""
    formulation, polymer, coverage = action.tensor_split([_SCORES.start, _SCORES.stop], dim=-1)
    return Design(polymer.argmax(-1), from_unit_range(formulation), coverage.argmax(-1))


def encode_box(design: Design) -> Tensor:
    """The (B, FLAT_ACTION_DIM) action of designs: what is chosen scores 1, everything else -1."""
    formulation = to_unit_range(design.formulation)
    scores = [
        2.0 * functional.one_hot(index, size).to(formulation.dtype) - 1.0
        for index, size in ((design.polymer_id, NUM_POLYMERS), (design.coverage, len(COVERAGES)))
    ]
    return torch.cat([formulation, *scores], dim=-1)


def decode_multidiscrete(action: Tensor, num_levels: Sequence[int] = FORMULATION_LEVELS) -> Design:
    """Design of a (B, 1 + D + 1) integer action."""
    levels = zip(action[..., 1:-1].unbind(-1), num_levels, strict=True)
    formulation = formulation_at(level.to(torch.float32) / (size - 1) for level, size in levels)
    return Design(action[..., 0], formulation, action[..., -1])


def encode_multidiscrete(design: Design, num_levels: Sequence[int] = FORMULATION_LEVELS) -> Tensor:
    """The (B, 1 + D + 1) int64 action whose levels are nearest to the formulation of designs."""
    levels = [
        (share * (size - 1)).round().clamp(0, size - 1).to(torch.int64)
        for share, size in zip(formulation_shares(design.formulation), num_levels, strict=True)
    ]
    return torch.stack([design.polymer_id, *levels, design.coverage], dim=-1)
