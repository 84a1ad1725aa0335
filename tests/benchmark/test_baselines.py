import importlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hydrogel_gym import Cohort, Outcomes, load_cohort, load_reward_model
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.problem.fields import FORMULATION_HIGH, FORMULATION_LOW, Design

BENCHMARK = Path(__file__).parents[2] / "benchmark"


with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(BENCHMARK))  # where a script finds its neighbours
    import regret
    from baselines import methods, search, tables, transfer
    from baselines import policy as policies
    from baselines.objective import (
        BudgetExceededError,
        CountingModel,
        PatientObjective,
        design_at,
    )

# Searches take minutes, and the best of them a library that only benchmarks need.
pytestmark = pytest.mark.slow

# Odd numbers of calls, so that no method ends on a full batch of its own.
SEARCHES = {
    "random_search": (None, 37),
    "sobol_search": (None, 37),
    "cma_es": ("cma", 101),
    "tpe": ("optuna", 25),
    "botorch_bo": ("botorch", search.NUM_INITIAL + 1),
}


def rows(cohort, count, name="some"):
    return Cohort(
        cohort.patient_ids[:count], cohort.features[:count], cohort.extra.iloc[:count], name
    )


@pytest.fixture(scope="module")
def model():
    return load_reward_model("mechanistic")


@pytest.fixture(scope="module")
def holdout():
    return rows(load_cohort("holdout"), 4)


@pytest.fixture(scope="module")
def training():
    return rows(load_cohort("train"), 40)


@pytest.fixture(scope="module")
def training_best(training):
    return best_designs(training)


class Recorder:
    """A reward model that keeps the designs that it evaluates."""

    def __init__(self, model):
        self.model = model
        self.designs_seen = []

    def __call__(self, patient, *design):
        self.designs_seen.append(Design(*design))
        return self.model(patient, *design)

    def designs(self):
        return Design(*(torch.cat(parts) for parts in zip(*self.designs_seen, strict=True)))


def searched(name, patient, model, budget, seed=3):
    objective = PatientObjective(patient, model, budget)
    getattr(search, name)(objective, seed)
    return objective


def some_designs(count, polymer_id=0):
    share = torch.full((count, 4), 0.5)
    return design_at(share, torch.full((count,), polymer_id), torch.zeros(count))


def flat_model(patient, polymer_id, formulation, coverage):
    zero = torch.zeros_like(formulation[..., 0])
    return Outcomes(zero, zero, zero, zero, zero + 1.0, zero)


def toy_objective(three_patients, toy_model, budget):
    return PatientObjective(three_patients.features[0], toy_model, budget)


def test_objective_pays_what_can_be_worked_out_by_hand(three_patients, toy_model):
    objective = toy_objective(three_patients, toy_model, 2)
    design = Design(
        torch.tensor([2, 1]),
        torch.tensor([[10.0, 30.0, 0.1, 5.0], [10.0, 30.0, 0.5, 1.0]]),
        torch.tensor([1, 0]),
    )
    # 3 polymer + 0.3 coverage + 0.5 and the novelty bonus of 0.1; the second breaks two limits.
    expected = torch.tensor([6.0 + 0.3 + 0.6, 3.0 + 0.6 - 2.0 - 1.0])
    torch.testing.assert_close(objective(design), expected)


def test_objective_counts_every_design_of_a_batch(three_patients, toy_model):
    objective = toy_objective(three_patients, toy_model, 10)
    objective(some_designs(3))
    objective(some_designs(1))
    assert (objective.calls, objective.remaining) == (4, 6)


def test_objective_refuses_to_exceed_its_budget_and_evaluates_nothing(three_patients, toy_model):
    objective = toy_objective(three_patients, toy_model, 3)
    objective(some_designs(2))
    with pytest.raises(BudgetExceededError, match="2 designs to evaluate, but 1 of 3 calls remain"):
        objective(some_designs(2))
    assert objective.calls == 2
    objective(some_designs(1))
    with pytest.raises(BudgetExceededError):
        objective(some_designs(1))


@pytest.mark.parametrize("budget", [0, -1])
def test_objective_refuses_a_budget_below_one(three_patients, toy_model, budget):
    with pytest.raises(ValueError, match="at least 1"):
        toy_objective(three_patients, toy_model, budget)


def test_trace_is_the_running_best_over_batches(three_patients, toy_model):
    objective = toy_objective(three_patients, toy_model, 6)
    rewards = []
    for polymers in ([1, 0, 4], [3], [2, 5]):
        share = torch.full((len(polymers), 4), 0.5)
        design = design_at(share, torch.tensor(polymers), torch.zeros(len(polymers)))
        rewards.append(objective(design))
    expected = np.maximum.accumulate(torch.cat(rewards).numpy().astype(float))
    np.testing.assert_array_equal(objective.trace, expected)
    assert objective.best_design.polymer_id.tolist() == [5]
    assert objective.overhead_seconds.shape == (6,)
    assert (np.diff(objective.overhead_seconds) >= 0).all()


def test_counting_model_counts_broadcast_designs(training, model):
    counting = CountingModel(model)
    transfer.cohort_mean_reward(training.features, some_designs(33), counting)
    assert counting.calls == 33 * len(training)


@pytest.mark.parametrize("name", SEARCHES)
def test_search_uses_exactly_its_budget_within_the_box(name, holdout, model):
    library, budget = SEARCHES[name]
    if library:
        pytest.importorskip(library)
    recorder = Recorder(model)
    objective = searched(name, holdout.features[0], recorder, budget)
    assert objective.calls == budget == len(objective.trace)
    design = recorder.designs()
    low, high = torch.from_numpy(FORMULATION_LOW), torch.from_numpy(FORMULATION_HIGH)
    assert ((design.formulation >= low) & (design.formulation <= high)).all()
    assert ((design.polymer_id >= 0) & (design.polymer_id < 24)).all()
    assert ((design.coverage >= 0) & (design.coverage < 4)).all()


@pytest.mark.parametrize("name", SEARCHES)
def test_search_is_reproducible_under_its_seed_whatever_the_global_one(name, holdout, model):
    library, budget = SEARCHES[name]
    if library:
        pytest.importorskip(library)
    traces = []
    for global_seed, seed in ((0, 3), (1, 3), (0, 4)):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)  # noqa: NPY002 (what a library may draw from)
        traces.append(searched(name, holdout.features[0], model, budget, seed).trace)
    np.testing.assert_array_equal(traces[0], traces[1])
    assert not np.array_equal(traces[0], traces[2])


@pytest.mark.parametrize("name", SEARCHES)
def test_search_can_do_with_one_call(name, holdout, model):
    if library := SEARCHES[name][0]:
        pytest.importorskip(library)
    assert searched(name, holdout.features[0], model, 1).calls == 1


def test_cma_es_restarts_until_its_budget_is_used(holdout):
    pytest.importorskip("cma")
    assert searched("cma_es", holdout.features[0], flat_model, 2_000).calls == 2_000


@pytest.mark.parametrize(
    ("name", "budget"),
    [("cma_es", 600), pytest.param("botorch_bo", 35, marks=pytest.mark.slow)],
)
def test_model_based_search_is_ahead_of_random_search(name, budget, holdout, model):
    pytest.importorskip(SEARCHES[name][0])
    patients = holdout.features[:2]
    found, random = (
        [searched(method, patient, model, budget).trace[-1] for patient in patients]
        for method in (name, "random_search")
    )
    assert np.mean(found) > np.mean(random)


def test_one_size_is_no_worse_on_its_cohort_than_every_candidate(training, training_best, model):
    one = transfer.one_size_fits_all(training.features, training_best.design, model, seed=0)
    assert (one.mean_reward >= one.candidate_rewards).all()
    assert len(one.candidate_rewards) == len(one.candidates.polymer_id) > len(training)
    again = transfer.cohort_mean_reward(training.features, one.design, model)
    assert again.item() == pytest.approx(one.mean_reward, abs=1e-4)  # float32, another batch


def test_nearest_patient_of_a_training_patient_is_itself(training, training_best):
    pytest.importorskip("sklearn")
    design = transfer.nearest_patient(training.features, training_best.design, training.features)
    for got, expected in zip(design, training_best.design, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("family", transfer.FAMILIES)
def test_regression_proposes_designs_of_known_pairs_within_the_box(
    family, training, training_best, holdout
):
    pytest.importorskip("sklearn")
    learner = transfer.DesignRegression(family).fit(training.features, training_best.design)
    design = learner.predict(holdout.features)
    known = set((training_best.design.polymer_id * 4 + training_best.design.coverage).tolist())
    assert set((design.polymer_id * 4 + design.coverage).tolist()) <= known
    low, high = torch.from_numpy(FORMULATION_LOW), torch.from_numpy(FORMULATION_HIGH)
    assert ((design.formulation >= low) & (design.formulation <= high)).all()
    assert design.formulation.dtype == torch.float32


class StubAgent:
    """A policy that always takes polymer 4, and scatters formulations when it samples."""

    def design(self, obs, generator=None):
        share = torch.full((len(obs), 4), 0.5)
        if generator:
            share = torch.rand(len(obs), 4, generator=generator)
        design = design_at(share, torch.full((len(obs),), 4), torch.full((len(obs),), 3))
        return design._asdict(), torch.zeros(len(obs))


def stub_policy():
    summary = {"samples": 1_000, "wall_seconds": 2.0, "device": "cpu", "threads": 1}
    return policies.TrainedPolicy(Path("stub"), StubAgent(), 1, summary)


def test_policy_tries_its_deterministic_design_first_and_then_samples(holdout):
    design = stub_policy().best_of(holdout.features[0], 5, seed=1)
    assert design.formulation.shape == (5, 4)
    middle = design_at(torch.full((1, 4), 0.5), torch.tensor([0]), torch.tensor([0])).formulation
    assert torch.equal(design.formulation[:1], middle)
    assert len(design.formulation.unique(dim=0)) == 5


def test_no_baseline_beats_the_oracle(holdout, training, training_best, model):
    oracle = best_designs(holdout).score.double()
    one = transfer.one_size_fits_all(training.features, training_best.design, model, seed=0)
    proposed = {"one_size_fits_all": [one.design] * len(holdout)}
    proposed["policy"] = [stub_policy().best_of(p, 200, seed=0) for p in holdout.features]
    if importlib.util.find_spec("sklearn"):
        designs = training_best.design
        nearest = transfer.nearest_patient(training.features, designs, holdout.features)
        learnt = transfer.DesignRegression("boosted trees").fit(training.features, designs)
        for name, batch in (("nearest", nearest), ("learnt", learnt.predict(holdout.features))):
            proposed[name] = [
                transfer.design_rows(batch, torch.tensor([k])) for k in range(len(holdout))
            ]
    rewards = {}
    for name, each in proposed.items():
        objectives = [PatientObjective(patient, model, 200) for patient in holdout.features]
        for objective, design in zip(objectives, each, strict=True):
            objective(design)
        rewards[name] = [objective.trace[-1] for objective in objectives]
    budgets = {"random_search": 20_000, "sobol_search": 20_000}
    if importlib.util.find_spec("cma"):
        budgets["cma_es"] = 1_500
    for name, budget in budgets.items():
        rewards[name] = [searched(name, p, model, budget).trace[-1] for p in holdout.features]
    for name, values in rewards.items():
        excess = (torch.tensor(values, dtype=torch.float64) - oracle).max().item()
        assert excess <= 0.02, name


def test_missing_policy_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"policy .*nowhere is not a finished run"):
        policies.load_policy(tmp_path / "nowhere")


def test_interrupted_policy_is_refused(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"interrupted": True}))
    with pytest.raises(ValueError, match="not a finished run"):
        policies.load_policy(tmp_path)


@pytest.mark.parametrize("budget", [1, 7, 20, 21, 1_000, 10_000])
def test_call_grid_holds_the_first_calls_and_the_budget(budget):
    grid = methods.call_grid(budget)
    assert grid[: min(budget, 20)].tolist() == list(range(1, min(budget, 20) + 1))
    assert grid[-1] == budget
    assert (np.diff(grid) > 0).all()
    assert (grid[20:] <= 1.1 * grid[19:-1] + 1).all()


@pytest.mark.parametrize("calls", [1, 2, 50, 5_000])
@pytest.mark.parametrize("overhead", [0.0, 0.1, 50.0])
@pytest.mark.parametrize("num_patients", [1, 100, 100_000])
def test_break_even_agrees_with_the_two_costs(calls, overhead, num_patients):
    training_calls, training_seconds = 1e6, 60.0
    result = tables.break_even(
        num_patients=num_patients,
        calls=calls,
        overhead_seconds=overhead,
        training_calls=training_calls,
        training_seconds=training_seconds,
    )
    for cost in np.geomspace(1e-9, 1e6, 61):
        policy = training_calls * cost + training_seconds + num_patients * cost
        searching = num_patients * (calls * cost + overhead)
        pays = result is not None and result.above < cost < result.below
        assert pays == (policy < searching)


def test_calls_to_match_are_the_fewest_that_reach_the_target():
    table = pd.DataFrame({"calls": [1, 2, 5], "regret_median": [3.0, 1.0, 0.5]})
    find = tables.calls_to_match
    assert find(table, "regret_median", 1.0, falls=True) == 2
    assert find(table, "regret_median", 0.4, falls=True) is None
    assert find(table, "regret_median", 3.0, falls=False) == 1


@pytest.fixture
def small_benchmark(tmp_path, monkeypatch, holdout, training):
    """`regret.main` on four patients with a stub for the policy."""
    cohorts = {"holdout": holdout, "train": training}
    monkeypatch.setattr(regret, "load_cohort", cohorts.get)
    monkeypatch.setattr(regret, "load_policy", lambda path: stub_policy())
    common = ["--output-dir", str(tmp_path), "--cache-dir", str(tmp_path / "oracle")]
    common += ["--patients", "4", "--budget", "30", "--processes", "1"]
    return lambda *flags: regret.main([*common, *flags])


def test_benchmark_keeps_the_rows_of_methods_that_are_not_run_again(small_benchmark, tmp_path):
    assert small_benchmark("--methods", "random", "one_size_fits_all") == 0
    first = pd.read_csv(tmp_path / "regret.csv")
    assert small_benchmark("--methods", "sobol") == 0
    table = pd.read_csv(tmp_path / "regret.csv")
    searches = ["random", "sobol"]
    assert list(table["method"].unique()) == [
        "policy",
        "policy_sample",
        "policy_best_of_k",
        "one_size_fits_all",
        *searches,
    ]
    kept = table[table["method"] == "random"].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, first[first["method"] == "random"].reset_index(drop=True))
    assert (table.loc[table["method"].isin(searches), "calls"].max()) == 30
    assert (table["regret_q25"] <= table["regret_median"]).all()
    assert (table["regret_median"] <= table["regret_q75"]).all()
    text = (tmp_path / "regret.md").read_text()
    for word in ("Sobol search", "random search", "one size fits all", "When training the policy"):
        assert word in text
    assert (tmp_path / "regret.png").read_bytes().startswith(b"\x89PNG")


def test_benchmark_drops_rows_of_other_patients(small_benchmark, tmp_path, capsys):
    small_benchmark("--methods", "random")
    small_benchmark("--methods", "sobol", "--seed", "1")
    assert "rows of random are for other patients" in capsys.readouterr().out
    assert "random" not in set(pd.read_csv(tmp_path / "regret.csv")["method"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget", "0"], "--budget is 0; allowed: 1 or more"),
        (["--processes", "0"], "--processes is 0; allowed: 1 or more"),
        (["--seed", "-1"], "--seed is -1; allowed: 0 or more"),
    ],
)
def test_bad_flag_is_one_line(small_benchmark, capsys, flags, message):
    assert small_benchmark("--methods", "random", *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_missing_library_says_how_to_get_it(small_benchmark, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    assert small_benchmark("--methods", "cma_es") == 2
    assert "pip install -e '.[bench]'" in capsys.readouterr().err
