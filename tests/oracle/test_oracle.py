"""The yardstick: it finds the optimum, says how sure it is, and never trusts a stale file."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import gymnasium as gym
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from hydrogel_gym import (
    Cohort,
    Outcomes,
    RewardConfig,
    compute_reward,
    load_cohort,
    load_polymers,
    load_reward_model,
    oracle,
)
from hydrogel_gym.oracle import __main__ as command_line
from hydrogel_gym.oracle import best_designs, cached_best_designs
from hydrogel_gym.problem.fields import (
    COVERAGES,
    FORMULATION_FIELDS,
    FORMULATION_HIGH,
    FORMULATION_LOW,
)

TOLERANCE = 0.02  # of a reward: what two searches may differ by


def some_patients(rows: slice) -> Cohort:
    cohort = load_cohort("holdout")
    return Cohort(cohort.patient_ids[rows], cohort.features[rows], cohort.extra[rows], "some")


@pytest.fixture(scope="module")
def cohort():
    return some_patients(slice(0, 12))


@pytest.fixture(scope="module")
def best(cohort):
    return best_designs(cohort)


@pytest.fixture(scope="module")
def mechanistic():
    return load_reward_model("mechanistic")


def peaked_model(patient, polymer_id, formulation, coverage):
    """Gain of 10 points for polymer 5, coverage 2, at (20 kPa, 100 days, 0.4 S/m, 3 mm)."""
    peak = torch.tensor([20.0, 100.0, 0.4, 3.0])
    scale = torch.tensor([25.0, 173.0, 1.0, 4.0])
    distance = ((formulation - peak) / scale).square().sum(-1)
    wrong = (polymer_id != 5).float() + (coverage != 2).float()
    gain = 10.0 - 20.0 * distance - 0.5 * wrong + 0.0 * patient[..., 0]
    zero = torch.zeros_like(gain)
    return Outcomes(gain, zero, zero, zero, zero + 1.0, zero)


def cliff_model(patient, polymer_id, formulation, coverage):
    """A point of gain and a toxicity of 1 per S/m, whatever else the design is."""
    kappa = formulation[..., 2] + 0.0 * (patient[..., 0] + polymer_id + coverage)
    zero = torch.zeros_like(kappa)
    return Outcomes(kappa, zero, zero, kappa, zero + 1.0, zero)


def test_optimum_of_a_smooth_model_is_found_exactly(three_patients):
    found = best_designs(three_patients, peaked_model)
    assert found.design.polymer_id.tolist() == [5, 5, 5]
    assert found.design.coverage.tolist() == [2, 2, 2]
    expected = torch.tensor([[20.0, 100.0, 0.4, 3.0]]).expand(3, 4)
    torch.testing.assert_close(found.design.formulation, expected, rtol=2e-3, atol=0)
    # 3 x 10 + sigmoid(0) + novelty
    torch.testing.assert_close(found.score, torch.full((3,), 30.6), rtol=0, atol=1e-3)


def test_optimum_at_a_safety_limit_is_approached_from_the_safe_side(three_patients):
    config = RewardConfig(toxicity_penalty=5.0)  # a gain of 1 point is worth 3
    found = best_designs(three_patients, cliff_model, config)
    shortfall = config.toxicity_limit - found.outcomes.toxicity_risk
    assert (shortfall > 0).all()
    assert (shortfall < 1e-3).all()


def test_safety_limit_is_broken_where_the_gain_outweighs_the_penalty(three_patients):
    found = best_designs(three_patients, cliff_model, RewardConfig(toxicity_penalty=1.0))
    torch.testing.assert_close(found.outcomes.toxicity_risk, torch.ones(3))


def test_optimum_in_a_corner_of_the_box_is_inside_it(best):
    low, high = torch.from_numpy(FORMULATION_LOW), torch.from_numpy(FORMULATION_HIGH)
    assert (best.design.formulation >= low).all()
    assert (best.design.formulation <= high).all()
    assert (best.design.formulation[:, 2] == 0.0).any()


def test_two_searches_agree_for_nearly_every_patient():
    gap = best_designs(some_patients(slice(0, 100))).seed_gap
    assert (gap >= 0).all()
    assert (gap <= TOLERANCE).float().mean() >= 0.99


def test_another_seed_finds_the_same_scores(cohort, best):
    other = best_designs(cohort, seed=7)
    assert not torch.equal(other.design.formulation, best.design.formulation)
    assert (other.score - best.score).abs().max() <= TOLERANCE


def test_same_seed_finds_the_same_designs(cohort, best):
    again = best_designs(cohort)
    assert all(map(torch.equal, again.design, best.design))
    assert torch.equal(again.seed_gap, best.seed_gap)


def test_random_designs_never_beat_the_oracle(cohort, best, mechanistic):
    generator = torch.Generator().manual_seed(3)
    low, high = torch.from_numpy(FORMULATION_LOW), torch.from_numpy(FORMULATION_HIGH)
    size = (len(cohort), 20_000)
    outcomes = mechanistic(
        cohort.features.float()[:, None],
        torch.randint(24, size, generator=generator),
        torch.lerp(low, high, torch.rand(*size, 4, generator=generator)),
        torch.randint(4, size, generator=generator),
    )
    assert (compute_reward(outcomes).amax(1) <= best.score + TOLERANCE).all()


def test_designs_near_the_oracle_never_beat_it(cohort, best, mechanistic):
    generator = torch.Generator().manual_seed(4)
    low, high = torch.from_numpy(FORMULATION_LOW), torch.from_numpy(FORMULATION_HIGH)
    noise = torch.randn(len(cohort), 5_000, 4, generator=generator)
    widths = 10.0 ** -torch.linspace(0.5, 4.0, 5_000)
    near = best.design.formulation[:, None] + noise * widths[:, None] * (high - low)
    outcomes = mechanistic(
        cohort.features.float()[:, None],
        best.design.polymer_id[:, None],
        near.clamp(low, high),
        best.design.coverage[:, None],
    )
    assert (compute_reward(outcomes).amax(1) <= best.score + TOLERANCE).all()


@pytest.mark.slow
def test_differential_evolution_of_scipy_finds_nothing_better(cohort, best, mechanistic):
    optimize = pytest.importorskip("scipy.optimize")
    bounds = [(0, 23), (0, 3), *((f.low, f.high) for f in FORMULATION_FIELDS)]
    for row in range(5):
        patient = cohort.features[row].float()

        def loss(x, patient=patient):
            x = torch.tensor(x.T, dtype=torch.float32)
            polymer_id, coverage = x[:, 0].round().long(), x[:, 1].round().long()
            return -compute_reward(mechanistic(patient, polymer_id, x[:, 2:], coverage)).numpy()

        result = optimize.differential_evolution(
            loss,
            bounds,
            popsize=100,
            maxiter=300,
            rng=row,
            integrality=[True, True, False, False, False, False],
            vectorized=True,
            updating="deferred",
            polish=False,
        )
        assert -result.fun <= best.score[row] + TOLERANCE


def test_a_patients_design_does_not_depend_on_the_others(best):
    alone = best_designs(some_patients(slice(5, 8)))
    torch.testing.assert_close(alone.score, best.score[5:8], rtol=0, atol=1e-3)


def test_memory_is_bounded_by_the_patients_searched_at_once(cohort, best, mechanistic, monkeypatch):
    monkeypatch.setattr(oracle.best, "PATIENTS_AT_ONCE", {"cpu": 5})
    largest = 0

    def watching(patient, polymer_id, formulation, coverage):
        nonlocal largest
        outcomes = mechanistic(patient, polymer_id, formulation, coverage)
        largest = max(largest, outcomes.delta_ef_pct.numel())
        return outcomes

    chunked = best_designs(cohort, watching)
    assert largest == 5 * 96 * oracle.search.NUM_SOBOL
    torch.testing.assert_close(chunked.score, best.score, rtol=0, atol=1e-3)


def test_model_sees_one_batch_dimension_as_in_the_environments(three_patients):
    shapes = set()

    def strict(patient, polymer_id, formulation, coverage):
        shapes.add((patient.dim(), polymer_id.dim(), formulation.dim(), coverage.dim()))
        assert len(patient) == len(polymer_id) == len(formulation) == len(coverage)
        return peaked_model(patient, polymer_id, formulation, coverage)

    best_designs(three_patients, strict)
    assert shapes == {(2, 1, 2, 1), (3, 2, 3, 2)}  # two dimensions only as it is loaded


def test_calls_of_a_search_are_as_stated(three_patients):
    calls = 0

    def counting(patient, polymer_id, formulation, coverage):
        nonlocal calls
        outcomes = peaked_model(patient, polymer_id, formulation, coverage)
        calls += outcomes.delta_ef_pct.numel()
        return outcomes

    oracle.search.search(three_patients.features.float(), counting, RewardConfig(), seed=0)
    assert calls == 3 * oracle.search.CALLS_PER_SEARCH


def test_search_reads_nothing_on_the_host(monkeypatch):
    shorter = tuple(stage._replace(generations=2) for stage in oracle.search.ROUNDS)
    monkeypatch.setattr(oracle.search, "ROUNDS", shorter)
    model = load_reward_model("mechanistic", "meta")
    design = oracle.search.search(torch.empty(7, 11, device="meta"), model, RewardConfig(), seed=0)
    assert [tuple(part.shape) for part in design] == [(7,), (7, 4), (7,)]
    assert {part.device.type for part in design} == {"meta"}


def test_search_runs_on_the_device_asked_for(cohort, best, device):
    found = best_designs(cohort, device=device)
    assert found.score.device.type == "cpu"
    torch.testing.assert_close(found.score, best.score, rtol=0, atol=TOLERANCE)


def test_score_is_the_reward_that_the_environment_pays(cohort, best):
    envs = gym.make_vec(
        "HydrogelDesign-v0", num_envs=len(cohort), cohort=cohort, output="torch", device="cpu"
    )
    envs.reset(seed=0)
    reward = envs.step(best.design._asdict())[1]
    torch.testing.assert_close(reward.float(), best.score, rtol=1e-6, atol=1e-5)


def test_reward_config_moves_the_optimum(cohort, best):
    config = RewardConfig(toxicity_penalty=0.0, integrity_penalty=0.0, fibrosis_penalty=0.0)
    assert (best_designs(cohort, reward_config=config).score >= best.score - TOLERANCE).all()
    assert best_designs(cohort, reward_config=config).score.mean() > best.score.mean()


def test_table_names_patients_polymers_and_units(cohort, best):
    table = best.to_frame()
    assert table["patient_id"].tolist() == list(cohort.patient_ids)
    names = load_polymers().names
    assert table["polymer_name"].tolist() == [names[i] for i in table["polymer_id"]]
    assert set(table["coverage"]) <= set(COVERAGES)
    assert table[[f.name for f in FORMULATION_FIELDS]].to_numpy() == pytest.approx(
        best.design.formulation.numpy()
    )
    assert table["reward"].to_numpy() == pytest.approx(best.score.numpy())
    assert "reward_seed_gap" in table


# Bad input


def test_empty_cohort_is_refused():
    with pytest.raises(ValueError, match="cohort 'some' has no patients"):
        best_designs(some_patients(slice(0, 0)))


@pytest.mark.parametrize("field", Outcomes._fields)
def test_outcome_that_is_not_a_number_stops_with_patient_and_design(cohort, mechanistic, field):
    broken = cohort.features[7].float()

    def model(patient, polymer_id, formulation, coverage):
        outcomes = mechanistic(patient, polymer_id, formulation, coverage)
        bad = (patient == broken).all(-1) & (polymer_id == 9)
        value = torch.where(bad, torch.nan, getattr(outcomes, field))
        return outcomes._replace(**{field: value})

    with pytest.raises(ValueError, match=rf"'{field}': nan.*{cohort.patient_ids[7]}.*polymer_id=9"):
        best_designs(cohort, model)


def test_model_that_cannot_be_loaded_is_named(cohort):
    with pytest.raises(ValueError, match="'nonsense'"):
        best_designs(cohort, "nonsense")


# Cache


class Counting:
    """A model that counts the designs it has evaluated."""

    def __init__(self, model, shift=0.0):
        self.model, self.shift, self.designs = model, shift, 0

    def __call__(self, patient, polymer_id, formulation, coverage):
        outcomes = self.model(patient, polymer_id, formulation, coverage)
        self.designs += outcomes.delta_ef_pct.numel()
        return outcomes._replace(delta_ef_pct=outcomes.delta_ef_pct + self.shift)


@pytest.fixture
def searched(monkeypatch):
    """Seeds of the searches that were run."""
    seeds = []

    def search(patients, model, config, seed, original=oracle.search.search):
        seeds.append(seed)
        return original(patients, model, config, seed)

    monkeypatch.setattr(oracle.best, "search", search)
    return seeds


def cache_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*")) + sorted(folder.glob(".*"))


def test_cached_result_is_read_instead_of_searched_for(tmp_path, three_patients, searched):
    first = best_designs(three_patients, cache_dir=tmp_path / "cache")
    assert len(searched) == 2
    again = best_designs(three_patients, cache_dir=tmp_path / "cache")
    assert len(searched) == 2
    assert all(map(torch.equal, again.design, first.design))
    assert all(map(torch.equal, again.outcomes, first.outcomes))
    assert torch.equal(again.score, first.score)
    assert torch.equal(again.seed_gap, first.seed_gap)
    assert len(cache_files(tmp_path / "cache")) == 1


def test_result_is_had_from_the_cache_alone_and_none_where_it_has_none(
    tmp_path, three_patients, searched
):
    assert cached_best_designs(three_patients, cache_dir=tmp_path / "absent") is None
    assert list(tmp_path.iterdir()) == []
    first = best_designs(three_patients, cache_dir=tmp_path)
    cached = cached_best_designs(three_patients, cache_dir=tmp_path)
    assert len(searched) == 2
    assert torch.equal(cached.score, first.score)
    assert all(map(torch.equal, cached.design, first.design))
    assert cached_best_designs(three_patients, cache_dir=tmp_path, seed=1) is None


@pytest.mark.parametrize("changed", ["cohort", "model", "weights", "config", "seed", "code"])
def test_cache_is_passed_over_when_anything_it_depends_on_changes(
    tmp_path, three_patients, mechanistic, searched, monkeypatch, changed
):
    layer = torch.nn.Linear(1, 1)
    model = torch.nn.Module()
    model.layer, model.forward = layer, mechanistic.forward
    arguments = dict(cohort=three_patients, reward_model=model, cache_dir=tmp_path)
    best_designs(**arguments)
    if changed == "cohort":
        features = three_patients.features.clone()
        features[2, 3] += 1e-6
        arguments["cohort"] = dataclasses.replace(three_patients, features=features)
    elif changed == "model":
        arguments["reward_model"] = Counting(mechanistic, shift=1e-3)
    elif changed == "weights":
        torch.nn.init.constant_(layer.weight, 3.0)
    elif changed == "config":
        arguments["reward_config"] = RewardConfig(novelty_bonus=0.2)
    elif changed == "seed":
        arguments["seed"] = 1
    else:
        another_version = tmp_path.with_suffix(".py")
        another_version.write_text("another version")
        monkeypatch.setattr(oracle.cache, "sources", lambda: [another_version])
    best_designs(**arguments)
    assert len(searched) == 4
    assert len(cache_files(tmp_path)) == 2


PACKAGE = Path(str(files("hydrogel_gym")))
KEYED = [Path(str(source)).relative_to(PACKAGE).as_posix() for source in oracle.cache.sources()]


@pytest.mark.parametrize("changed", [*KEYED, "polymers.csv"])
def test_key_of_the_cache_changes_with_each_source_it_depends_on(
    tmp_path, three_patients, monkeypatch, changed
):
    arguments = (tmp_path, three_patients, three_patients.features.float(), peaked_model)
    arguments += (RewardConfig(), 0)
    package = tmp_path / "hydrogel_gym"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(oracle.cache, "files", lambda name: package)
    before = oracle.cache.cache_entry(*arguments)
    assert oracle.cache.cache_entry(*arguments) == before
    (package / changed).write_bytes((package / changed).read_bytes() + b"\n")
    assert oracle.cache.cache_entry(*arguments) != before


@pytest.mark.parametrize("damage", ["cut short", "text", "other rows", "other key", "column"])
def test_damaged_cache_is_replaced(tmp_path, three_patients, searched, damage):
    first = best_designs(three_patients, cache_dir=tmp_path)
    (path,) = cache_files(tmp_path)
    whole = path.read_bytes()
    if damage == "cut short":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "text":
        path.write_text("not a table")
    else:
        table = pq.read_table(path)
        if damage == "other rows":
            table = table.slice(1)
        elif damage == "other key":
            table = table.replace_schema_metadata({"key": "another"})
        else:
            table = table.drop_columns(["coverage"])
        pq.write_table(table, path)
    again = best_designs(three_patients, cache_dir=tmp_path)
    assert len(searched) == 4
    assert torch.equal(again.score, first.score)
    assert cache_files(tmp_path) == [path]
    assert path.read_bytes() == whole


def test_score_is_computed_from_the_cached_design_not_read(tmp_path, three_patients):
    best_designs(three_patients, cache_dir=tmp_path)
    (path,) = cache_files(tmp_path)
    assert "score" not in pq.read_schema(path).names


def test_interrupted_search_leaves_no_file(tmp_path, three_patients, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(oracle.best, "search", interrupted)
    with pytest.raises(KeyboardInterrupt):
        best_designs(three_patients, cache_dir=tmp_path)
    assert cache_files(tmp_path) == []


def test_interrupted_write_leaves_no_file(tmp_path, three_patients, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        best_designs(three_patients, cache_dir=tmp_path)
    assert cache_files(tmp_path) == []


# Command line


@pytest.fixture
def table_of_patients(tmp_path):
    path = tmp_path / "mine.csv"
    text = (files("hydrogel_gym.patients") / "cohort.csv").read_text().splitlines()
    path.write_text("\n".join(text[:4]) + "\n")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_command_line_writes_the_table(tmp_path, table_of_patients, suffix, capsys):
    output = tmp_path / f"best{suffix}"
    assert command_line.main(["--cohort", str(table_of_patients), "--output", str(output)]) == 0
    table = pd.read_csv(output) if suffix == ".csv" else pd.read_parquet(output)
    best = best_designs(table_of_patients)
    assert table["reward"].to_numpy() == pytest.approx(best.score.numpy(), abs=1e-4)
    assert "two searches agree within 0.02 for 100.0 %" in capsys.readouterr().out


def test_module_runs_as_a_command():
    run = [sys.executable, "-m", "hydrogel_gym.oracle", "--help"]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m hydrogel_gym.oracle")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "x.txt"], "--output is 'x.txt'; allowed: a .csv or .parquet file"),
        (["--output", "no/x.csv"], "in a folder that does not exist"),
        (["--output", "x.csv", "--cohort", "absent.csv"], "absent.csv"),
        (["--output", "x.csv", "--reward-model", "nonsense"], "'nonsense'"),
        (["--output", "x.csv", "--seed", "-1"], "--seed is -1; allowed: 0 or more"),
        (["--output", "x.csv", "--device", "nonsense"], "nonsense"),
    ],
)
def test_bad_command_line_is_one_line_and_writes_nothing(
    tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    assert command_line.main(flags) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
