from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hydrogel_gym import RewardConfig, compute_reward, load_cohort
from hydrogel_gym.envs.spaces import action_space
from hydrogel_gym.models.mechanistic import MechanisticModel
from hydrogel_gym.problem.dynamics import (
    EnvParams,
    State,
    clip_formulation,
    draw_patient_index,
    explored_polymers,
    initial,
    next_episode,
    observation,
    select,
    transition,
)
from hydrogel_gym.problem.fields import Design, Outcomes
from hydrogel_gym.problem.reward import reward_terms

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
MASK_64 = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


@pytest.fixture
def params(three_patients) -> EnvParams:
    return EnvParams(three_patients.features.float(), horizon=3)


def designs(*rows: tuple[int, float, float, int]) -> Design:
    """Designs of (polymer_id, conductivity, thickness, coverage), as the toy model reads them."""
    polymer_id, conductivity, thickness, coverage = zip(*rows, strict=True)
    formulation = torch.tensor([20.0, 30.0, 0.0, 0.0]).repeat(len(rows), 1)
    formulation[:, 2], formulation[:, 3] = torch.tensor(conductivity), torch.tensor(thickness)
    return Design(torch.tensor(polymer_id), formulation, torch.tensor(coverage))


def random_designs(num: int, seed: int) -> Design:
    space = action_space("dict")
    space.seed(seed)
    samples = [space.sample() for _ in range(num)]
    return Design(*(torch.tensor(np.stack([s[head] for s in samples])) for head in Design._fields))


def eight_environments() -> tuple[State, EnvParams]:
    """Eight environments of the shipped cohort in the middle of unlike episodes."""
    params = EnvParams(
        load_cohort().features.float(),
        horizon=4,
        patient_assignment="random",
        observe_explored=True,
    )
    state = initial(torch.arange(8), params)
    for seed in range(2):
        stepped = transition(state, random_designs(8, seed), params, MechanisticModel()).state
        state = select(torch.arange(8) % (seed + 2) == 0, stepped, state)
    assert sorted(set(state.iteration.tolist())) == [0, 1, 2]
    return state, params


def rows(index, *tuples):
    """The given rows of every tensor of some (nested) tuples."""
    return [
        type(value)(*rows(index, *value)) if isinstance(value, tuple) else value[index]
        for value in tuples
    ]


def leaves(value):
    return [x for item in value for x in leaves(item)] if isinstance(value, tuple) else [value]


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
def test_reward_config_refuses_what_is_not_a_finite_number(value):
    with pytest.raises(
        ValueError, match=rf"RewardConfig.toxicity_limit is '?{value}'?; allowed: a finite number"
    ):
        RewardConfig(toxicity_limit=value)


def test_reward_is_by_default_that_of_the_source():
    assert RewardConfig() == RewardConfig(
        delta_ef_weight=3.0,
        stress_reduction_weight=1.5,
        optimal_prob_weight=1.0,
        toxicity_limit=0.15,
        toxicity_penalty=2.0,
        integrity_limit=0.80,
        integrity_penalty=1.0,
        fibrosis_limit=0.20,
        fibrosis_penalty=0.5,
        novelty_bonus=0.1,
        optimal_delta_ef_pct=3.0,
        optimal_stress_reduction_pct=15.0,
    )


def test_problem_is_by_default_one_design_for_a_fixed_patient_paid_by_its_score(three_patients):
    params = EnvParams(three_patients.features)
    assert (params.horizon, params.reward_mode) == (1, "score")
    assert (params.patient_assignment, params.observe_explored) == ("fixed", False)


def test_reward_config_takes_numpy_numbers_and_cannot_be_reassigned():
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


@DTYPES
@pytest.mark.parametrize(
    ("field", "limit", "worse", "penalty"),
    [
        ("toxicity_risk", 0.15, 1.0, 2.0),
        ("structural_integrity", 0.80, 0.0, 1.0),
        ("fibrosis_risk", 0.20, 1.0, 0.5),
    ],
)
def test_penalty_begins_just_beyond_its_limit(dtype, field, limit, worse, penalty):
    at_limit = one_outcome(dtype, **{field: limit})
    beyond = torch.nextafter(getattr(at_limit, field), torch.tensor(worse, dtype=dtype))
    lost = compute_reward(at_limit) - compute_reward(at_limit._replace(**{field: beyond}))
    assert lost.item() == pytest.approx(penalty)
    assert compute_reward(at_limit).item() == pytest.approx(compute_reward(one_outcome()).item())


@DTYPES
def test_reward_keeps_batch_shape_and_dtype_and_takes_novelty_per_design(dtype):
    outcomes = Outcomes(*(value.expand(2, 3) for value in one_outcome(dtype)))
    is_novel = torch.tensor([True, False, True])
    reward = compute_reward(outcomes, is_novel, RewardConfig(novelty_bonus=1.0))
    assert (reward.shape, reward.dtype) == ((2, 3), dtype)
    torch.testing.assert_close(reward, 12.8 + is_novel.to(dtype).expand(2, 3))


def splitmix64_finaliser(x: int) -> int:
    """As published, on unsigned integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK_64
    return x ^ (x >> 31)


def test_draws_follow_splitmix64_in_unsigned_arithmetic():
    # First output of the published generator from seed 0.
    assert splitmix64_finaliser(GAMMA) == 0xE220A8397B1DCDAF
    keys = [0, 1, 2, 12345, 2**31, 2**62 + 7, 2**63 - 1]
    for num_patients in (1, 3, 2000):
        for episode in (0, 1, 2, 99, 2**40):
            drawn = draw_patient_index(
                torch.tensor(keys), torch.full((len(keys),), episode), num_patients
            )
            stream = [splitmix64_finaliser((key + GAMMA) & MASK_64) for key in keys]
            words = [splitmix64_finaliser((s + episode * GAMMA) & MASK_64) for s in stream]
            assert drawn.tolist() == [(word & (2**63 - 1)) % num_patients for word in words]


@pytest.mark.parametrize("vary", ["seed", "episode"])
def test_draws_are_uniform_over_neighbouring_seeds_and_over_episodes(vary):
    counter, constant = torch.arange(60_000), torch.full((60_000,), 7)
    seed, episode = (counter, constant) if vary == "seed" else (constant, counter)
    counts = torch.bincount(draw_patient_index(seed, episode, 30), minlength=30)
    chi_square = ((counts - 2000.0) ** 2 / 2000.0).sum()
    # 99.9th and 0.1st percentile of chi-square with 29 degrees of freedom.
    assert 9.8 < chi_square < 58.3


def test_fixed_assignment_is_the_row_number_modulo_the_patients(params):
    state = initial(torch.arange(7), params)
    assert state.patient_index.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert next_episode(state, params).patient_index.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_random_assignment_depends_on_seed_and_episode_alone(params):
    params = replace(params, patient_assignment="random")
    seeds = torch.arange(100)
    state = initial(seeds, params)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(initial(seeds[order], params).patient_index, state.patient_index[order])
    following = next_episode(state, params)
    assert torch.equal(
        following.patient_index, draw_patient_index(seeds, torch.ones(100).long(), 3)
    )
    assert not torch.equal(following.patient_index, state.patient_index)


def test_episode_begins_with_the_patient_and_nothing_tried(params):
    params = replace(params, observe_explored=True)
    obs = observation(initial(torch.arange(4), params), params)
    assert (obs.shape, obs.dtype) == ((4, 37), torch.float32)
    assert torch.equal(obs[:, :11], params.patients[[0, 1, 2, 0]])
    assert (obs[:, 11:] == 0.0).all()


def test_transition_of_three_designs_worked_out_by_hand(params, toy_model):
    state = initial(torch.arange(3), params)
    # Ann's is safe, Bo's toxic and fibrotic, Cy's weak and fibrotic.
    result = transition(
        state, designs((4, 0.1, 5.0, 1), (2, 0.5, 5.0, 0), (0, 0.1, 1.0, 3)), params, toy_model
    )
    scores = torch.tensor([12.9, 4.1, 0.0])
    torch.testing.assert_close(result.score, scores)
    assert result.is_optimal.tolist() == [True, False, False]
    assert result.state.iteration.tolist() == [1, 1, 1]
    assert explored_polymers(result.state).nonzero().tolist() == [[0, 4], [1, 2], [2, 0]]
    obs = observation(result.state, params)
    torch.testing.assert_close(obs[:, 11], scores)
    assert obs[:, 12].tolist() == [1.0, 1.0, 1.0]


def test_design_is_optimal_from_its_two_thresholds_on(params, toy_model):
    params = replace(params, reward_config=RewardConfig(optimal_stress_reduction_pct=20.0))
    design = designs((3, 0.0, 5.0, 1), (2, 0.0, 5.0, 3), (9, 0.0, 5.0, 0))
    result = transition(initial(torch.arange(3), params), design, params, toy_model)
    assert result.is_optimal.tolist() == [True, False, False]


def test_negative_scores_leave_the_best_score_at_zero(params, toy_model):
    params = replace(params, reward_config=RewardConfig(delta_ef_weight=-3.0))
    result = transition(
        initial(torch.tensor([0]), params), designs((9, 0, 5, 0)), params, toy_model
    )
    assert result.reward.item() == pytest.approx(-27 + 0.5 + 0.1)
    assert result.state.best_score.item() == 0.0


def test_novelty_is_paid_for_the_first_use_of_each_polymer_in_an_episode(params, toy_model):
    state, paid = initial(torch.tensor([0]), params), []
    for polymer_id in (5, 5, 6, 5):
        result = transition(state, designs((polymer_id, 0.0, 5.0, 0)), params, toy_model)
        state = result.state
        paid.append(round(result.terms.reward_novelty.item(), 6))
    assert paid == [0.1, 0.0, 0.1, 0.0]
    again = transition(next_episode(state, params), designs((5, 0, 5, 0)), params, toy_model)
    assert again.terms.reward_novelty.item() == pytest.approx(0.1)


def test_observed_mask_marks_the_polymers_used_in_the_episode(params, toy_model):
    params = replace(params, observe_explored=True)
    state = initial(torch.tensor([0]), params)
    for polymer_id in (5, 23, 5):
        state = transition(state, designs((polymer_id, 0, 5, 0)), params, toy_model).state
    assert observation(state, params)[0, 13:].nonzero().flatten().tolist() == [5, 23]
    assert (observation(next_episode(state, params), params)[0, 11:] == 0.0).all()


def test_episode_terminates_on_the_step_of_its_horizon(params, toy_model):
    state, ends = initial(torch.tensor([0]), params), []
    for _ in range(3):
        result = transition(state, designs((1, 0.0, 5.0, 0)), params, toy_model)
        state = result.state
        ends.append(result.terminated.item())
    assert ends == [False, False, True]


@pytest.mark.parametrize(
    ("weight", "best"), [(3.0, 3 * 7 + 0.6), (-3.0, 0.0)], ids=["gain", "all negative"]
)
def test_improvement_rewards_add_up_to_the_best_score(params, toy_model, weight, best):
    config = RewardConfig(delta_ef_weight=weight)
    params = replace(params, reward_mode="improvement", reward_config=config)
    state, rewards = initial(torch.tensor([0]), params), []
    for polymer_id in (2, 7, 4):
        result = transition(state, designs((polymer_id, 0.0, 5.0, 0)), params, toy_model)
        state = result.state
        rewards.append(result.reward.item())
    assert sum(rewards) == pytest.approx(best)
    assert rewards[2] == 0.0
    assert state.best_score.item() == pytest.approx(best)


def test_formulation_outside_its_box_is_clipped_and_flagged(params, toy_model):
    low, high = [5.0, 7.0, 0.0, 1.0], [30.0, 180.0, 1.0, 5.0]
    formulation = torch.tensor([low, high, [-1e30] * 4, [1e30] * 4, [20.0, 30.0, 1.0, 5.1]])
    assert clip_formulation(formulation).tolist() == [low, high, low, high, [20.0, 30.0, 1.0, 5.0]]
    index = torch.zeros(5, dtype=torch.long)
    result = transition(
        initial(torch.arange(5), params), Design(index, formulation, index), params, toy_model
    )
    assert result.formulation_clipped.tolist() == [False, False, True, True, True]
    assert torch.equal(result.formulation, clip_formulation(formulation))


def test_batch_of_eight_equals_eight_batches_of_one():
    (state, params), design, model = eight_environments(), random_designs(8, 5), MechanisticModel()
    batch = transition(state, design, params, model)
    for i in range(8):
        alone = transition(*rows(slice(i, i + 1), state, design), params, model)
        for one, all_of_them in zip(leaves(alone), leaves(batch), strict=True):
            torch.testing.assert_close(one, all_of_them[i : i + 1])


def test_permuting_rows_permutes_results():
    (state, params), design, model = eight_environments(), random_designs(8, 5), MechanisticModel()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    permuted = transition(*rows(order, state, design), params, model)
    for there, here in zip(
        leaves(permuted), leaves(transition(state, design, params, model)), strict=True
    ):
        torch.testing.assert_close(there, here[order])


def test_select_takes_masked_rows_and_leaves_the_others_bit_equal():
    state, params = eight_environments()
    mask = torch.arange(8) == 3
    chosen = select(mask, next_episode(state, params), state)
    for new, old, fresh in zip(chosen, state, next_episode(state, params), strict=True):
        assert torch.equal(new[~mask], old[~mask])
        assert torch.equal(new[mask], fresh[mask])


def test_transition_writes_into_none_of_its_arguments():
    state, params = eight_environments()
    design = random_designs(8, 5)
    arguments = [*state, *design, params.patients]
    before = [value.clone() for value in arguments]
    transition(state, design, params, MechanisticModel())
    assert all(map(torch.equal, arguments, before))


def episode_step(state, design, params, model):
    result = transition(state, design, params, model)
    state = select(result.terminated, next_episode(result.state, params), result.state)
    return result, state, observation(state, params)


@pytest.mark.slow
def test_step_compiles_to_one_graph_that_equals_eager():
    (state, params), design, model = eight_environments(), random_designs(8, 5), MechanisticModel()
    compiled = torch.compile(episode_step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for there, here in zip(
            leaves(compiled(state, design, params, model)),
            leaves(episode_step(state, design, params, model)),
            strict=True,
        ):
            torch.testing.assert_close(there, here)


def test_step_on_a_device_equals_the_step_on_the_cpu(device):
    (state, params), design, model = eight_environments(), random_designs(8, 5), MechanisticModel()
    here = episode_step(state, design, params, model)
    moved = [type(value)(*(x.to(device) for x in value)) for value in (state, design)]
    moved_params = replace(params, patients=params.patients.to(device))
    there = episode_step(*moved, moved_params, model.to(device))
    for one, other in zip(leaves(here), leaves(there), strict=True):
        assert other.device.type == device
        torch.testing.assert_close(other.cpu(), one, rtol=1e-4, atol=1e-4)


def test_step_reads_nothing_on_the_host():
    """On the meta device a tensor has no values, so that any read raises."""
    (state, params), design, model = eight_environments(), random_designs(8, 5), MechanisticModel()
    moved = [type(value)(*(x.to("meta") for x in value)) for value in (state, design)]
    moved_params = replace(params, patients=params.patients.to("meta"))
    there = leaves(episode_step(*moved, moved_params, model.to("meta")))
    here = leaves(episode_step(state, design, params, MechanisticModel()))
    assert all(value.is_meta for value in there)
    assert [(v.shape, v.dtype) for v in there] == [(v.shape, v.dtype) for v in here]


def test_stricter_reward_moves_limits_to_the_safe_side_and_multiplies_penalties():
    config = RewardConfig(toxicity_limit=0.2, toxicity_penalty=3.0, novelty_bonus=0.3)
    strict = config.stricter(margin=0.05, penalty_scale=4.0)
    assert strict.toxicity_limit == pytest.approx(0.15)
    assert strict.integrity_limit == pytest.approx(0.85)
    assert strict.fibrosis_limit == pytest.approx(0.15)
    penalties = (strict.toxicity_penalty, strict.integrity_penalty, strict.fibrosis_penalty)
    assert penalties == pytest.approx((12.0, 4.0, 2.0))
    kinds = ("toxicity", "integrity", "fibrosis")
    changed = [f"{kind}_{part}" for kind in kinds for part in ("limit", "penalty")]
    assert replace(strict, **{name: getattr(config, name) for name in changed}) == config
    assert config.stricter() == config
