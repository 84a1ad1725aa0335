import numpy as np
import pytest
import torch
from common import first_patients
from quality import regret
from quality.baselines import search, transfer
from quality.baselines.objective import PatientObjective, design_at

from hydrogel_gym import load_cohort, load_reward_model
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.problem.fields import FORMULATION_HIGH, FORMULATION_LOW, Design

# With odd numbers of calls, so that no method ends on a full batch, and the library it needs.
SEARCHES = [
    (search.random_search, 37, "torch"),
    (search.sobol_search, 37, "torch"),
    pytest.param(search.cma_es, 101, "cma", marks=pytest.mark.nightly),
    pytest.param(search.tpe, 25, "optuna", marks=pytest.mark.nightly),
    pytest.param(search.botorch_bo, search.NUM_INITIAL + 1, "botorch", marks=pytest.mark.nightly),
]


@pytest.fixture(scope="module")
def model():
    return load_reward_model("mechanistic")


@pytest.fixture(scope="module")
def holdout():
    return first_patients(load_cohort("holdout"), 2)


@pytest.fixture(scope="module")
def training():
    return first_patients(load_cohort("train"), 8)


@pytest.fixture(scope="module")
def training_best(training):
    return best_designs(training).design


class StubAgent:
    """A policy that always takes polymer 4, and scatters formulations when it samples."""

    def design(self, obs, generator=None):
        share = torch.full((len(obs), 4), 0.5)
        if generator:
            share = torch.rand(len(obs), 4, generator=generator)
        design = design_at(share, torch.full((len(obs),), 4), torch.full((len(obs),), 3))
        return design._asdict(), torch.zeros(len(obs))


def is_within_the_box(design):
    low, high = torch.from_numpy(FORMULATION_LOW), torch.from_numpy(FORMULATION_HIGH)
    inside = ((design.formulation >= low) & (design.formulation <= high)).all()
    polymers = ((design.polymer_id >= 0) & (design.polymer_id < 24)).all()
    return inside and polymers and ((design.coverage >= 0) & (design.coverage < 4)).all()


def searched(method, patient, model, budget, seed=3):
    objective = PatientObjective(patient, model, budget)
    method(objective, seed)
    return objective.trace


def test_objective_pays_what_can_be_worked_out_by_hand_within_its_budget(three_patients, toy_model):
    objective = PatientObjective(three_patients.features[0], toy_model, 3)
    design = Design(
        torch.tensor([2, 1]),
        torch.tensor([[10.0, 30.0, 0.1, 5.0], [10.0, 30.0, 0.5, 1.0]]),
        torch.tensor([1, 0]),
    )
    # 3 polymer + 0.3 coverage + 0.5 and the novelty bonus of 0.1; the second breaks two limits.
    expected = torch.tensor([6.0 + 0.3 + 0.6, 3.0 + 0.6 - 2.0 - 1.0])
    np.testing.assert_allclose(objective(design), expected, rtol=1e-6)
    np.testing.assert_allclose(objective.trace, [6.9, 6.9], rtol=1e-6)
    assert (np.diff(objective.overhead_seconds) >= 0).all()
    with pytest.raises(RuntimeError, match="2 designs to evaluate, but 1 of 3 calls remain"):
        objective(design)
    assert len(objective.trace) == 2


@pytest.mark.parametrize(("method", "budget", "library"), SEARCHES)
def test_search_spends_its_budget_within_the_box_and_repeats_under_its_seed(
    method, budget, library, holdout, model
):
    pytest.importorskip(library)
    seen = []

    def recorder(patient, *design):
        seen.append(Design(*design))
        return model(patient, *design)

    patient = holdout.features[0]
    first = searched(method, patient, recorder, budget)
    assert len(first) == budget
    assert all(map(is_within_the_box, seen))
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 (what a library may draw from)
    np.testing.assert_array_equal(searched(method, patient, model, budget), first)
    assert not np.array_equal(searched(method, patient, model, budget, seed=4), first)
    assert len(searched(method, patient, model, 1)) == 1


@pytest.mark.nightly
def test_cma_es_restarts_where_nothing_is_gained_until_its_budget_is_used(holdout, toy_model):
    pytest.importorskip("cma")
    flat = toy_model(holdout.features[:1], *(torch.zeros(1), torch.ones(1, 4), torch.zeros(1)))
    trace = searched(
        search.cma_es,
        holdout.features[0],
        lambda patient, *_: type(flat)(*(part.expand(len(patient)) for part in flat)),
        2_000,
    )
    assert len(trace) == 2_000


def test_one_size_is_no_worse_on_its_cohort_than_every_candidate(training, training_best, model):
    patients = training.features
    every = transfer.cohort_mean_reward(patients, training_best, model)
    one, reward = transfer.one_size_fits_all(patients, training_best, model, seed=0)
    assert reward >= every.max()
    again = transfer.cohort_mean_reward(patients, one, model)
    assert again.item() == pytest.approx(reward, abs=1e-4)  # float32, another batch


def test_nearest_patient_of_a_training_patient_is_itself(training, training_best):
    design = transfer.nearest_patient(training.features, training_best, training.features)
    for got, expected in zip(design, training_best, strict=True):
        assert torch.equal(got, expected)


def test_policy_tries_its_deterministic_design_first_and_then_samples(holdout):
    patient, middle = holdout.features[0], (FORMULATION_LOW + FORMULATION_HIGH) / 2
    several, one, sample = (
        regret.policy_designs(StubAgent(), patient, name, budget, 1).formulation
        for name, budget in (("policy_best_of_k", 5), ("policy", 1), ("policy_sample", 1))
    )
    assert len(several.unique(dim=0)) == 5
    for first in (several[0], one[0]):
        np.testing.assert_allclose(first, middle)
    assert not np.allclose(sample[0], middle)


def test_no_baseline_beats_the_oracle(holdout, training, training_best, model, monkeypatch):
    oracle = best_designs(holdout).score.numpy().astype(float)
    names = ["one_size_fits_all", "nearest_patient"]
    found = {
        name: regret.transferred(name, training, training_best, holdout.features, 0)[0]
        for name in names
    }
    found["random"] = regret.search_all("random", holdout.features, 5_000, 0, processes=1)
    found["policy"] = [
        regret.evaluated(p, regret.policy_designs(StubAgent(), p, "policy_best_of_k", 200, 0))
        for p in holdout.features
    ]
    every = {name: regret.compared(each, oracle) for name, each in found.items()}
    assert all((runs.regret > -0.02).all() for runs in every.values())
    assert every["random"].calls[-1] == 5_000
    assert every["random"].rewards[:, -1].mean() > every["random"].rewards[:, 0].mean()


def test_regret_is_the_oracles_reward_less_the_best_so_far():
    traces = [(np.array([1.0, 4.0]), np.array([0.0, 1.0]))]
    traces.append((np.array([2.0, 2.0]), np.array([0.0, 3.0])))
    runs = regret.compared(traces, np.array([5.0, 2.0, 9.0]), calls_before=7.0)
    assert runs.regret.tolist() == [[4.0, 1.0], [0.0, 0.0]]
    assert runs.overhead_seconds.tolist() == [0.0, 2.0]
    assert regret.quartiles(runs.regret[:, 0]) == "2.00 [1.00, 3.00]"
    assert regret.calls_to_match(runs.calls, runs.regret.mean(0) <= 0.5) == 2
    assert regret.calls_to_match(runs.calls, runs.regret.mean(0) < 0.5) is None


def test_call_grid_has_the_first_calls_and_the_budget():
    for budget in (1, 7, 20, 21, 1_000, 10_000):
        grid = regret.call_grid(budget)
        assert grid[: min(budget, 20)].tolist() == list(range(1, min(budget, 20) + 1))
        assert grid[-1] == budget
        assert (np.diff(grid) > 0).all()
        assert (grid[20:] <= 1.1 * grid[19:-1] + 1).all()
