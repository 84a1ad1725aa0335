"""The built-in Stage-1 model: outcomes of a hydrogel design as closed-form equations.

It stands in for the trained Stage-1 network of HYDRA-BERT, which is not public. It is an
educational prior: its shapes follow published animal and finite-element work, its constants were
chosen by hand, and it was fitted to no patient. A predicted change in LVEF is not a clinical fact.
No controlled trial has shown that an acellular hydrogel raises LVEF after infarction.

What a design can be made of (feasibility) comes first, then dimensionless groups, then the
outcomes, in the symbols given beside each step. Only the ratio of border-zone to remote stress
enters, so cohorts on different absolute stress scales can be used; GLS and the volumes do not
enter at all. Everything is smooth apart from the clips.

Every constant carries the grade of its number: A read in the study's abstract, B secondary source,
C from memory of the literature, D assumption, also one chosen within a published range.
"definition" is no belief: the threshold of a label, a guard or limit, or the unit in which other
constants are expressed. A grade in a remark or a heading is that of the form, the sign or the
range; "form" is the shape of the equation, as against its numbers. `REFERENCES` lists the sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, softplus

from hydrogel_gym.problem.fields import (
    COVERAGE_FRACTIONS,
    FORMULATION_FIELDS,
    PATIENT_FIELDS,
    Outcomes,
    by_name,
)
from hydrogel_gym.problem.polymers import PolymerTable, load_polymers
from hydrogel_gym.problem.response import RESPONSE_NAMES

OutcomeScale = Literal["source", "literature"]
Grade = Literal["A", "B", "C", "D", "definition"]

# Sources, by the keys that remarks and headings name in brackets.
REFERENCES = {
    "Anker2015": "AUGMENT-HF. Eur Heart J 2015. PMC4561351.",
    "Berry2006": "Stiffness of myocardium and scar; not re-read.",
    "Blakney2012": "10.1002/jbm.a.34104.",
    "Chen2019": "10.2147/IJN.S204971.",
    "Cui2018": "Theranostics 8:2752. 10.7150/thno.22599.",
    "Cureus2020": "Predictors of LVEF gain, ischaemic cardiomyopathy, n=178. 10.7759/cureus.12110.",
    "Engler2008": "Stiffness of myocardium and scar; not re-read.",
    "Fomovsky2011": "PMC3328213.",
    "He2020": "Biomaterials 120285.",
    "Kichula2014": "Biomech Model Mechanobiol.",
    "Li2020": "PMC7484038.",
    "Lin2019": "Nat Biomed Eng.",
    "Miller2013": "Int J Numer Meth Biomed Eng. 10.1002/cnm.2551.",
    "Niederer2011": "Electrophysiology benchmark.",
    "Noshadi2017": "10.1038/s41598-017-04280-w.",
    "ORegan2012": "JCMR 14:41.",
    "Patch2005": "Infarct patch against wrap, 69 sheep. Ann Thorac Surg 2005. PMID 15734399.",
    "Potluri2026": "HYDRA-BERT, public configuration and Stage-1, Stage-2 documents.",
    "Rane2011": "PLoS ONE 6:e21571.",
    "Restraint2013": "Inflatable infarct restraint. Ann Thorac Surg 2013. PMC3607370.",
    "Rodell2016": "10.1161/CIRCINTERVENTIONS.116.004058, PMC5123705.",
    "Sayut2025": "arXiv:2508.10188.",
    "Shah2013": "JAMA 309:909.",
    "Sun2010": "J Thorac Cardiovasc Surg. PMC2907919.",
    "Tous2011": "10.1021/bm201198x, PMC3246217.",
    "Vunjak2010": "Patch thickness and diffusion, via BioNumbers 113201.",
    "Wall2006": "Circulation 114:2627. 10.1161/CIRCULATIONAHA.106.657270.",
    "Ye2020": "10.7150/thno.38876.",
}


def graded(grade: Grade, default: float, remark: str = "", *, heading: str = "") -> Any:
    """Field of `MechanisticParams`: its default, and in `metadata` what is known of that number.

    Args:
        grade: grade of the evidence for the number.
        default: the number.
        remark: about this constant.
        heading: what holds for this constant and those below it, up to the next with a heading.
    """
    return field(default=default, metadata={"grade": grade, "remark": remark, "heading": heading})


@dataclass(frozen=True)
class MechanisticParams:
    """Every constant of the model; vary them for a sensitivity analysis.

    Names end in the unit; `_ln` is a difference of natural logarithms, `_pp` percentage points of
    LVEF. The rest are dimensionless. `names_graded("D")` lists the assumptions; `graded` says what
    the metadata of a field holds.
    """

    stiffness_mismatch_width_ln: float = graded(
        "D",
        0.6,
        heading=(
            "Feasibility: how far outside its window a polymer is requested; tolerance of one "
            "width."
        ),
    )
    half_life_mismatch_width_ln: float = graded("D", 0.8)
    conductivity_mismatch_width_s_per_m: float = graded("D", 0.5)
    efficacy_floor: float = graded("D", 0.6, "batch variability outside costs at most 40 %")

    reference_youngs_modulus_kpa: float = graded(
        "C", 15.0, "healthy: [Berry2006], [Engler2008]", heading="Groups."
    )
    wall_thickness_min_mm: float = graded("definition", 4.0, "of the cohort; [Shah2013] thinned, A")
    wall_thickness_max_mm: float = graded("D", 14.0, "thicker is no post-infarction wall")
    coverage_saturation: float = graded("D", 2.2, "that extent matters: [Patch2005], A")
    reference_bz_pct: float = graded("D", 13.5, "mean of the virtual cohort")
    bz_share_min: float = graded("D", 0.3)
    bz_share_max: float = graded("D", 1.4)
    healing_window_days: float = graded("A", 56.0, "mean support over 8 weeks [Tous2011]; form D")

    load_scar_share: float = graded(
        "D",
        0.60,
        heading=(
            "Load index: stiffness x thickness [Wall2006], [Li2020] (B, C). The reference "
            "cohesion is the middle of the polymer table."
        ),
    )
    reference_cohesion: float = graded("definition", 0.93)
    cohesion_exponent: float = graded("D", 2.0)

    need_scale: float = graded(
        "D",
        0.6,
        heading=(
            "Need: stress must be raised to be lowered (acute stage of [Miller2013], A). It is "
            "1 at the reference, the mean of the virtual cohort."
        ),
    )
    need_reference_stress_concentration: float = graded("definition", 1.87)
    need_min: float = graded("D", 0.5)
    need_max: float = graded("D", 1.25)

    stress_relief_max_pct: float = graded(
        "D",
        45.0,
        heading=(
            "Stress relief: 8 to 10 % [Miller2013], 14 to 26 % [Kichula2014], about 20 % "
            "[Wall2006], below the 50 % of the stiffer gel of [Rodell2016]. Range A, form D."
        ),
    )
    load_half_saturation: float = graded("D", 0.42)

    mechanical_gain_max_pp: float = graded(
        "D",
        5.2,
        heading=(
            "Mechanical gain: saturating, for relief alone does not restore contractility "
            "[Sun2010], [Fomovsky2011], [Rane2011]. Range B."
        ),
    )
    mechanical_gain_scale_pct: float = graded("D", 16.0)

    biological_gain_max_pp: float = graded(
        "D",
        4.4,
        heading="Biological gain: neither gone in days nor permanent [Rane2011], [Tous2011].",
    )
    bz_spread_floor: float = graded("D", 0.40)
    best_half_life_intercept_days: float = graded("D", 10.0)
    best_half_life_slope_days_per_scar_pct: float = graded("D", 2.8, "larger scars heal slower")
    half_life_width_ln: float = graded("D", 0.6)

    thickness_half_saturation_mm: float = graded(
        "D", 0.5, heading="Thickness factor: bulk against diffusion limits, [Vunjak2010], B, C."
    )
    thickness_inhibition_mm: float = graded("D", 4.0)
    thickness_inhibition_exponent: int = graded("D", 3)
    thickness_norm: float = graded("definition", 0.65)
    thickness_factor_max: float = graded("D", 1.1)

    electrical_gain_max_pp: float = graded(
        "D",
        2.2,
        heading=(
            "Electrical gain: [He2020], [Cui2018], A; half-saturated at the native longitudinal "
            "conductivity, 0.174 S/m [Niederer2011]. Full at the reference conductivity, the "
            "upper end of the action space."
        ),
    )
    conductivity_half_saturation_s_per_m: float = graded("C", 0.15)
    reference_conductivity_s_per_m: float = graded("definition", 1.0)

    responder_total: float = graded(
        "definition",
        3.0,
        heading=(
            "Responder weights: patients differ in what limits them. The total makes the mean "
            "weight 1. Centres and widths are near the mean and deviation of the virtual "
            "cohort; that viable wall leaves more to rescue: [ORegan2012], [Shah2013], A. Form "
            "D."
        ),
    )
    responder_sharpness: float = graded("D", 1.4)
    responder_limit: float = graded("D", 2.5)
    responder_stress_concentration_center: float = graded("D", 1.85)
    responder_stress_concentration_width: float = graded("D", 0.35)
    responder_transmurality_center: float = graded("D", 0.53)
    responder_transmurality_width: float = graded("D", 0.14)
    responder_bz_width_pct: float = graded("D", 4.3)

    headroom_lvef_ceiling_pct: float = graded(
        "D",
        58.0,
        "near the healthy mean of 63",
        heading=(
            "Headroom: low LVEF and viable tissue gain more [Cureus2020], [Shah2013]; sign A, "
            "form D."
        ),
    )
    headroom_lvef_scale_pct: float = graded("D", 15.0)
    headroom_bz_half_pct: float = graded("D", 5.0)
    headroom_scar_limit_pct: float = graded("D", 60.0)
    headroom_norm: float = graded("definition", 0.49, "about 1 for the median virtual patient")
    headroom_exponent: float = graded("D", 0.6)
    headroom_floor: float = graded(
        "definition", 1e-6, "keeps the power differentiable where nothing is left to gain"
    )

    restriction_max_pp: float = graded(
        "D",
        7.0,
        heading=(
            "Filling restriction: [Fomovsky2011], [Lin2019], [Sayut2025], stroke-volume peak of "
            "[Restraint2013]; sign A."
        ),
    )
    restriction_slope_pp: float = graded("D", 0.72)
    restriction_threshold: float = graded("D", 0.16)
    restriction_width: float = graded("D", 0.06)

    toxicity_base_floor: float = graded(
        "D",
        0.7,
        heading=(
            "Toxicity: quadratic onset, then saturation ([Chen2019] safe dose; [Noshadi2017], "
            "[Ye2020] on fillers); form D. The slopes are per reference."
        ),
    )
    toxicity_base_slope: float = graded("D", 0.6)
    toxicity_reference_dose_mm: float = graded("definition", 0.9, "treated share x thickness")
    toxicity_filler_floor: float = graded("D", 0.6)
    toxicity_filler_slope: float = graded("D", 0.4)
    toxicity_reference_thickness_mm: float = graded("definition", 3.0)

    fibrosis_baseline: float = graded(
        "D",
        0.02,
        heading=(
            "Fibrosis: persistence x foreign-body tendency, stiffness ([Blakney2012], "
            "extrapolated from far stiffer gels), thickness, filler, by-products of a burst. "
            "Three of the scales are the upper ends of the action space."
        ),
    )
    fibrosis_persistence: float = graded("D", 0.22)
    fibrosis_half_life_scale_days: float = graded("definition", 180.0)
    fibrosis_stiffness: float = graded("D", 0.07)
    fibrosis_stiffness_scale_kpa: float = graded("definition", 30.0)
    fibrosis_thickness: float = graded("D", 0.06)
    fibrosis_thickness_scale_mm: float = graded("definition", 5.0)
    fibrosis_filler_per_s_per_m: float = graded("D", 0.04)
    fibrosis_burst: float = graded("D", 0.05)
    fibrosis_burst_scale_days: float = graded("D", 10.0)

    harm_toxicity_slope_pp: float = graded("D", 0.24, heading="Harm feedback on function.")
    harm_toxicity_threshold: float = graded("D", 0.12)
    harm_fibrosis_slope_pp: float = graded("D", 0.18)
    harm_fibrosis_threshold: float = graded("D", 0.18)
    harm_width: float = graded("D", 0.03)

    integrity_cohesion_gain: float = graded(
        "D",
        1.04,
        heading=(
            "Integrity: retention at 28 days; very soft gels leak, stiff ends of a window are "
            "brittle, thick patches delaminate, high stress tears."
        ),
    )
    integrity_loss_degraded: float = graded("D", 0.35)
    integrity_window_days: float = graded("D", 28.0)
    integrity_loss_soft: float = graded("D", 0.10)
    integrity_soft_scale_kpa: float = graded("D", 8.0)
    integrity_loss_brittle: float = graded("D", 0.0096)
    integrity_brittle_threshold: float = graded("D", 0.85)
    integrity_brittle_width: float = graded("D", 0.08)
    integrity_loss_thick: float = graded("D", 0.025)
    integrity_thick_threshold_mm: float = graded("D", 3.5)
    integrity_thick_width_mm: float = graded("D", 0.5)
    integrity_loss_stress: float = graded("D", 0.04)
    integrity_stress_concentration_threshold: float = graded("D", 1.8)
    integrity_loss_infeasible: float = graded("D", 0.25)

    source_gain: float = graded(
        "definition",
        1.75,
        heading=(
            "Change in LVEF. The gain is the one constant that is neither physiology nor "
            "evidence: 1.75 puts the model on the scale of the reward table of [Potluri2026]; 1 "
            "leaves a very good design at about +6 points, in line with animal work and above "
            "what any controlled trial has shown."
        ),
    )
    literature_gain: float = graded("definition", 1.0)
    coverage_cost_pp: float = graded("D", 0.5, "procedure; [Anker2015] 30-day mortality 8.6 %")
    delta_ef_max_pp: float = graded("D", 14.0)
    delta_ef_loss_max_pp: float = graded("D", 1.0)

    optimal_delta_ef_pp: float = graded(
        "definition",
        3.0,
        heading="Optimal: thresholds of the Stage-1 label of [Potluri2026], made soft.",
    )
    optimal_delta_ef_width_pp: float = graded("D", 0.5)
    optimal_stress_reduction_pct: float = graded("definition", 15.0)
    optimal_stress_reduction_width_pct: float = graded("D", 2.0)

    @classmethod
    def names_graded(cls, grade: Grade) -> tuple[str, ...]:
        """Constants whose number has this grade, in the order of the class.

        Raises:
            ValueError: there is no such grade.
        """
        if grade not in get_args(Grade):
            raise ValueError(f"grade is {grade!r}; allowed: {get_args(Grade)}")
        return tuple(item.name for item in fields(cls) if item.metadata["grade"] == grade)

    @property
    def need_norm(self) -> float:
        """Saturating need of the reference stress concentration, which has a need of 1."""
        return -math.expm1((1.0 - self.need_reference_stress_concentration) / self.need_scale)

    @property
    def electrical_norm(self) -> float:
        """Makes the electrical gain full at the reference conductivity."""
        return 1.0 + self.conductivity_half_saturation_s_per_m / self.reference_conductivity_s_per_m

    def saturating_coverage(self, coverage_frac: float) -> float:
        """Effect of covering a share of the border zone, 0 to 1, relative to covering it all."""
        k = self.coverage_saturation
        return math.expm1(-k * coverage_frac) / math.expm1(-k)


def _responding(response: Tensor | None) -> Callable[[str, Tensor], Tensor]:
    """What multiplies a value by a factor of the response, in its dtype; without one, nothing."""
    if response is None:
        return lambda name, value: value
    factors = dict(zip(RESPONSE_NAMES, response.unbind(-1), strict=True))
    return lambda name, value: value * factors[name].to(value.dtype)


class MechanisticModel(nn.Module):
    """Closed-form Stage-1 model; see the module docstring for what it is and is not.

    It has no trainable parameter and no state. It computes in the dtype of `patient`.

    Args:
        polymers: material properties; the packaged table by default.
        params: the constants.
        outcome_scale: `"source"` for the scale of the HYDRA-BERT reward table, `"literature"` for
            the smaller gains that animal work supports.

    Raises:
        ValueError: `outcome_scale` is unknown.
    """

    # What depends on the patient or the polymer alone is computed once for all their designs.
    broadcasts = True

    polymer_table: Tensor
    coverage_table: Tensor

    def __init__(
        self,
        polymers: PolymerTable | None = None,
        params: MechanisticParams | None = None,
        outcome_scale: OutcomeScale = "source",
    ) -> None:
        super().__init__()
        if outcome_scale not in get_args(OutcomeScale):
            raise ValueError(
                f"outcome_scale is {outcome_scale!r}; allowed: {get_args(OutcomeScale)}"
            )
        polymers = load_polymers() if polymers is None else polymers
        self.params = params = MechanisticParams() if params is None else params
        self.gain = params.source_gain if outcome_scale == "source" else params.literature_gain
        windows = torch.stack(
            [polymers.youngs_modulus_kpa, polymers.half_life_days, polymers.conductivity_s_per_m]
        )
        indices = [
            polymers.bioactivity,
            polymers.base_toxicity,
            polymers.filler_toxicity,
            polymers.filler_mid_dose_s_per_m,
            polymers.foreign_body_tendency,
            polymers.cohesion,
        ]
        # A window of one stiffness has no stiff end: its relative position is 0, not 0 / 0.
        stiffness_width = (windows[0, :, 1] - windows[0, :, 0]).clamp(min=1e-9)
        conducts = (windows[2, :, 1] > 0.0).to(windows.dtype)
        # One table, one gather: a row per polymer of lower ends, upper ends, and the rest.
        table = torch.stack(
            [*windows[..., 0], *windows[..., 1], conducts, *indices, stiffness_width], dim=-1
        )
        levels = [[c, params.saturating_coverage(c)] for c in COVERAGE_FRACTIONS]
        self.register_buffer("polymer_table", table, persistent=False)
        self.register_buffer(
            "coverage_table", torch.tensor(levels, dtype=torch.float64), persistent=False
        )

    def feasibility(self, polymer_id: Tensor, formulation: Tensor) -> Tensor:
        """How nearly the polymer can be made as requested: 1 within its windows, falling to 0.

        Args:
            polymer_id: (...) int64 row of the polymer table.
            formulation: (..., D) in the order and units of `FORMULATION_FIELDS`.

        Returns:
            F of the broadcast batch shape, in the dtype of `formulation`.
        """
        properties = embedding(polymer_id, self.polymer_table.to(formulation.dtype))
        return self._make(properties, by_name(FORMULATION_FIELDS, formulation))[-1]

    def _make(self, properties: Tensor, requested: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """E, tau, kappa as made, and F; the requests are E0, tau0, kappa0."""
        p = self.params
        E0, tau0 = requested["youngs_modulus_kpa"], requested["half_life_days"]
        kappa0 = requested["conductivity_s_per_m"]
        E_lo, tau_lo, kappa_lo, E_hi, tau_hi, kappa_hi, conducts = properties[..., :7].unbind(-1)
        E = E0.clamp(E_lo, E_hi)
        tau = tau0.clamp(tau_lo, tau_hi)
        # The factor changes no value: it stops the gradient that a clamp to [0, 0] lets through at
        # a request of exactly 0, the usual one for a gel that cannot conduct.
        kappa = kappa0.clamp(kappa_lo, kappa_hi) * conducts
        F = torch.exp(
            -0.5
            * (
                ((E0 / E).log() / p.stiffness_mismatch_width_ln).square()
                + ((tau0 / tau).log() / p.half_life_mismatch_width_ln).square()
                + ((kappa0 - kappa) / p.conductivity_mismatch_width_s_per_m).square()
            )
        )
        return E, tau, kappa, F

    def _need(self, SC: Tensor) -> Tensor:
        """N: stress relief possible at a stress concentration, 1 at the reference."""
        p = self.params
        return (-torch.expm1((1.0 - SC) / p.need_scale) / p.need_norm).clamp(p.need_min, p.need_max)

    def _responder_weights(self, SC: Tensor, T: Tensor, BZ: Tensor) -> tuple[Tensor, ...]:
        """w_M, w_B, w_Z: what limits this patient; they sum to 3."""
        p = self.params
        z = torch.stack(
            [
                (SC - p.responder_stress_concentration_center)
                / p.responder_stress_concentration_width,
                (p.responder_transmurality_center - T) / p.responder_transmurality_width,
                (BZ - p.reference_bz_pct) / p.responder_bz_width_pct,
            ]
        ).clamp(-p.responder_limit, p.responder_limit)
        # A softmax written out: z is bounded, so nothing overflows, and torch's own starts threads
        # for any batch, which costs milliseconds where cores are shared.
        weights = torch.exp(p.responder_sharpness * z)
        return (weights * (p.responder_total / weights.sum(0))).unbind(0)

    def _headroom(self, EF: Tensor, S: Tensor, BZ: Tensor) -> Tensor:
        """H: how much function is left to gain, about 1 for the median virtual patient."""
        p = self.params
        deficit = (p.headroom_lvef_ceiling_pct - EF).clamp(min=0.0)
        base = (
            -torch.expm1(-deficit / p.headroom_lvef_scale_pct)
            * (BZ / (BZ + p.headroom_bz_half_pct))
            * (1.0 - (S / p.headroom_scar_limit_pct).square())
            / p.headroom_norm
        )
        return base.clamp(min=p.headroom_floor).pow(p.headroom_exponent)

    def forward(
        self,
        patient: Tensor,
        polymer_id: Tensor,
        formulation: Tensor,
        coverage: Tensor,
        response: Tensor | None = None,
    ) -> Outcomes:
        """Predict the outcomes of a batch of designs; the batch shapes broadcast.

        Args:
            patient: (..., C) float, order and units of `PATIENT_FIELDS`.
            polymer_id: (...) int64 row of the polymer table.
            formulation: (..., D), order and units of `FORMULATION_FIELDS`.
            coverage: (...) int64 index into `COVERAGES`.
            response: (..., R) float, order of `RESPONSE_FIELDS`: how the patient responds. None is
                as predicted, as are factors of 1, to the last bit.

        Returns:
            Outcomes of the broadcast batch shape, in the dtype and on the device of `patient`.
        """
        p, respond = self.params, _responding(response)
        dtype = patient.dtype
        known = by_name(PATIENT_FIELDS, patient)
        EF, S, BZ = (known[x] for x in ("lvef_pct", "scar_fraction_pct", "bz_fraction_pct"))
        SC, T, w = known["stress_concentration"], known["transmurality"], known["wall_thickness_mm"]
        requested = by_name(FORMULATION_FIELDS, formulation.to(dtype))
        properties = embedding(polymer_id, self.polymer_table.to(dtype))
        c, f = embedding(coverage, self.coverage_table.to(dtype)).unbind(-1)

        # 1. What can be made of the request.
        E, tau, kappa, F = self._make(properties, requested)
        t = requested["thickness_mm"]
        E_lo = properties[..., 0]
        b, a0, m, kappa50, phi, chi, E_width = properties[..., 7:].unbind(-1)
        eta = p.efficacy_floor + (1.0 - p.efficacy_floor) * F

        # 2. Groups: relative stiffness x thickness eg, treated share A, relative border zone zeta,
        # mean retained support D, and the border zone's part in them.
        g = t / w.clamp(p.wall_thickness_min_mm, p.wall_thickness_max_mm)
        eg = E / p.reference_youngs_modulus_kpa * g
        A = (S + c * BZ) / 100.0
        zeta = (BZ / p.reference_bz_pct).clamp(p.bz_share_min, p.bz_share_max)
        f_zeta = f * zeta
        decay = p.healing_window_days * math.log(2.0) / tau
        D = -torch.expm1(-decay) / decay

        # 3. Stress relief.
        cohesion = (chi / p.reference_cohesion).pow(p.cohesion_exponent)
        x = eg * D * (p.load_scar_share + (1.0 - p.load_scar_share) * f_zeta) * cohesion
        N = self._need(SC)
        R0 = p.stress_relief_max_pct * N * x / (x + p.load_half_saturation)
        R = eta * R0

        # 4. Gains in LVEF: mechanical M, biological B, electrical Z.
        M = -p.mechanical_gain_max_pp * torch.expm1(-R0 / p.mechanical_gain_scale_pct)
        M = respond("mechanical_gain", M)
        C_b = p.bz_spread_floor + (1.0 - p.bz_spread_floor) * f_zeta
        inhibition = 1.0 + (t / p.thickness_inhibition_mm).pow(p.thickness_inhibition_exponent)
        u = t / (t + p.thickness_half_saturation_mm) / inhibition / p.thickness_norm
        u = u.clamp(max=p.thickness_factor_max)
        tau_best = p.best_half_life_intercept_days + p.best_half_life_slope_days_per_scar_pct * S
        match = torch.exp(-0.5 * ((tau / tau_best).log() / p.half_life_width_ln).square())
        B = respond("biological_gain", p.biological_gain_max_pp * b * match * C_b * u)
        saturation = kappa / (kappa + p.conductivity_half_saturation_s_per_m)
        Z = p.electrical_gain_max_pp * p.electrical_norm * saturation * C_b
        Z = respond("electrical_gain", Z)
        w_M, w_B, w_Z = self._responder_weights(SC, T, BZ)
        H = self._headroom(EF, S, BZ)

        # 5. Risks.
        base_dose = A * t / p.toxicity_reference_dose_mm
        filler_dose = (kappa / kappa50).square()
        filler_thickness = t / p.toxicity_reference_thickness_mm
        toxicity_hazard = a0 * (p.toxicity_base_floor + p.toxicity_base_slope * base_dose) + m * (
            filler_dose / (1.0 + filler_dose)
        ) * (p.toxicity_filler_floor + p.toxicity_filler_slope * filler_thickness)
        toxicity_risk = -torch.expm1(-respond("toxicity", toxicity_hazard))
        fibrosis_risk = -torch.expm1(
            -(
                p.fibrosis_baseline
                + p.fibrosis_persistence * phi * tau / p.fibrosis_half_life_scale_days
                + p.fibrosis_stiffness * (E / p.fibrosis_stiffness_scale_kpa).square()
                + p.fibrosis_thickness * (t / p.fibrosis_thickness_scale_mm).square()
                + p.fibrosis_filler_per_s_per_m * phi * kappa
                + p.fibrosis_burst * torch.exp(-tau / p.fibrosis_burst_scale_days)
            )
        )

        # 6. Structural integrity.
        degraded = -torch.expm1(-p.integrity_window_days * math.log(2.0) / tau)
        brittle = (E - E_lo) / E_width - p.integrity_brittle_threshold
        thick = t - p.integrity_thick_threshold_mm
        excess_stress = (SC - p.integrity_stress_concentration_threshold).clamp(min=0.0)
        structural_integrity = p.integrity_cohesion_gain * chi
        for loss in (
            p.integrity_loss_degraded * degraded.square(),
            p.integrity_loss_soft * torch.exp(-E / p.integrity_soft_scale_kpa),
            p.integrity_loss_brittle * softplus(brittle / p.integrity_brittle_width),
            p.integrity_loss_thick * softplus(thick / p.integrity_thick_width_mm),
            p.integrity_loss_stress * excess_stress,
            p.integrity_loss_infeasible * (1.0 - F),
        ):
            structural_integrity = structural_integrity - respond("integrity", loss)
        structural_integrity = structural_integrity.clamp(0.0, 1.0)

        # 7. What is lost: filling restriction P_d, feedback of harm P_t.
        crowded = respond("restriction", eg * A) - p.restriction_threshold
        crowding = softplus(crowded / p.restriction_width)
        restriction_ratio = p.restriction_slope_pp / p.restriction_max_pp
        P_d = -p.restriction_max_pp * torch.expm1(-restriction_ratio * crowding)
        toxic = softplus((toxicity_risk - p.harm_toxicity_threshold) / p.harm_width)
        fibrotic = softplus((fibrosis_risk - p.harm_fibrosis_threshold) / p.harm_width)
        P_t = p.harm_toxicity_slope_pp * toxic + p.harm_fibrosis_slope_pp * fibrotic

        # 8. Change in LVEF: gains and losses saturate, each at its own limit.
        gains = H * (w_M * M + w_B * B + w_Z * Z) * eta
        r = self.gain * (gains - P_d - P_t - p.coverage_cost_pp * c)
        delta_ef = torch.where(
            r > 0.0,
            p.delta_ef_max_pp * torch.tanh(r / p.delta_ef_max_pp),
            p.delta_ef_loss_max_pp * torch.tanh(r / p.delta_ef_loss_max_pp),
        )

        # 9. Optimal when both thresholds are passed: the probability is a product of two logistics
        # of y and v, whose logit is -log(e^-y + e^-v + e^-(y+v)).
        y = (delta_ef - p.optimal_delta_ef_pp) / p.optimal_delta_ef_width_pp
        v = (R - p.optimal_stress_reduction_pct) / p.optimal_stress_reduction_width_pct
        optimal_logit = -torch.logaddexp(torch.logaddexp(-y, -v), -y - v)

        return Outcomes(
            delta_ef_pct=delta_ef,
            stress_reduction_pct=R,
            optimal_logit=optimal_logit,
            toxicity_risk=toxicity_risk,
            # These two ignore part of the design, so their shape is not yet the batch's.
            structural_integrity=structural_integrity.expand_as(delta_ef),
            fibrosis_risk=fibrosis_risk.expand_as(delta_ef),
        )
