"""The ensemble that stands in for Stage 1: its products, its pessimism and its file."""

from __future__ import annotations

import pickle

import pytest
import torch

from hydrogel_gym import compute_reward, load_polymers
from hydrogel_gym.models.ensemble import (
    NUMERIC_FIELDS,
    OPTIMAL,
    WORSE,
    Stage1Error,
    load_stage1,
    read_stage1,
    save_stage1,
)
from hydrogel_gym.problem.fields import (
    COVERAGES,
    FORMULATION_FIELDS,
    OUTCOME_FIELDS,
    PATIENT_FIELDS,
    formulation_at,
)
from hydrogel_gym.problem.polymers import NUM_POLYMERS

CONDUCTIVITY = [field.name for field in FORMULATION_FIELDS].index("conductivity_s_per_m")


def designs(count: int = 64, seed: int = 0) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    low, high = (torch.tensor([getattr(f, end) for f in PATIENT_FIELDS]) for end in ("low", "high"))
    return (
        low + torch.rand(count, len(low), generator=rng) * (high - low),
        torch.randint(NUM_POLYMERS, (count,), generator=rng),
        formulation_at(torch.rand(len(FORMULATION_FIELDS), count, generator=rng)),
        torch.randint(len(COVERAGES), (count,), generator=rng),
    )


@pytest.fixture(scope="module")
def ensemble(make_stage1):
    """Not pessimistic; to be left as it is."""
    return make_stage1(pessimism=0.0)


def test_frozen_polymers_are_a_table_that_is_not_computed_again(make_stage1, monkeypatch):
    ensemble = make_stage1()
    expected = ensemble(*designs())
    numeric, polymer = torch.randn(8, 19), torch.randint(24, (8,))
    network, table = ensemble.network, ensemble.polymer_table
    torch.testing.assert_close(network(numeric, polymer, table), network(numeric, polymer))
    monkeypatch.setattr(network.adapter, "forward", pytest.fail)
    monkeypatch.setattr(network.join_polymer, "forward", pytest.fail)
    assert all(map(torch.equal, ensemble(*designs()), expected))
    assert table.shape == (3, 24, 16)
    assert not any(p.requires_grad for p in ensemble.parameters())


@pytest.mark.parametrize("seed", [0, 1])
def test_more_pessimism_is_never_rewarded_more(make_stage1, seed):
    rewards = [
        compute_reward(make_stage1(seed, pessimism=pessimism)(*designs(256, seed)))
        for pessimism in (0.0, 0.1, 1.0, 6.0)
    ]
    assert (torch.stack(rewards).diff(dim=0) <= 1e-4).all()


def test_pessimism_is_so_many_standard_deviations_to_the_worse_side(make_stage1, ensemble):
    mean, std, _ = ensemble.predict(*designs())
    assert all(map(torch.equal, ensemble(*designs()), mean))
    spread = ensemble.members(*designs()).std(0, correction=0)
    torch.testing.assert_close(torch.stack(std, -1), spread)
    outcomes = make_stage1(pessimism=0.5)(*designs())
    for field, worse in zip(OUTCOME_FIELDS, WORSE, strict=True):
        name = field.name
        expected = getattr(mean, name) + 0.5 * worse * getattr(std, name)
        expected = expected.clamp(field.low, field.high)
        torch.testing.assert_close(getattr(outcomes, name), expected)
    assert OUTCOME_FIELDS[OPTIMAL].name == "optimal_logit"
    for pessimism in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="pessimism is .*; allowed: a finite number, at least"):
            make_stage1(pessimism=pessimism)


def test_distance_is_in_widths_of_what_was_fitted(make_stage1):
    design = designs(1)
    design[0][0, 0], design[2][0, 3] = 40.0, 3.0
    inside = make_stage1(pessimism=1.0)(*design).delta_ef_pct
    for name, column, value, distance, by_design in (
        ("patient_high", 0, 80.0, 0.0, 0.0),
        ("patient_high", 0, 35.0, 0.25, 0.0),  # 40 in a range of 15 to 35
        ("formulation_low", 3, 4.0, 1.0, 1.0),  # 3 in a range of 4 to 5
        ("seen", slice(None), 0.0, 1.0, 1.0),
    ):
        ensemble = make_stage1(pessimism=1.0)
        getattr(ensemble, name)[..., column] = value
        found = ensemble.predict(*design).distance.item()
        assert found == pytest.approx(distance, abs=1e-5)
        lost = inside - ensemble(*design).delta_ef_pct
        # Of the outcome's deviation.
        assert lost.item() == pytest.approx(3.0 * by_design, abs=1e-3)
    # What never varied in the table may be missed by a little.
    ensemble = make_stage1()
    _, polymer, formulation, coverage = design
    ensemble.formulation_high[..., CONDUCTIVITY] = 0.0  # of 0 to 1 S/m
    for value, distance in ((0.0, 0.0), (0.01, 0.2), (1.0, 20.0)):
        formulation[:, CONDUCTIVITY] = value
        found = ensemble.design_distance(polymer, formulation, coverage).item()
        assert found == pytest.approx(distance, abs=1e-5)


def test_any_batch_shape_and_dtype_are_taken(make_stage1, ensemble):
    patient, polymer, formulation, coverage = designs(6)
    flat = ensemble(patient, polymer, formulation, coverage).delta_ef_pct
    grid = ensemble(
        patient[:1].double(), polymer.view(2, 3), formulation.view(2, 3, 4), coverage.view(2, 3)
    ).delta_ef_pct
    assert (grid.shape, grid.dtype) == ((2, 3), torch.float64)
    one = ensemble(patient[0], polymer[0], formulation[0], coverage[0]).delta_ef_pct
    torch.testing.assert_close(grid[0, 0].float(), one)
    torch.testing.assert_close(one, flat[0])
    rough = make_stage1(pessimism=0.0, compute_dtype=torch.bfloat16)(*designs(6)).delta_ef_pct
    assert not torch.equal(rough, flat)
    torch.testing.assert_close(rough, flat, atol=0.2, rtol=0.02)  # as float32
    patient[0, 3] = torch.nan
    lost = ensemble(patient, polymer, formulation, coverage).delta_ef_pct.isfinite()
    assert lost.tolist() == [False] + [True] * 5


def test_checkpoint_holds_all_that_running_needs(make_stage1, tmp_path):
    ensemble = make_stage1(pessimism=0.7)
    save_stage1(tmp_path / "m.pt", ensemble, {"rows": 3})
    loaded = load_stage1(tmp_path / "m.pt")
    assert loaded.pessimism == 0.7
    assert all(map(torch.equal, loaded(*designs()), ensemble(*designs())))
    assert load_stage1(tmp_path / "m.pt", pessimism=0.0).pessimism == 0.0
    assert read_stage1(tmp_path / "m.pt")["fit"] == {"rows": 3}
    ensemble.network.trunk.bias[0, 0, 0] = torch.inf
    save_stage1(tmp_path / "m.pt", ensemble, {})
    with pytest.raises(Stage1Error, match=r"network\.trunk\.bias is not finite"):
        load_stage1(tmp_path / "m.pt")


def test_checkpoint_of_something_else_is_refused(ensemble, tmp_path):
    path = tmp_path / "m.pt"
    save_stage1(path, ensemble, {})
    saved = torch.load(path, weights_only=True)
    members = {"polymer_dim": 7, "num_categories": 4, "num_members": 2}
    for change, message in (
        ({"format": "other"}, r"its format is 'other'; expected 'hydrogel_gym\.stage1\.v1'"),
        ({"numeric_fields": list(NUMERIC_FIELDS[:-1])}, r"there are 18, here 19"),
        (
            {"polymers": [*load_polymers().names[:-1], "PEDOT"]},
            r"polymers differ from this version's: 23 is 'PEDOT', here 'PEDOT_PSS'",
        ),
        ({"architecture": {"polymer_dim": 7}}, r"it does not fit: TypeError: .*num_categories"),
        ({"architecture": members}, r"it does not fit: ValueError: network\.category has shape"),
    ):
        torch.save(saved | change, path)
        with pytest.raises(Stage1Error, match=f"checkpoint {path}: .*{message}"):
            load_stage1(path)


class Malicious:
    def __reduce__(self):
        return exec, ("open('executed', 'w').close()",)


def test_file_that_is_no_checkpoint_is_refused_and_runs_no_code(ensemble, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "m.pt"
    with pytest.raises(Stage1Error, match="no such file"):
        load_stage1(path)
    save_stage1(path, ensemble, {})
    for content in (path.read_bytes()[:1000], b"weights"):
        path.write_bytes(content)
        with pytest.raises(Stage1Error, match="it is cut off, or is no archive"):
            load_stage1(path)
    torch.save({"format": Malicious()}, path, pickle_module=pickle)
    with pytest.raises(Stage1Error, match="it cannot be read"):
        load_stage1(path)
    assert not (tmp_path / "executed").exists()
