import numpy as np
import pytest
import torch
from common import first_patients
from quality import regret
from quality.baselines import search, transfer
from quality.baselines.objective import HIGH, LOW, PatientObjective

from hydrogel_gym import load_cohort, load_reward_model
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.problem.fields import Design

MODEL = load_reward_model("mechanistic")
HOLDOUT = first_patients(load_cohort("holdout"), 2)
PATIENT = HOLDOUT.features[0]
# With odd numbers of calls, so that no method ends on a full batch, and the library it needs.
SEARCHES = [
    (search.random_search, 37, "torch"),
    (search.sobol_search, 37, "torch"),
    pytest.param(search.cma_es, 2_001, "cma", marks=pytest.mark.nightly),  # with restarts
    pytest.param(search.tpe, 25, "optuna", marks=pytest.mark.nightly),
    pytest.param(search.botorch_bo, search.NUM_INITIAL + 1, "botorch", marks=pytest.mark.nightly),
]


@pytest.fixture(scope="module")
def training():
    cohort = first_patients(load_cohort("train"), 8)
    return cohort, best_designs(cohort).design


def test_objective_pays_what_can_be_worked_out_by_hand_within_its_budget(three_patients, toy_model):
    objective = PatientObjective(three_patients.features[0], toy_model, 3)
    formulation = torch.tensor([[10.0, 30.0, 0.1, 5.0], [10.0, 30.0, 0.5, 1.0]])
    design = Design(torch.tensor([2, 1]), formulation, torch.tensor([1, 0]))
    # 3 polymer + 0.3 coverage + 0.5 and the novelty bonus of 0.1; the second breaks two limits.
    np.testing.assert_allclose(objective(design), [6.9, 3.6 - 2.0 - 1.0], rtol=1e-6)
    np.testing.assert_allclose(objective.trace, [6.9, 6.9], rtol=1e-6)
    with pytest.raises(RuntimeError, match="2 designs to evaluate, but 1 of 3 calls remain"):
        objective(design)
    assert len(objective.trace) == 2


@pytest.mark.parametrize(("method", "budget", "library"), SEARCHES)
def test_search_spends_its_budget_within_the_box_and_repeats_under_its_seed(
    method, budget, library
):
    pytest.importorskip(library)

    def model(patient, polymer_id, formulation, coverage):
        assert ((formulation >= LOW) & (formulation <= HIGH)).all()
        assert set(polymer_id.tolist()) <= set(range(24))
        assert set(coverage.tolist()) <= set(range(4))
        return MODEL(patient, polymer_id, formulation, coverage)

    def trace(budget, seed=3):
        objective = PatientObjective(PATIENT, model, budget)
        method(objective, seed)
        return objective.trace

    first = trace(budget)
    assert len(first) == budget
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 (what a library may draw from)
    np.testing.assert_array_equal(trace(budget), first)
    assert not np.array_equal(trace(budget, seed=4), first)
    assert len(trace(1)) == 1


def test_one_size_beats_every_candidate_and_the_nearest_of_a_training_patient_is_itself(training):
    patients, best = training[0].features, training[1]
    one, reward = transfer.one_size_fits_all(patients, best, MODEL, seed=0)
    assert reward >= transfer.cohort_mean_reward(patients, best, MODEL).max()
    # float32, another batch
    assert transfer.cohort_mean_reward(patients, one, MODEL).item() == pytest.approx(reward, 1e-5)
    assert all(map(torch.equal, transfer.nearest_patient(patients, best, patients), best))


def test_policy_tries_its_deterministic_design_first_and_then_samples(agent):
    def designs(name, budget, seed):
        return regret.policy_designs(agent, PATIENT, name, budget, seed).formulation

    several, other = designs("policy_best_of_k", 5, 1), designs("policy_best_of_k", 5, 2)
    assert torch.equal(several[0], other[0])
    assert torch.equal(several[:1], designs("policy", 1, 3))
    assert len(torch.cat([several, other, designs("policy_sample", 1, 3)]).unique(dim=0)) == 10


def test_no_baseline_beats_the_oracle_at_any_number_of_calls_up_to_the_budget(training, agent):
    oracle, patients = best_designs(HOLDOUT).score.numpy().astype(float), HOLDOUT.features
    found = {
        name: regret.transferred(name, *training, patients, 0)[0]
        for name in ("one_size_fits_all", "nearest_patient")
    }
    found["random"] = regret.search_all("random", patients, 5_000, 0, processes=1)
    tried = (regret.policy_designs(agent, p, "policy_best_of_k", 200, 0) for p in patients)
    found["policy"] = list(map(regret.evaluated, patients, tried))
    every = {name: regret.compared(each, oracle) for name, each in found.items()}
    assert all((runs.regret > -0.02).all() for runs in every.values())
    calls, rewards = every["random"][:2]
    assert [*calls[:20], calls[-1]] == [*range(1, 21), 5_000]
    assert (np.diff(calls) <= 0.1 * calls[:-1] + 1).all()
    assert (rewards[:, -1] > rewards[:, 0]).all()


def test_regret_is_the_oracles_reward_less_the_best_so_far():
    traced = [(np.array([1.0, 4.0]), 1.0), (np.array([2.0, 2.0]), 3.0)]
    runs = regret.compared(traced, np.array([5.0, 2.0, 9.0]))
    assert runs.regret.tolist() == [[4.0, 1.0], [0.0, 0.0]]
    assert runs.overhead_seconds == 2.0
    assert regret.quartiles(runs.regret[:, 0]) == "2.00 [1.00, 3.00]"
    assert regret.calls_to_match(runs.calls, runs.regret.mean(0) <= 0.5) == 2
    assert regret.calls_to_match(runs.calls, runs.regret.mean(0) < 0.5) is None
