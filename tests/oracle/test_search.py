"""The yardstick: it finds the optimum, and says how sure it is."""

from __future__ import annotations

import gymnasium as gym
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
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.problem.fields import (
    COVERAGES,
    FORMULATION_FIELDS,
    FORMULATION_HIGH,
    FORMULATION_LOW,
)

TOLERANCE = 0.02  # of a reward: what two searches may differ by
LOW, HIGH = torch.from_numpy(FORMULATION_LOW), torch.from_numpy(FORMULATION_HIGH)


def some_patients(count: int) -> Cohort:
    cohort = load_cohort("holdout")
    return Cohort(cohort.patient_ids[:count], cohort.features[:count], cohort.extra[:count], "some")


@pytest.fixture(scope="module")
def cohort():
    return some_patients(5)


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


def test_safety_limit_is_kept_closely_or_broken_where_the_gain_outweighs_the_penalty(
    three_patients,
):
    config = RewardConfig(toxicity_penalty=5.0)  # a gain of 1 point is worth 3
    found = best_designs(three_patients, cliff_model, config)
    shortfall = config.toxicity_limit - found.outcomes.toxicity_risk
    assert (shortfall > 0).all()
    assert (shortfall < 1e-3).all()
    found = best_designs(three_patients, cliff_model, RewardConfig(toxicity_penalty=1.0))
    torch.testing.assert_close(found.outcomes.toxicity_risk, torch.ones(3))


def test_another_seed_or_fewer_patients_at_once_find_the_same_scores(
    cohort, best, mechanistic, monkeypatch
):
    monkeypatch.setattr(oracle.best, "PATIENTS_AT_ONCE", 3)
    sizes = []

    def watching(*arguments):
        outcomes = mechanistic(*arguments)
        sizes.append(outcomes.delta_ef_pct.numel())
        return outcomes

    other = best_designs(cohort, watching, seed=7)
    assert max(sizes) == 3 * 96 * oracle.search.NUM_SOBOL
    assert not torch.equal(other.design.formulation, best.design.formulation)
    assert (other.score - best.score).abs().max() <= TOLERANCE
    assert best.seed_gap.min() >= 0.0
    assert best.seed_gap.max() <= TOLERANCE


@pytest.mark.slow
def test_two_searches_agree_for_nearly_every_patient():
    assert (best_designs(some_patients(100)).seed_gap <= TOLERANCE).float().mean() >= 0.99


def test_same_seed_finds_the_same_on_the_device_asked_for(cohort, best, device):
    again = best_designs(cohort, device=device)
    assert again.score.device.type == "cpu"
    torch.testing.assert_close(again.score, best.score, rtol=0, atol=TOLERANCE)
    if device == "cpu":
        assert all(map(torch.equal, again.design, best.design))
        assert torch.equal(again.seed_gap, best.seed_gap)


def test_random_designs_anywhere_or_near_the_best_never_beat_the_oracle(cohort, best, mechanistic):
    generator = torch.Generator().manual_seed(3)
    size = (len(cohort), 20_000)
    widths = 10.0 ** -torch.linspace(0.5, 4.0, size[1])[:, None] * (HIGH - LOW)
    noise = torch.randn(*size, 4, generator=generator) * widths
    for polymer_id, coverage, formulation in (
        (
            torch.randint(24, size, generator=generator),
            torch.randint(4, size, generator=generator),
            torch.lerp(LOW, HIGH, torch.rand(*size, 4, generator=generator)),
        ),
        (
            best.design.polymer_id[:, None].expand(size),
            best.design.coverage[:, None].expand(size),
            (best.design.formulation[:, None] + noise).clamp(LOW, HIGH),
        ),
    ):
        patients = cohort.features.float()[:, None]
        reward = compute_reward(mechanistic(patients, polymer_id, formulation, coverage))
        assert (reward.amax(1) <= best.score + TOLERANCE).all()


@pytest.mark.slow
def test_differential_evolution_of_scipy_finds_nothing_better(cohort, best, mechanistic):
    optimize = pytest.importorskip("scipy.optimize")
    bounds = [(0, 23), (0, 3), *((f.low, f.high) for f in FORMULATION_FIELDS)]
    settings = dict(popsize=100, maxiter=300, vectorized=True, updating="deferred", polish=False)
    settings["integrality"] = [True, True, False, False, False, False]
    for row, patient in enumerate(cohort.features.float()):

        def loss(x, patient=patient):
            x = torch.tensor(x.T, dtype=torch.float32)
            polymer_id, coverage = x[:, 0].round().long(), x[:, 1].round().long()
            return -compute_reward(mechanistic(patient, polymer_id, x[:, 2:], coverage)).numpy()

        result = optimize.differential_evolution(loss, bounds, rng=row, **settings)
        assert -result.fun <= best.score[row] + TOLERANCE


def test_table_names_designs_in_the_box_with_the_reward_that_the_environment_pays(cohort, best):
    assert (best.design.formulation >= LOW).all()
    assert (best.design.formulation <= HIGH).all()
    assert (best.design.formulation[:, 2] == 0.0).any()  # an end of the range is reached
    envs = gym.make_vec("HydrogelDesign-v0", len(cohort), cohort=cohort, output="torch")
    envs.reset(seed=0)
    reward = envs.step(best.design._asdict())[1]
    torch.testing.assert_close(reward.float(), best.score, rtol=1e-6, atol=1e-5)
    table = best.to_frame()
    assert table["patient_id"].tolist() == list(cohort.patient_ids)
    names = load_polymers().names
    assert table["polymer_name"].tolist() == [names[i] for i in best.design.polymer_id]
    assert table["coverage"].tolist() == [COVERAGES[i] for i in best.design.coverage]
    formulation = table[[f.name for f in FORMULATION_FIELDS]].to_numpy()
    assert formulation == pytest.approx(best.design.formulation.numpy())
    assert table["reward"].to_numpy() == pytest.approx(best.score.numpy())
    assert table["reward_seed_gap"].to_numpy() == pytest.approx(best.seed_gap.numpy())


def test_search_calls_the_model_as_often_as_stated_with_one_batch_dimension(three_patients):
    shapes = []

    def watching(*arguments):
        shapes.append([tuple(x.shape) for x in arguments])
        return peaked_model(*arguments)

    oracle.search.search(three_patients.features.float(), watching, RewardConfig(), seed=0)
    sizes = [patient[0] for patient, *_ in shapes]
    assert sum(sizes) == 3 * oracle.search.CALLS_PER_SEARCH
    assert shapes == [[(size, 11), (size,), (size, 4), (size,)] for size in sizes]


def test_empty_cohort_and_model_that_cannot_be_loaded_are_refused(three_patients):
    with pytest.raises(ValueError, match="cohort 'some' has no patients"):
        best_designs(some_patients(0))
    with pytest.raises(ValueError, match="'nonsense'"):
        best_designs(three_patients, "nonsense")


@pytest.mark.parametrize("field", ["delta_ef_pct", "optimal_logit", "fibrosis_risk"])
def test_outcome_that_is_not_a_number_stops_with_patient_and_design(
    three_patients, toy_model, short_search, field
):
    bo = three_patients.features[1].float()

    def model(patient, polymer_id, formulation, coverage):
        outcomes = toy_model(patient, polymer_id, formulation, coverage)
        bad = (patient == bo).all(-1) & (polymer_id == 9)
        value = torch.where(bad, torch.nan, getattr(outcomes, field))
        return outcomes._replace(**{field: value})

    with pytest.raises(ValueError, match=rf"'{field}': nan.* patient 'bo' .*polymer_id=9"):
        best_designs(three_patients, model)
