from __future__ import annotations

from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple, get_args

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hydrogel_gym.models.mechanistic import Grade, MechanisticModel, MechanisticParams
from hydrogel_gym.problem.fields import (
    COVERAGES,
    FORMULATION_FIELDS,
    OUTCOME_FIELDS,
    PATIENT_FIELDS,
    Outcomes,
)
from hydrogel_gym.problem.polymers import NUM_POLYMERS, load_polymers

GOLDEN = pd.read_csv(Path(__file__).with_name("golden.csv"))
POLYMERS = load_polymers()
E, TAU, KAPPA, T = range(len(FORMULATION_FIELDS))
PATIENT_NAMES = [item.name for item in PATIENT_FIELDS]
FORMULATION_NAMES = ["stiffness_kpa", "degradation_days", "conductivity_s_per_m", "thickness_mm"]
UNUSED = ("gls_pct", "edv_ml", "esv_ml", "bz_stress_kpa", "healthy_stress_kpa")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])

# Near the median of the virtual cohort.
MEDIAN_PATIENT = torch.tensor(
    [36.9, -11.1, 207.0, 130.6, 19.0, 13.0, 33.7, 18.3, 1.84, 0.53, 6.4], dtype=torch.float64
)


class Batch(NamedTuple):
    patient: Tensor
    polymer_id: Tensor
    formulation: Tensor
    coverage: Tensor

    def rows(self, index) -> Batch:
        return Batch(*(value[index] for value in self))


def golden(dtype: torch.dtype = torch.float64) -> Batch:
    return Batch(
        torch.tensor(GOLDEN[PATIENT_NAMES].to_numpy(), dtype=dtype),
        torch.tensor(GOLDEN["polymer_id"].to_numpy()),
        torch.tensor(GOLDEN[FORMULATION_NAMES].to_numpy(), dtype=dtype),
        torch.tensor(GOLDEN["coverage"].to_numpy()),
    )


def all_polymers() -> Tensor:
    return torch.arange(NUM_POLYMERS)


def made_exactly(share: Tensor | float, thickness_mm: Tensor | float = 2.5) -> Tensor:
    """(24, ..., 4) requests at a share of the way through each polymer's own windows.

    The action space cuts the windows, for both are limits of what is tested here.
    """
    share = torch.as_tensor(share, dtype=torch.float64)
    columns = []
    for window, item in zip(
        (POLYMERS.youngs_modulus_kpa, POLYMERS.half_life_days, POLYMERS.conductivity_s_per_m),
        FORMULATION_FIELDS,
        strict=False,
    ):
        low, high = (
            end.clamp(item.low, item.high).view(-1, *[1] * share.dim()) for end in window.unbind(-1)
        )
        columns.append(low + share * (high - low))
    thickness = torch.as_tensor(thickness_mm, dtype=torch.float64)
    return torch.stack(torch.broadcast_tensors(*columns, thickness), dim=-1)


def sweep(column: int, num: int = 9) -> Tensor:
    """(24, num, 4) designs in which one request crosses the polymer's window, all others fixed."""
    share = torch.linspace(0.0, 1.0, num, dtype=torch.float64)
    middle = made_exactly(0.5).unsqueeze(1).repeat(1, num, 1)
    if column == T:
        low, high = FORMULATION_FIELDS[T].low, FORMULATION_FIELDS[T].high
        middle[..., T] = low + share * (high - low)
    else:
        middle[..., column] = made_exactly(share)[..., column]
    return middle


def outcomes_along(column: int, model: MechanisticModel | None = None) -> Outcomes:
    """(24, num) outcomes of `sweep`, median patient, half of the border zone covered."""
    return (model or MechanisticModel())(
        MEDIAN_PATIENT, all_polymers().unsqueeze(-1), sweep(column), torch.tensor(2)
    )


def can_vary(column: int) -> Tensor:
    """(24,) whether the polymer's window holds more than one value of this request."""
    requests = sweep(column)[..., column]
    return requests[:, -1] > requests[:, 0] + 1e-9


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-4)], ids=["f64", "f32"]
)
def test_outcomes_reproduce_the_golden_table(dtype, tolerance):
    batch = golden(dtype)
    model = MechanisticModel()
    predicted = model(*batch)._asdict()
    predicted["optimal_prob"] = predicted.pop("optimal_logit").sigmoid()
    predicted["feasibility"] = model.feasibility(batch.polymer_id, batch.formulation)
    for name, value in predicted.items():
        expected = torch.tensor(GOLDEN[name].to_numpy())
        error = (value.double() - expected).abs() / expected.abs().clamp(min=1.0)
        assert error.max() < tolerance, name


@DTYPES
def test_outcomes_have_the_dtype_of_the_patient(dtype):
    patient, polymer_id, formulation, coverage = golden(dtype).rows(slice(8))
    outcomes = MechanisticModel()(patient, polymer_id, formulation.float(), coverage)
    assert {value.dtype for value in outcomes} == {dtype}
    assert {value.shape for value in outcomes} == {(8,)}


@DTYPES
def test_batch_of_eight_equals_eight_batches_of_one(dtype):
    batch, model = golden(dtype).rows(slice(8)), MechanisticModel()
    together = model(*batch)
    one_by_one = [model(*batch.rows(i)) for i in range(8)]
    assert one_by_one[0].delta_ef_pct.shape == ()
    torch.testing.assert_close(Outcomes(*map(torch.stack, zip(*one_by_one))), together)  # noqa: B905


def test_permuting_rows_permutes_outcomes():
    batch, model = golden(), MechanisticModel()
    order = torch.randperm(len(GOLDEN), generator=torch.Generator().manual_seed(0))
    permuted = Outcomes(*(value[order] for value in model(*batch)))
    torch.testing.assert_close(model(*batch.rows(order)), permuted, rtol=0, atol=1e-12)


def test_broadcast_equals_the_expanded_batch():
    batch, model = golden(), MechanisticModel()
    patient = batch.patient[:5].unsqueeze(1)
    polymer_id = all_polymers().unsqueeze(0)
    formulation, coverage = batch.formulation[7], batch.coverage[3]
    outcomes = model(patient, polymer_id, formulation, coverage)
    assert {value.shape for value in outcomes} == {(5, NUM_POLYMERS)}
    expanded = model(
        patient.expand(5, NUM_POLYMERS, -1),
        polymer_id.expand(5, -1),
        formulation.expand(5, NUM_POLYMERS, -1),
        coverage.expand(5, NUM_POLYMERS),
    )
    torch.testing.assert_close(outcomes, expanded, rtol=0, atol=1e-12)


def test_every_outcome_has_the_batch_shape_where_only_the_coverage_is_batched():
    batch = golden()
    patient, polymer_id, formulation, _ = batch.rows(0)
    coverage = torch.arange(len(COVERAGES))
    outcomes = MechanisticModel()(patient, polymer_id, formulation, coverage)
    assert {value.shape for value in outcomes} == {(len(COVERAGES),)}


@pytest.mark.slow
def test_compiled_graph_equals_eager():
    batch, model = golden(torch.float32), MechanisticModel()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*batch), model(*batch))


def test_model_has_nothing_to_train_or_to_save():
    model = MechanisticModel()
    assert list(model.parameters()) == []
    assert model.state_dict() == {}


def test_unknown_outcome_scale_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"is 'hopeful'; allowed: \('source', 'literature'\)"):
        MechanisticModel(outcome_scale="hopeful")


@pytest.mark.parametrize("name", [item.name for item in fields(MechanisticParams)])
def test_every_constant_takes_part(name):
    # Limits that no golden row reaches are moved to where patients are.
    moved = {
        "bz_share_min": 0.8,
        "headroom_floor": 0.5,
        "need_max": 0.9,
        "responder_limit": 0.5,
        "wall_thickness_max_mm": 5.0,
    }
    params = MechanisticParams()
    changed = replace(params, **{name: moved.get(name, 1.2 * getattr(params, name))})
    scale = "literature" if name == "literature_gain" else "source"
    before, after = (
        torch.stack(MechanisticModel(POLYMERS, each, scale)(*golden()))
        for each in (params, changed)
    )
    assert not torch.equal(before, after)


def test_every_constant_has_one_known_grade():
    listed = [name for grade in get_args(Grade) for name in MechanisticParams.names_graded(grade)]
    assert sorted(listed) == sorted(item.name for item in fields(MechanisticParams))


def test_assumptions_are_some_of_the_constants():
    assumed = MechanisticParams.names_graded("D")
    assert {"efficacy_floor", "load_half_saturation", "harm_width"} <= set(assumed)
    assert not {"source_gain", "optimal_delta_ef_pp", "healing_window_days"} & set(assumed)


def test_unknown_grade_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"grade is 'E'; allowed: \('A', 'B', 'C', 'D', 'def"):
        MechanisticParams.names_graded("E")


GAINS = ("mechanical_gain_max_pp", "biological_gain_max_pp", "electrical_gain_max_pp")
HALF_SATURATION = MechanisticParams().conductivity_half_saturation_s_per_m
NEED_CHANGE = (
    replace(MechanisticParams(), need_reference_stress_concentration=1.2 * 1.87).need_norm
    / MechanisticParams().need_norm
)


@pytest.mark.parametrize(
    ("unit", "undone_by"),
    [
        ("reference_cohesion", {"load_half_saturation": 1.2**-2}),
        (
            "need_reference_stress_concentration",
            {
                "stress_relief_max_pct": NEED_CHANGE,
                "need_min": 1 / NEED_CHANGE,
                "need_max": 1 / NEED_CHANGE,
            },
        ),
        ("thickness_norm", {"biological_gain_max_pp": 1.2, "thickness_factor_max": 1 / 1.2}),
        (
            "reference_conductivity_s_per_m",
            {"electrical_gain_max_pp": (1 + HALF_SATURATION) / (1 + HALF_SATURATION / 1.2)},
        ),
        ("responder_total", dict.fromkeys(GAINS, 1 / 1.2)),
        ("headroom_norm", dict.fromkeys(GAINS, 1.2**0.6)),
        ("toxicity_reference_dose_mm", {"toxicity_base_slope": 1.2}),
        ("toxicity_reference_thickness_mm", {"toxicity_filler_slope": 1.2}),
        ("fibrosis_half_life_scale_days", {"fibrosis_persistence": 1.2}),
        ("fibrosis_stiffness_scale_kpa", {"fibrosis_stiffness": 1.2**2}),
        ("fibrosis_thickness_scale_mm", {"fibrosis_thickness": 1.2**2}),
    ],
)
def test_unit_of_other_constants_says_nothing_that_they_do_not(unit, undone_by):
    assert unit in MechanisticParams.names_graded("definition")
    params = MechanisticParams()
    moved = {
        name: factor * getattr(params, name) for name, factor in ({unit: 1.2} | undone_by).items()
    }
    outcomes = MechanisticModel(params=replace(params, **moved))(*golden())
    torch.testing.assert_close(outcomes, MechanisticModel()(*golden()), rtol=1e-9, atol=1e-9)


def test_gradients_agree_with_finite_differences():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(GOLDEN), generator=generator)[:16]
    patient, polymer_id, formulation, coverage = golden().rows(rows)
    model = MechanisticModel()
    # A nudge inwards, for some golden rows lie on a corner of the box.
    low, high = (
        torch.tensor([getattr(item, end) for item in FORMULATION_FIELDS], dtype=torch.float64)
        for end in ("low", "high")
    )
    formulation = (low + 0.98 * (formulation - low) + 0.01 * (high - low)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda requests: tuple(model(patient, polymer_id, requests, coverage)),
        formulation,
        eps=1e-6,
        atol=1e-6,
    )


def test_asking_an_unfilled_polymer_to_conduct_has_no_slope_at_zero():
    unfilled = torch.nonzero(POLYMERS.filler_toxicity == 0).flatten()
    formulation = made_exactly(0.5)[unfilled].requires_grad_()
    outcomes = MechanisticModel()(MEDIAN_PATIENT, unfilled, formulation, torch.tensor(3))
    (gradient,) = torch.autograd.grad(sum(value.sum() for value in outcomes), formulation)
    assert (formulation[:, KAPPA] == 0).all()
    assert (gradient[:, KAPPA] == 0).all()


def spread_of_patients() -> Tensor:
    """Every corner of the ranges of the fields that matter, the middle, and golden patients."""
    middle = torch.tensor([(item.low + item.high) / 2 for item in PATIENT_FIELDS])
    matter = [PATIENT_NAMES.index(name) for name in PATIENT_NAMES if name not in UNUSED]
    corners = middle.repeat(2 ** len(matter), 1)
    corners[:, matter] = torch.tensor(
        list(product(*((PATIENT_FIELDS[i].low, PATIENT_FIELDS[i].high) for i in matter)))
    )
    return torch.cat([corners, middle.unsqueeze(0), golden(torch.float32).patient[:8]])


def test_outcomes_are_in_range_and_gradients_finite_on_every_corner():
    patients = spread_of_patients()
    corners = torch.tensor(list(product(*((item.low, item.high) for item in FORMULATION_FIELDS))))
    shape = (len(patients), NUM_POLYMERS, len(COVERAGES), len(corners))
    formulation = corners.expand(*shape, -1).clone().requires_grad_()
    outcomes = MechanisticModel()(
        patients.view(-1, 1, 1, 1, len(PATIENT_FIELDS)),
        all_polymers().view(-1, 1, 1),
        formulation,
        torch.arange(len(COVERAGES)).view(-1, 1),
    )
    for value, item in zip(outcomes, OUTCOME_FIELDS, strict=True):
        assert value.shape == shape
        assert value.isfinite().all(), item.name
        assert value.min() >= item.low, item.name
        assert value.max() <= item.high, item.name
    # One sweep for all outcomes: a gradient that is not finite stays so in their sum.
    (gradient,) = torch.autograd.grad(sum(value.sum() for value in outcomes), formulation)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("column", [E, TAU, T], ids=["stiffness", "half_life", "thickness"])
def test_stress_relief_rises_with_shrinking_increments(column):
    relief = outcomes_along(column).stress_reduction_pct[can_vary(column)]
    increments = relief.diff(dim=-1)
    assert (increments > 0).all()
    assert (increments.diff(dim=-1) < 0).all()


def test_stress_relief_rises_with_coverage_by_less_and_less():
    coverage = torch.arange(len(COVERAGES))
    relief = MechanisticModel()(
        MEDIAN_PATIENT, all_polymers().unsqueeze(-1), made_exactly(0.5).unsqueeze(1), coverage
    ).stress_reduction_pct
    # The last level is twice as far from its neighbour as the others.
    per_quarter = relief.diff(dim=-1) / torch.tensor([1.0, 1.0, 2.0])
    assert (per_quarter > 0).all()
    assert (per_quarter.diff(dim=-1) < 0).all()


def test_toxicity_rises_with_conductivity_of_filled_polymers():
    filled = POLYMERS.filler_toxicity > 0
    toxicity = outcomes_along(KAPPA).toxicity_risk
    assert (toxicity[filled].diff(dim=-1) > 0).all()


def test_toxicity_of_unfilled_polymers_ignores_the_conductivity_requested():
    unfilled = torch.nonzero(POLYMERS.filler_toxicity == 0).flatten()
    formulation = made_exactly(0.5)[unfilled].unsqueeze(1).repeat(1, 5, 1)
    formulation[..., KAPPA] = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
    toxicity = MechanisticModel()(
        MEDIAN_PATIENT, unfilled.unsqueeze(-1), formulation, torch.tensor(3)
    ).toxicity_risk
    assert torch.equal(toxicity, toxicity[:, :1].expand_as(toxicity))


@pytest.mark.parametrize("column", [E, T], ids=["stiffness", "thickness"])
def test_fibrosis_rises_with_stiffness_and_thickness(column):
    fibrosis = outcomes_along(column).fibrosis_risk
    assert (fibrosis[can_vary(column)].diff(dim=-1) > 0).all()


@pytest.mark.parametrize("column", [TAU, T], ids=["half_life", "thickness"])
def test_gain_in_lvef_has_an_interior_maximum(column):
    polymer = POLYMERS.index("Chitosan_HA")
    gain = outcomes_along(column).delta_ef_pct[polymer]
    best = int(gain.argmax())
    assert 0 < best < len(gain) - 1
    assert (gain[: best + 1].diff() > 0).all()
    assert (gain[best:].diff() < 0).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_request_within_the_windows_is_fully_feasible(share):
    feasibility = MechanisticModel().feasibility(all_polymers(), made_exactly(share))
    # Polymers softer than the action space at both ends cannot be met by any request in it.
    stiff_enough = POLYMERS.youngs_modulus_kpa[:, 1] >= FORMULATION_FIELDS[E].low
    assert stiff_enough.all()
    assert (feasibility == 1.0).all()


@pytest.mark.parametrize(
    ("column", "steps"),
    [(E, [20.0, 25.0, 30.0]), (TAU, [100.0, 140.0, 180.0]), (KAPPA, [0.1, 0.5, 1.0])],
    ids=["stiffness", "half_life", "conductivity"],
)
def test_feasibility_falls_as_a_request_leaves_its_window(column, steps):
    fibrin = torch.tensor(POLYMERS.index("Fibrin_thrombin"))  # windows up to 10 kPa, 30 days, 0 S/m
    formulation = torch.tensor([8.0, 20.0, 0.0, 2.0]).repeat(4, 1)
    formulation[1:, column] = torch.tensor(steps)
    feasibility = MechanisticModel().feasibility(fibrin, formulation)
    assert feasibility[0] == 1.0
    assert (feasibility.diff() < 0).all()
    assert (feasibility > 0).all()


def test_infeasible_request_delivers_what_can_be_made_less_the_loss_of_efficacy():
    model, fibrin = MechanisticModel(), torch.tensor(POLYMERS.index("Fibrin_thrombin"))
    requested, made = torch.tensor(
        [[25.0, 20.0, 0.0, 2.0], [10.0, 20.0, 0.0, 2.0]], dtype=torch.float64
    )
    relief = model(MEDIAN_PATIENT, fibrin, torch.stack([requested, made]), torch.tensor(3))[1]
    efficacy = 0.6 + 0.4 * model.feasibility(fibrin, requested)
    torch.testing.assert_close(relief[0], efficacy * relief[1])


def test_gel_without_conductivity_has_no_electrical_gain():
    formulation = made_exactly(0.5)
    args = (MEDIAN_PATIENT, all_polymers(), formulation, torch.tensor(3))
    without = MechanisticModel(params=MechanisticParams(electrical_gain_max_pp=0.0))(*args)
    difference = MechanisticModel()(*args).delta_ef_pct - without.delta_ef_pct
    conducts = formulation[:, KAPPA] > 0
    assert (difference[conducts] > 0.1).all()
    assert (difference[~conducts] == 0).all()


def test_patch_of_no_thickness_relieves_no_stress_and_gains_nothing():
    unfilled = torch.nonzero(POLYMERS.filler_toxicity == 0).flatten()
    formulation = made_exactly(0.5, thickness_mm=0.0)[unfilled]
    outcomes = MechanisticModel()(MEDIAN_PATIENT, unfilled, formulation, torch.tensor(3))
    assert (outcomes.stress_reduction_pct == 0).all()
    assert (outcomes.delta_ef_pct < 0).all()


def test_ventricle_with_normal_lvef_has_nothing_to_gain():
    patient = MEDIAN_PATIENT.clone()
    patient[0] = 60.0
    outcomes = MechanisticModel()(patient, all_polymers(), made_exactly(0.5), torch.tensor(0))
    assert (outcomes.delta_ef_pct < 0).all()


@pytest.mark.parametrize("name", UNUSED)
def test_absolute_stress_strain_and_volume_do_not_enter(name):
    batch, model = golden(), MechanisticModel()
    patient = batch.patient.clone()
    patient[:, PATIENT_NAMES.index(name)] *= 2.0
    changed = model(*batch._replace(patient=patient))
    assert all(torch.equal(a, b) for a, b in zip(changed, model(*batch), strict=True))


def test_literature_scale_divides_the_raw_gain_by_its_factor_and_leaves_safety_alone():
    batch = golden()
    source = MechanisticModel()(*batch)
    literature = MechanisticModel(outcome_scale="literature")(*batch)
    assert (literature.delta_ef_pct.abs() < source.delta_ef_pct.abs()).all()
    gained = source.delta_ef_pct > 0
    raw, smaller = (
        torch.atanh(outcomes.delta_ef_pct[gained] / 14.0) for outcomes in (source, literature)
    )
    torch.testing.assert_close(raw, 1.75 * smaller)
    for name in ("stress_reduction_pct", "toxicity_risk", "structural_integrity", "fibrosis_risk"):
        assert torch.equal(getattr(literature, name), getattr(source, name)), name


def test_polymer_with_a_single_stiffness_has_no_brittle_end():
    window = POLYMERS.youngs_modulus_kpa.clone()
    window[0] = 10.0
    polymers = replace(POLYMERS, youngs_modulus_kpa=window)
    formulation = torch.tensor([10.0, 30.0, 0.0, 2.0], dtype=torch.float64)
    args = (MEDIAN_PATIENT, torch.tensor(0), formulation, torch.tensor(1))
    single = MechanisticModel(polymers)(*args)
    assert all(value.isfinite() for value in single)
    # The packaged window ends at 10 kPa, where the same gel is brittle.
    assert single.structural_integrity > MechanisticModel()(*args).structural_integrity


def within(items) -> st.SearchStrategy[Tensor]:
    ranges = (st.floats(item.low, item.high) for item in items)
    return st.tuples(*ranges).map(lambda row: torch.tensor(row, dtype=torch.float64))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(patient=within(PATIENT_FIELDS), formulation=within(FORMULATION_FIELDS))
def test_outcomes_stay_in_range_for_any_patient_and_request(patient, formulation):
    outcomes = MechanisticModel()(
        patient,
        all_polymers().unsqueeze(-1),
        formulation,
        torch.arange(len(COVERAGES)),
    )
    for value, item in zip(outcomes, OUTCOME_FIELDS, strict=True):
        assert value.isfinite().all(), item.name
        assert ((value >= item.low) & (value <= item.high)).all(), item.name
    params = MechanisticParams()
    assert (outcomes.delta_ef_pct.abs() < params.delta_ef_max_pp).all()
    assert (outcomes.delta_ef_pct > -params.delta_ef_loss_max_pp - 1e-12).all()
    assert (outcomes.stress_reduction_pct >= 0).all()
    assert (outcomes.stress_reduction_pct < params.stress_relief_max_pct * params.need_max).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(formulation=within(FORMULATION_FIELDS))
def test_feasibility_is_one_exactly_where_the_request_is_within_the_windows(formulation):
    feasibility = MechanisticModel().feasibility(all_polymers(), formulation)
    inside = torch.ones(NUM_POLYMERS, dtype=torch.bool)
    for request, window in zip(
        formulation[:3],
        (POLYMERS.youngs_modulus_kpa, POLYMERS.half_life_days, POLYMERS.conductivity_s_per_m),
        strict=True,
    ):
        inside &= (window[:, 0] <= request) & (request <= window[:, 1])
    assert (feasibility[inside] == 1.0).all()
    assert (feasibility[~inside] <= 1.0).all()
    assert (feasibility > 0.0).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(patient=within(PATIENT_FIELDS))
def test_responder_weights_are_positive_and_share_out_a_fixed_total(patient):
    model = MechanisticModel()
    weights = torch.stack(model._responder_weights(*patient[[8, 9, 5]]))
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(), torch.tensor(3.0, dtype=torch.float64))
