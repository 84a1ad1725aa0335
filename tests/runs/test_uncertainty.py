"""Predicted regret: higher where a design is worse, and as large as it says."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hydrogel_gym import Cohort, load_cohort
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.problem.fields import FORMULATION_HIGH, FORMULATION_LOW
from hydrogel_gym.problem.polymers import NUM_POLYMERS
from hydrogel_gym.runs import ProblemOptions, make_envs, uncertainty
from hydrogel_gym.runs.evaluation import EvaluationSet

LOW, HIGH = torch.from_numpy(FORMULATION_LOW), torch.from_numpy(FORMULATION_HIGH)
NUM_PATIENTS = 120


@pytest.fixture(scope="module")
def best():
    return best_designs("holdout")


@pytest.fixture(scope="module")
def evaluated(best):
    """The first held-out patients, and their best scores."""
    every = load_cohort("holdout")
    rows = slice(NUM_PATIENTS)
    cohort = Cohort(every.patient_ids[rows], every.features[rows], every.extra.iloc[rows], "some")
    envs = make_envs(ProblemOptions(), cohort, torch.device("cpu"))
    return EvaluationSet(envs, best.score[rows])


def policy_of(best, spoilt=0.0, change=0):
    """Designs the best, its formulation moved by a share of the box, with another polymer."""
    polymer_id, formulation, coverage = (part[:NUM_PATIENTS] for part in best.design)
    spoilt = torch.as_tensor(spoilt).expand(NUM_PATIENTS)[:, None]
    polymer_id = (polymer_id + torch.as_tensor(change)) % NUM_POLYMERS

    def policy(obs, generator):
        share = (formulation - LOW) / (HIGH - LOW)
        moved = torch.where(share > 0.5, share - spoilt, share + spoilt)
        if generator is not None:
            moved = moved + 0.01 * torch.randn(moved.shape, generator=generator)
        design = torch.lerp(LOW, HIGH, moved.clamp(0.0, 1.0))
        return dict(polymer_id=polymer_id, formulation=design, coverage=coverage), None

    return policy


def test_a_policy_that_is_worse_for_some_patients_is_said_to_be_worse_for_them(best, evaluated):
    is_spoilt = torch.arange(NUM_PATIENTS) % 4 == 0
    policy = policy_of(best, torch.where(is_spoilt, 0.1, 0.0))
    calibration, figures = uncertainty.calibrate_policy(policy, {"train": evaluated})
    tried = uncertainty.try_designs(policy, evaluated)
    expected, bound = uncertainty.predict(uncertainty.Calibration(**calibration), tried.gain)
    spoilt = is_spoilt.numpy()
    assert tried.regret[spoilt].mean() > 0.3
    assert tried.regret[~spoilt].max() < 1e-3
    assert expected[spoilt].min() > expected[~spoilt].max()
    assert expected[spoilt].mean() == pytest.approx(tried.regret[spoilt].mean(), rel=0.1)
    assert figures["train_predicted_regret"] == expected.mean()
    assert figures["train_regret_bound_coverage"] == (tried.regret <= bound).mean() >= 0.9
    assert figures["train_regret_of_flagged"] > 0.8


def test_what_is_gained_is_a_lower_bound_the_same_each_time(best, evaluated):
    policy = policy_of(best, 0.1)
    one, two = (uncertainty.try_designs(policy, evaluated) for _ in range(2))
    np.testing.assert_array_equal(one.gain, two.gain)
    assert (one.gain >= 0.0).all()
    assert (one.gain <= one.regret + 1e-3).all()
    assert one.gain.mean() > 0.5 * one.regret.mean()
    np.testing.assert_allclose(one.reward + one.regret, evaluated.best_score, atol=1e-4)


def test_a_polymer_that_the_policy_never_takes_is_missed(best, evaluated):
    tried = uncertainty.try_designs(policy_of(best, change=1), evaluated)
    assert tried.regret.mean() > 1.0
    np.testing.assert_allclose(tried.gain, tried.regret, atol=1e-3)


def test_regret_of_other_patients_is_as_large_as_predicted_and_mostly_below_its_bound():
    rng = np.random.default_rng(0)

    def draw(count):
        gain = rng.exponential(0.1, count)
        return gain, gain + rng.exponential(0.02 + 0.3 * gain)

    calibration = uncertainty.calibrate(*draw(4000))
    gain, regret = draw(4000)
    expected, bound = uncertainty.predict(calibration, gain)
    for rows in np.array_split(np.argsort(expected), 5):
        assert expected[rows].mean() == pytest.approx(regret[rows].mean(), rel=0.12)
    assert (regret <= bound).mean() == pytest.approx(0.9, abs=0.02)
    assert (expected >= gain).all()


def test_a_few_patients_are_one_bin():
    calibration = uncertainty.calibrate(np.array([0.0, 0.2]), np.array([0.1, 0.5]))
    np.testing.assert_allclose(calibration, [[0.1], [0.2], [0.3]])
    expected, bound = uncertainty.predict(calibration, np.array([0.0, 1.0]))
    np.testing.assert_allclose([*expected, *bound], [0.2, 1.2, 0.3, 1.3])


def test_rank_correlation_and_share_of_the_flagged_by_hand():
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4.
    found = uncertainty.rank_correlation(np.array([0.0, 3, 3, 9]), np.array([1.0, 7, 5, 8]))
    assert found == pytest.approx(4.5 / np.sqrt(4.5 * 5.0))
    assert uncertainty.rank_correlation(np.zeros(3), np.arange(3.0)) == 0.0
    share = uncertainty.share_of_regret(np.array([3.0, 1, 2, 0, 0]), np.array([4.0, 3, 2, 1, 0]))
    assert share == 0.4


def test_nothing_is_calibrated_without_an_oracle_or_a_problem(evaluated):
    foreign = EvaluationSet(SimpleNamespace(unwrapped=SimpleNamespace()), evaluated.best_score)
    for each in (evaluated._replace(best_score=None), foreign):
        assert uncertainty.calibrate_policy(None, {"train": each}) == (None, {})
