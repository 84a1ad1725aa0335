"""The ensemble that stands in for Stage 1: its products, its pessimism and its file."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hydrogel_gym import RewardConfig, compute_reward, load_polymers
from hydrogel_gym.models.ensemble import (
    NUMERIC_FIELDS,
    OPTIMAL,
    WORSE,
    Stage1Error,
    load_stage1,
    raw_numeric,
    read_stage1,
    save_stage1,
)
from hydrogel_gym.models.network import MemberLinear
from hydrogel_gym.problem.fields import FORMULATION_FIELDS, OUTCOME_FIELDS, PATIENT_FIELDS

NUM_DESIGNS = 64


def bounds(fields) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([f.low for f in fields]), torch.tensor([f.high for f in fields])


@pytest.fixture(scope="session")
def make_network(make_stage1):
    """Makes networks that are not frozen yet."""
    return lambda seed=0: make_stage1(seed).network.requires_grad_(True)


@pytest.fixture(scope="session")
def make_ensemble(make_stage1):
    """Makes ensembles, of a network if there is one."""
    return lambda network=None, **settings: make_stage1(network=network, **settings)


def designs(count: int = NUM_DESIGNS, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def within(fields):
        low, high = bounds(fields)
        return low + torch.rand(count, len(fields), generator=generator) * (high - low)

    return (
        within(PATIENT_FIELDS),
        torch.randint(24, (count,), generator=generator),
        within(FORMULATION_FIELDS),
        torch.randint(4, (count,), generator=generator),
    )


def test_members_are_as_many_separate_networks():
    layer = MemberLinear(3, 5, 2)
    x = torch.randn(3, 8, 5)
    alone = [nn.functional.linear(x[k], layer.weight[k].T, layer.bias[k, 0]) for k in range(3)]
    torch.testing.assert_close(layer(x), torch.stack(alone))
    torch.testing.assert_close(layer(x[0]), layer(x[0].repeat(3, 1, 1)))


def test_a_member_does_not_depend_on_the_others(make_network):
    network = make_network()
    numeric, polymer = torch.randn(3, 8, 19), torch.randint(24, (3, 8))
    before = network(numeric, polymer)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter[1] += 1.0
    after = network(numeric, polymer)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.allclose(before[1], after[1])


def test_there_are_nineteen_numeric_features_in_the_order_of_their_names():
    patient, _, formulation, coverage = designs(8)
    numeric = raw_numeric(patient, formulation, coverage)
    assert numeric.shape == (8, 19) == (8, len(NUMERIC_FIELDS))
    column = {name: numeric[:, i] for i, name in enumerate(NUMERIC_FIELDS)}
    assert torch.equal(column["lvef_pct"], patient[:, 0])
    assert torch.equal(column["half_life_days"], formulation[:, 1].log())
    assert torch.equal(column["coverage_scar_bz50"], (coverage == 2).float())


def test_frozen_polymers_are_a_table_that_is_not_computed_again(make_ensemble, monkeypatch):
    ensemble = make_ensemble()
    expected = ensemble(*designs())

    def never(_):
        raise AssertionError("the adapter ran")

    monkeypatch.setattr(ensemble.network.adapter, "forward", never)
    monkeypatch.setattr(ensemble.network.join_polymer, "forward", never)
    assert all(map(torch.equal, ensemble(*designs()), expected))
    assert ensemble.polymer_table.shape == (3, 24, 16)
    assert not any(p.requires_grad for p in ensemble.parameters())


def test_frozen_table_gives_what_the_network_gives(make_network, make_ensemble):
    network = make_network()
    numeric, polymer = torch.randn(8, 19), torch.randint(24, (8,))
    expected = network(numeric, polymer)
    ensemble = make_ensemble(network)
    torch.testing.assert_close(network(numeric, polymer, ensemble.polymer_table), expected)


def test_without_pessimism_the_outcomes_are_the_mean_of_the_members(make_ensemble):
    ensemble = make_ensemble(pessimism=0.0)
    prediction = ensemble.predict(*designs())
    assert all(map(torch.equal, ensemble(*designs()), prediction.mean))
    spread = ensemble.members(*designs()).std(0, correction=0)
    torch.testing.assert_close(torch.stack(prediction.std, -1), spread)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), low=st.floats(0.0, 3.0), more=st.floats(0.0, 3.0))
def test_more_pessimism_is_never_rewarded_more(make_network, make_ensemble, seed, low, more):
    network = make_network(seed)
    design = designs(32, seed)
    rewards = [
        compute_reward(make_ensemble(network, pessimism=p)(*design), config=RewardConfig())
        for p in (low, low + more)
    ]
    assert (rewards[1] <= rewards[0] + 1e-4).all()


def test_pessimism_is_so_many_standard_deviations_to_the_worse_side(make_network, make_ensemble):
    network = make_network()
    mean, std, _ = make_ensemble(network).predict(*designs())
    outcomes = make_ensemble(network, pessimism=0.5)(*designs())
    for field, worse in zip(OUTCOME_FIELDS, WORSE, strict=True):
        name = field.name
        expected = getattr(mean, name) + 0.5 * worse * getattr(std, name)
        expected = expected.clamp(field.low, field.high)
        torch.testing.assert_close(getattr(outcomes, name), expected)


@pytest.mark.parametrize(
    ("change", "distance"),
    [
        ({}, 0.0),
        ({"patient_high": ("lvef_pct", 35.0)}, 0.25),  # 40 in a range of 15 to 35
        ({"formulation_low": ("thickness_mm", 4.0)}, 1.0),  # 3 in a range of 4 to 5
        ({"seen": None}, 1.0),
    ],
    ids=["inside", "patient", "formulation", "coverage"],
)
def test_distance_is_in_widths_of_what_was_fitted(make_ensemble, change, distance):
    ensemble = make_ensemble(pessimism=1.0)
    patient, polymer, formulation, coverage = designs(1)
    patient[0, 0], formulation[0, 3] = 40.0, 3.0
    inside = ensemble(patient, polymer, formulation, coverage)
    for name, what in change.items():
        buffer = getattr(ensemble, name)
        if what is None:
            buffer[polymer, coverage] = 0.0
        else:
            fields = PATIENT_FIELDS if name.startswith("patient") else FORMULATION_FIELDS
            buffer[..., [f.name for f in fields].index(what[0])] = what[1]
    outside = ensemble(patient, polymer, formulation, coverage)
    assert ensemble.predict(patient, polymer, formulation, coverage).distance.item() == (
        pytest.approx(distance, abs=1e-5)
    )
    lost = inside.delta_ef_pct - outside.delta_ef_pct
    by_design = 0.0 if "patient_high" in change else distance
    assert lost.item() == pytest.approx(3.0 * by_design, abs=1e-3)  # of the outcome's deviation


def test_what_never_varied_in_the_table_may_be_missed_by_a_little(make_ensemble):
    ensemble = make_ensemble()
    _, polymer, formulation, coverage = designs(1)
    conductivity = [f.name for f in FORMULATION_FIELDS].index("conductivity_s_per_m")
    ensemble.formulation_high[..., conductivity] = 0.0  # of 0 to 1 S/m
    for value, distance in ((0.0, 0.0), (0.01, 0.2), (1.0, 20.0)):
        formulation[:, conductivity] = value
        found = ensemble.design_distance(polymer, formulation, coverage).item()
        assert found == pytest.approx(distance, abs=1e-5)


def test_any_batch_shape_and_float64_are_taken(make_ensemble):
    ensemble = make_ensemble()
    patient, polymer, formulation, coverage = designs(6)
    flat = ensemble(patient, polymer, formulation, coverage)
    grid = ensemble(
        patient[:1].double(), polymer.view(2, 3), formulation.view(2, 3, 4), coverage.view(2, 3)
    )
    assert grid.delta_ef_pct.shape == (2, 3)
    assert grid.delta_ef_pct.dtype == torch.float64
    one = ensemble(patient[0], polymer[0], formulation[0], coverage[0])
    torch.testing.assert_close(grid.delta_ef_pct[0, 0].float(), one.delta_ef_pct)
    torch.testing.assert_close(one.delta_ef_pct, flat.delta_ef_pct[0])


def test_bfloat16_changes_the_products_and_little_else(make_network, make_ensemble):
    network = make_network()
    exact = make_ensemble(network)(*designs())
    rough = make_ensemble(network, compute_dtype=torch.bfloat16)(*designs())
    assert rough.delta_ef_pct.dtype == torch.float32
    assert not torch.equal(rough.delta_ef_pct, exact.delta_ef_pct)
    torch.testing.assert_close(rough.delta_ef_pct, exact.delta_ef_pct, atol=0.2, rtol=0.02)


def test_a_patient_that_is_not_a_number_gives_no_outcome_that_is_one(make_ensemble):
    patient, *rest = designs(2)
    patient[0, 3] = torch.nan
    outcomes = make_ensemble()(patient, *rest)
    assert outcomes.delta_ef_pct.isfinite().tolist() == [False, True]


@pytest.mark.parametrize("pessimism", [-0.1, float("nan"), float("inf")])
def test_pessimism_out_of_range_is_refused(make_ensemble, pessimism):
    with pytest.raises(ValueError, match=r"pessimism is .*; allowed: a finite number, at least 0"):
        make_ensemble(pessimism=pessimism)


def test_checkpoint_holds_all_that_running_needs(make_ensemble, tmp_path):
    ensemble = make_ensemble(pessimism=0.7)
    save_stage1(tmp_path / "m.pt", ensemble, {"rows": 3})
    loaded = load_stage1(tmp_path / "m.pt")
    assert loaded.pessimism == 0.7
    assert all(map(torch.equal, loaded(*designs()), ensemble(*designs())))
    assert load_stage1(tmp_path / "m.pt", pessimism=0.0).pessimism == 0.0
    assert read_stage1(tmp_path / "m.pt")["fit"] == {"rows": 3}


class Malicious:
    def __reduce__(self):
        return (exec, ("open('executed', 'w').close()",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, r"its format is 'other'; expected 'hydrogel_gym\.stage1\.v1'"),
        (
            {"numeric_fields": ["gls_pct", "lvef_pct", *NUMERIC_FIELDS[2:]]},
            r"numeric_fields differ from this version's: 0 is 'gls_pct', here 'lvef_pct'; fit it",
        ),
        ({"numeric_fields": list(NUMERIC_FIELDS[:-1])}, r"there are 18, here 19"),
        (
            {"polymers": [*load_polymers().names[:-1], "PEDOT"]},
            r"polymers differ from this version's: 23 is 'PEDOT', here 'PEDOT_PSS'",
        ),
        ({"architecture": {"polymer_dim": 7}}, r"it does not fit: TypeError: .*num_categories"),
        (
            {"architecture": {"polymer_dim": 7, "num_categories": 4, "num_members": 2}},
            r"it does not fit: RuntimeError",
        ),
    ],
    ids=["format", "order", "count", "polymers", "sizes", "members"],
)
def test_checkpoint_of_something_else_is_refused(make_ensemble, tmp_path, change, message):
    path = tmp_path / "m.pt"
    save_stage1(path, make_ensemble(), {})
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(Stage1Error, match=f"checkpoint {path}: .*{message}"):
        load_stage1(path)


def test_checkpoint_with_a_weight_that_is_not_a_number_is_refused(make_ensemble, tmp_path):
    ensemble = make_ensemble()
    ensemble.network.trunk.bias[0, 0, 0] = torch.inf
    save_stage1(tmp_path / "m.pt", ensemble, {})
    with pytest.raises(Stage1Error, match=r"network\.trunk\.bias is not finite"):
        load_stage1(tmp_path / "m.pt")


@pytest.mark.parametrize("kind", ["missing", "cut off", "text", "malicious"])
def test_file_that_is_no_checkpoint_is_refused_and_runs_no_code(
    make_ensemble, tmp_path, monkeypatch, kind
):
    path = tmp_path / "m.pt"
    save_stage1(path, make_ensemble(), {})
    if kind == "missing":
        path.unlink()
    elif kind == "cut off":
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "text":
        path.write_text("weights")
    else:
        torch.save({"format": Malicious()}, path, pickle_module=pickle)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Stage1Error, match=r"no such file|is no checkpoint|cannot be read"):
        load_stage1(path)
    assert not (tmp_path / "executed").exists()


def test_optimal_is_the_third_outcome():
    assert OUTCOME_FIELDS[OPTIMAL].name == "optimal_logit"
