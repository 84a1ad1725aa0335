from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hydrogel_gym.problem.fields import Outcomes
from hydrogel_gym.problem.reward import (
    SAFETY_LIMITS,
    RewardConfig,
    breaches,
    compute_reward,
    is_optimal,
    reward_terms,
    safety_margins,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def one_outcome(dtype=torch.float64, **changes: float) -> Outcomes:
    values = {
        "delta_ef_pct": 4.0,
        "stress_reduction_pct": 20.0,
        "optimal_logit": 0.0,
        "toxicity_risk": 0.1,
        "structural_integrity": 0.9,
        "fibrosis_risk": 0.1,
    } | changes
    return Outcomes(**{name: torch.tensor([x], dtype=dtype) for name, x in values.items()})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "3", None])
def test_config_refuses_what_is_not_a_finite_number(value):
    with pytest.raises(
        ValueError, match=rf"RewardConfig.toxicity_limit is '?{value}'?; allowed: a finite number"
    ):
        RewardConfig(toxicity_limit=value)


def test_config_takes_numpy_numbers_and_cannot_be_reassigned():
    config = RewardConfig(novelty_bonus=np.float32(0.25))
    assert config.novelty_bonus == 0.25
    with pytest.raises(AttributeError, match="cannot assign to field 'novelty_bonus'"):
        config.novelty_bonus = 1.0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 3 * 100 + 1.5 + 1 + 0.1),
        ({"delta_ef_weight": -2.0, "optimal_prob_weight": -5.0}, 2 * 100 + 1.5 + 0.1),
        ({"toxicity_penalty": -4.0, "novelty_bonus": -1.0}, 3 * 100 + 1.5 + 1 + 4),
    ],
    ids=["default", "negative weights", "negative penalty"],
)
def test_max_score_is_the_best_that_outcomes_in_range_can_score(changes, expected):
    assert RewardConfig(**changes).max_score == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "is_novel", "expected"),
    [
        ({}, False, [12.0, 0.3, 0.5, 0.0, 0.0, 0.0, 0.0]),
        ({}, True, [12.0, 0.3, 0.5, 0.0, 0.0, 0.0, 0.1]),
        ({"delta_ef_pct": -2.0}, False, [-6.0, 0.3, 0.5, 0.0, 0.0, 0.0, 0.0]),
        ({"stress_reduction_pct": -40.0}, False, [12.0, -0.6, 0.5, 0.0, 0.0, 0.0, 0.0]),
        ({"optimal_logit": 1.0986122886681098}, False, [12.0, 0.3, 0.75, 0.0, 0.0, 0.0, 0.0]),
        ({"toxicity_risk": 0.2}, False, [12.0, 0.3, 0.5, -2.0, 0.0, 0.0, 0.0]),
        ({"structural_integrity": 0.7}, False, [12.0, 0.3, 0.5, 0.0, -1.0, 0.0, 0.0]),
        ({"fibrosis_risk": 0.3}, False, [12.0, 0.3, 0.5, 0.0, 0.0, -0.5, 0.0]),
    ],
    ids=["none", "novel", "harm", "stress", "logit 3 to 1", "toxic", "weak", "fibrotic"],
)
def test_reward_is_the_sum_of_the_terms_of_the_source(changes, is_novel, expected):
    outcomes = one_outcome(**changes)
    terms = [term.item() for term in reward_terms(outcomes, is_novel)]
    assert terms == pytest.approx(expected)
    assert compute_reward(outcomes, is_novel).item() == pytest.approx(sum(expected))
    if is_novel:
        assert compute_reward(outcomes).item() == pytest.approx(sum(expected))


@DTYPES
@pytest.mark.parametrize(
    ("name", "field", "limit", "worse", "penalty"),
    [
        ("toxicity", "toxicity_risk", 0.15, 1.0, 2.0),
        ("integrity", "structural_integrity", 0.80, 0.0, 1.0),
        ("fibrosis", "fibrosis_risk", 0.20, 1.0, 0.5),
    ],
)
def test_penalty_begins_just_beyond_its_limit(dtype, name, field, limit, worse, penalty):
    config, at_limit = RewardConfig(), one_outcome(dtype, **{field: limit})
    step = torch.nextafter(getattr(at_limit, field), torch.tensor(worse, dtype=dtype))
    beyond = at_limit._replace(**{field: step})
    lost = compute_reward(at_limit) - compute_reward(beyond)
    assert lost.item() == pytest.approx(penalty)
    assert compute_reward(at_limit).item() == pytest.approx(compute_reward(one_outcome()).item())
    assert not any(breaches(at_limit, config).values())
    assert [key for key, value in breaches(beyond, config).items() if value] == [name]


def test_margins_are_the_distance_to_each_limit_and_negative_beyond_it():
    config = RewardConfig()
    safe = safety_margins(one_outcome(), config)
    assert [key.removesuffix("_margin") for key in safe] == list(SAFETY_LIMITS)
    assert [value.item() for value in safe.values()] == pytest.approx([0.05, 0.1, 0.1])
    unsafe = one_outcome(toxicity_risk=0.4, structural_integrity=0.5, fibrosis_risk=0.6)
    margins = [value.item() for value in safety_margins(unsafe, config).values()]
    assert margins == pytest.approx([-0.25, -0.3, -0.4])


@pytest.mark.parametrize(
    ("delta_ef_pct", "stress_reduction_pct", "expected"),
    [(3.0, 15.0, True), (2.99, 15.0, False), (3.0, 14.99, False), (2.99, 14.99, False)],
)
def test_design_is_optimal_from_its_two_thresholds_on(delta_ef_pct, stress_reduction_pct, expected):
    outcomes = one_outcome(delta_ef_pct=delta_ef_pct, stress_reduction_pct=stress_reduction_pct)
    assert is_optimal(outcomes, RewardConfig()).item() == expected


@DTYPES
def test_reward_keeps_batch_shape_and_dtype_and_takes_novelty_per_design(dtype):
    outcomes = Outcomes(*(value.expand(2, 3) for value in one_outcome(dtype)))
    is_novel = torch.tensor([True, False, True])
    reward = compute_reward(outcomes, is_novel, RewardConfig(novelty_bonus=1.0))
    assert (reward.shape, reward.dtype) == ((2, 3), dtype)
    torch.testing.assert_close(reward, 12.8 + is_novel.to(dtype).expand(2, 3))


def test_stricter_reward_moves_limits_to_the_safe_side_and_multiplies_penalties():
    config = RewardConfig(toxicity_limit=0.2, toxicity_penalty=3.0, novelty_bonus=0.3)
    strict = config.stricter(margin=0.05, penalty_scale=4.0)
    assert [strict.limit(name) for name in SAFETY_LIMITS] == pytest.approx([0.15, 0.85, 0.15])
    assert [strict.penalty(name) for name in SAFETY_LIMITS] == pytest.approx([12.0, 4.0, 2.0])
    changed = [f"{name}_{part}" for name in SAFETY_LIMITS for part in ("limit", "penalty")]
    assert replace(strict, **{name: getattr(config, name) for name in changed}) == config
    assert config.stricter() == config
