"""The one table of patient, formulation and outcome fields: order, unit, bounds and meaning.

Order, unit and bounds of everything that crosses the environment's boundary are decided here. The
patient limits are those of the virtual cohort (`patients/README.md` gives the evidence for each);
the formulation limits and the coverage levels are the action space of the HYDRA-BERT Stage-2
document, section 2.1.

Shapes, here and elsewhere: B designs, C columns of `PATIENT_FIELDS`, D of `FORMULATION_FIELDS`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Field(NamedTuple):
    """One scalar field: its name (unit last), closed range and meaning (unit last)."""

    name: str
    low: float
    high: float
    meaning: str
    # Of a formulation alone: the precision that a laboratory can keep, in the field's unit, and the
    # name that the column has in the HYDRA-BERT Stage-2 document, section 5.2.
    resolution: float = math.nan
    stage2_name: str = ""


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
    Field("youngs_modulus_kpa", 5.0, 30.0, "stiffness requested, kPa", 0.01, "stiffness_kPa"),
    Field(
        "half_life_days",
        7.0,
        180.0,
        "degradation half-life requested, days",
        0.1,
        "degradation_days",
    ),
    Field(
        "conductivity_s_per_m",
        0.0,
        1.0,
        "conductivity requested, S/m",
        0.001,
        "conductivity_S_m",
    ),
    Field("thickness_mm", 1.0, 5.0, "patch thickness, mm", 0.01, "thickness_mm"),
)

COVERAGES = ("scar_only", "scar_bz25", "scar_bz50", "scar_bz100")
COVERAGE_FRACTIONS = (0.0, 0.25, 0.5, 1.0)  # share of the border zone that is covered

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

    Shapes, for a batch of B designs: polymer_id (B,) int64, formulation (B, D) float32 in the order
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
        The broadcast batch shape; and of its B designs patient (B, C) and formulation (B, D) in
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


def by_name(fields: tuple[Field, ...], values: Tensor) -> dict[str, Tensor]:
    """Columns (...) of (..., len(fields)) values under the names of the fields; views."""
    names = (field.name for field in fields)
    return dict(zip(names, values.unbind(-1), strict=True))


def bounds(fields: tuple[Field, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds of fields, float32."""
    return (
        np.array([field.low for field in fields], np.float32),
        np.array([field.high for field in fields], np.float32),
    )


FORMULATION_LOW, FORMULATION_HIGH = bounds(FORMULATION_FIELDS)


def formulation_at(shares: Iterable[Tensor]) -> Tensor:
    """Formulation (..., D) at shares, D of (...), of the way from lower to upper bounds."""
    # Bounds as a tensor would be copied to an accelerator at every step, a synchronisation.
    columns = zip(shares, FORMULATION_FIELDS, strict=True)
    return torch.stack([item.low + part * (item.high - item.low) for part, item in columns], -1)


def formulation_shares(formulation: Tensor) -> list[Tensor]:
    """Where a formulation (..., D) lies between its bounds, D of (...)."""
    columns = zip(formulation.unbind(-1), FORMULATION_FIELDS, strict=True)
    return [(value - item.low) / (item.high - item.low) for value, item in columns]


def from_unit_range(formulation: Tensor) -> Tensor:
    """Formulation (..., D) in physical units of one in [-1, 1]; not clipped."""
    return formulation_at(((formulation + 1.0) / 2.0).unbind(-1))


def to_unit_range(formulation: Tensor) -> Tensor:
    """The inverse of `from_unit_range`, to the rounding of the dtype."""
    return torch.stack(formulation_shares(formulation), -1) * 2.0 - 1.0
