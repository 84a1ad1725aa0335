"""The one table of patient, episode, formulation and outcome fields, and the spaces built from it.

Order, unit and bounds of everything that crosses the environment's boundary are decided here. The
patient limits are those of the virtual cohort (`patients/README.md` gives the evidence for each);
the formulation limits and the coverage levels are the action space of the HYDRA-BERT Stage-2
document, section 2.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor
from torch.nn import functional

ActionFormat = Literal["dict", "tuple", "box", "multidiscrete"]
ObsFormat = Literal["box", "dict"]


class Field(NamedTuple):
    """One scalar field: its name (unit last), closed range and meaning."""

    name: str
    low: float
    high: float
    meaning: str


# Order of the source's `patient_features`, then `tissue_features`.
PATIENT_FIELDS = (
    Field("lvef_pct", 15.0, 55.0, "left-ventricular ejection fraction, %"),
    Field("gls_pct", -20.0, -3.0, "global longitudinal strain, % (negative is shortening)"),
    Field("edv_ml", 90.0, 400.0, "end-diastolic volume, mL"),
    # EDV (1 - LVEF/100) at the corners of the two ranges above.
    Field("esv_ml", 40.5, 340.0, "end-systolic volume, mL"),
    Field("scar_fraction_pct", 5.0, 45.0, "scar, % of the left ventricle"),
    Field("bz_fraction_pct", 4.0, 28.0, "border zone, % of the left ventricle"),
    # Lower corner of stress concentration x remote stress; the upper limit is the cohort's own.
    Field("bz_stress_kpa", 7.2, 90.0, "border-zone end-systolic wall stress, kPa"),
    Field("healthy_stress_kpa", 6.0, 35.0, "remote-zone end-systolic wall stress, kPa"),
    Field("stress_concentration", 1.2, 3.5, "border-zone / remote-zone stress, ratio"),
    Field("transmurality", 0.2, 1.0, "share of the wall's depth that is scar, 0 to 1"),
    Field("wall_thickness_mm", 4.0, 13.0, "end-diastolic wall thickness of the treated region, mm"),
)
NUM_PATIENT_FEATURES = 6  # the rest of PATIENT_FIELDS are the source's tissue features

FORMULATION_FIELDS = (
    Field("youngs_modulus_kpa", 5.0, 30.0, "stiffness requested, kPa"),
    Field("half_life_days", 7.0, 180.0, "degradation half-life requested, days"),
    Field("conductivity_s_per_m", 0.0, 1.0, "conductivity requested, S/m"),
    Field("thickness_mm", 1.0, 5.0, "patch thickness, mm"),
)

COVERAGES = ("scar_only", "scar_bz25", "scar_bz50", "scar_bz100")
COVERAGE_FRACTIONS = (0.0, 0.25, 0.5, 1.0)  # share of the border zone that is covered
NUM_POLYMERS = 24

# Ranges are physical limits, not what a good design reaches; a Stage-1 model is held to them when
# it is loaded, and the bound of `current_best_score` follows from them.
OUTCOME_FIELDS = (
    Field("delta_ef_pct", -100.0, 100.0, "predicted change in LVEF, percentage points"),
    Field("stress_reduction_pct", -100.0, 100.0, "border-zone stress reduction, %"),
    Field("optimal_logit", -np.inf, np.inf, "logit of the probability that the design is optimal"),
    Field("toxicity_risk", 0.0, 1.0, "toxicity risk, 0 to 1"),
    Field("structural_integrity", 0.0, 1.0, "structural integrity, 0 to 1"),
    Field("fibrosis_risk", 0.0, 1.0, "fibrosis risk, 0 to 1"),
)


class Outcomes(NamedTuple):
    """What a Stage-1 model predicts for a batch of designs; fields as in `OUTCOME_FIELDS`.

    Every field is a float tensor of the batch shape.
    """

    delta_ef_pct: Tensor
    stress_reduction_pct: Tensor
    optimal_logit: Tensor
    toxicity_risk: Tensor
    structural_integrity: Tensor
    fibrosis_risk: Tensor


class Design(NamedTuple):
    """A complete action: polymer row, formulation and coverage level.

    Shapes, for a batch of B designs: polymer_id (B,) int64, formulation (B, 4) float32 in the order
    and units of `FORMULATION_FIELDS`, coverage (B,) int64 index into `COVERAGES`.
    """

    polymer_id: Tensor
    formulation: Tensor
    coverage: Tensor


def flat_designs(
    patient: Tensor, polymer_id: Tensor, formulation: Tensor, coverage: Tensor
) -> tuple[tuple[int, ...], list[Tensor]]:
    """What a reward model is given, of any batch shapes that broadcast, in one batch dimension.

    Returns:
        The broadcast batch shape; and of its B designs patient (B, 11) and formulation (B, 4) in
        float32, polymer_id (B,) and coverage (B,) in int64, in the order of the arguments.
    """
    shape = torch.broadcast_shapes(
        patient.shape[:-1], polymer_id.shape, formulation.shape[:-1], coverage.shape
    )
    patient, formulation = (
        x.to(torch.float32).expand(*shape, x.shape[-1]).reshape(math.prod(shape), x.shape[-1])
        for x in (patient, formulation)
    )
    polymer_id, coverage = (
        x.to(torch.int64).expand(shape).reshape(-1) for x in (polymer_id, coverage)
    )
    return tuple(shape), [patient, polymer_id, formulation, coverage]


def _bounds(fields: tuple[Field, ...]) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([field.low for field in fields], np.float32),
        np.array([field.high for field in fields], np.float32),
    )


FORMULATION_LOW, FORMULATION_HIGH = _bounds(FORMULATION_FIELDS)

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
    obs_format: ObsFormat, *, horizon: int, max_score: float, observe_explored: bool
) -> spaces.Box | spaces.Dict:
    """Space of one observation.

    Args:
        obs_format: `"box"` for one float32 vector, `"dict"` for the source's groups.
        horizon: steps per episode.
        max_score: upper bound of `current_best_score`.
        observe_explored: append one 0/1 entry per polymer, 1 once it was used in the episode.

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
    if obs_format == "dict":
        return spaces.Dict({name: spaces.Box(*_bounds(fields)) for name, fields in groups.items()})
    return spaces.Box(*_bounds(sum(groups.values(), ())))


def split_observation(obs: Tensor) -> dict[str, Tensor]:
    """Group a (..., 13) or (..., 37) observation as the `dict` format does (views, no copy)."""
    num_patient_fields = len(PATIENT_FIELDS)
    groups = {
        "patient_features": obs[..., :NUM_PATIENT_FEATURES],
        "tissue_features": obs[..., NUM_PATIENT_FEATURES:num_patient_fields],
        "current_best_score": obs[..., num_patient_fields : num_patient_fields + 1],
        "iteration": obs[..., num_patient_fields + 1 : num_patient_fields + 2],
    }
    if obs.shape[-1] > num_patient_fields + 2:
        groups["explored_polymers"] = obs[..., num_patient_fields + 2 :]
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


def _formulation_at(shares: Iterable[Tensor]) -> Tensor:
    """Formulation (..., 4) at shares, four of (...), of the way from lower to upper bounds."""
    # Bounds as a tensor would be copied to an accelerator at every step, a synchronisation.
    columns = zip(shares, FORMULATION_FIELDS, strict=True)
    return torch.stack([item.low + part * (item.high - item.low) for part, item in columns], -1)


def _shares(formulation: Tensor) -> list[Tensor]:
    """Where a formulation (..., 4) lies between its bounds, four of (...)."""
    columns = zip(formulation.unbind(-1), FORMULATION_FIELDS, strict=True)
    return [(value - item.low) / (item.high - item.low) for value, item in columns]


def from_unit_range(formulation: Tensor) -> Tensor:
    """Formulation (..., 4) in physical units of one in [-1, 1]; not clipped."""
    return _formulation_at(((formulation + 1.0) / 2.0).unbind(-1))


def to_unit_range(formulation: Tensor) -> Tensor:
    """The inverse of `from_unit_range`, to the rounding of the dtype."""
    return torch.stack(_shares(formulation), -1) * 2.0 - 1.0


def decode_box(action: Tensor) -> Design:
    """Design of a (B, 32) flat action; the formulation is left unclipped."""
    formulation, polymer, coverage = action.tensor_split([_SCORES.start, _SCORES.stop], dim=-1)
    return Design(polymer.argmax(-1), from_unit_range(formulation), coverage.argmax(-1))


def encode_box(design: Design) -> Tensor:
    """A (B, 32) flat action of designs: the score of what is chosen is 1, every other -1."""
    formulation = to_unit_range(design.formulation)
    scores = [
        2.0 * functional.one_hot(index, size).to(formulation.dtype) - 1.0
        for index, size in ((design.polymer_id, NUM_POLYMERS), (design.coverage, len(COVERAGES)))
    ]
    return torch.cat([formulation, *scores], dim=-1)


def decode_multidiscrete(action: Tensor, num_levels: Sequence[int] = FORMULATION_LEVELS) -> Design:
    """Design of a (B, 6) integer action."""
    levels = zip(action[..., 1:-1].unbind(-1), num_levels, strict=True)
    formulation = _formulation_at(level.to(torch.float32) / (size - 1) for level, size in levels)
    return Design(action[..., 0], formulation, action[..., -1])


def encode_multidiscrete(design: Design, num_levels: Sequence[int] = FORMULATION_LEVELS) -> Tensor:
    """The (B, 6) int64 action whose levels are nearest to the formulation of designs."""
    levels = [
        (share * (size - 1)).round().clamp(0, size - 1).to(torch.int64)
        for share, size in zip(_shares(design.formulation), num_levels, strict=True)
    ]
    return torch.stack([design.polymer_id, *levels, design.coverage], dim=-1)
