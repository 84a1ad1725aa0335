from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map

from hydrogel_gym import RewardConfig, load_cohort
from hydrogel_gym.models.mechanistic import MechanisticModel
from hydrogel_gym.problem.dynamics import (
    INFO_FLAGS,
    INFO_SCALARS,
    STEP_ROWS,
    clip_formulation,
    draw_patient_index,
    explored_polymers,
    final,
    initial,
    next_episode,
    observation,
    select,
    stack_rows,
    step,
    transition,
)
from hydrogel_gym.problem.fields import COVERAGES, FORMULATION_FIELDS, Design, formulation_at
from hydrogel_gym.problem.polymers import NUM_POLYMERS
from hydrogel_gym.problem.state import EnvParams, State

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
    rng = torch.Generator().manual_seed(seed)
    shares = torch.rand(len(FORMULATION_FIELDS), num, generator=rng)
    return Design(
        torch.randint(NUM_POLYMERS, (num,), generator=rng),
        formulation_at(shares),
        torch.randint(len(COVERAGES), (num,), generator=rng),
    )


@pytest.fixture(scope="module")
def eight_environments() -> tuple[State, Design, EnvParams]:
    """Eight environments in the middle of unlike episodes, with a design each; to be read only."""
    params = EnvParams(
        load_cohort("holdout").features.float(),
        horizon=2,
        patient_assignment="random",
        observe_explored=True,
    )
    state = initial(torch.arange(8), params)
    for seed in range(2):
        stepped = transition(state, random_designs(8, seed), params, MechanisticModel()).state
        state = select(torch.arange(8) % (seed + 2) == 0, stepped, state)
    assert sorted(set(state.iteration.tolist())) == [0, 1, 2]
    return state, random_designs(8, 5), params


def rows(index, value):
    """The given rows of every tensor of nested tuples."""
    return tree_map(lambda x: x[index], value)


def test_problem_is_by_default_one_design_for_a_fixed_patient_paid_by_its_score(three_patients):
    params = EnvParams(three_patients.features)
    assert (params.num_patients, params.horizon, params.reward_mode) == (3, 1, "score")
    assert (params.patient_assignment, params.observe_explored) == ("fixed", False)
    with pytest.raises(AttributeError, match="cannot assign to field 'horizon'"):
        params.horizon = 2
    assert params != replace(params)  # a comparison of tensors would have no truth value


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
    assert (obs.shape, obs.dtype) == ((4, 13 + NUM_POLYMERS), torch.float32)
    assert torch.equal(obs[:, :11], params.patients[[0, 1, 2, 0]])
    assert (obs[:, 11:] == 0.0).all()


def test_transition_of_three_designs_worked_out_by_hand(params, toy_model):
    # Ann's is safe, Bo's toxic and fibrotic, Cy's weak and fibrotic.
    design = designs((4, 0.1, 5.0, 1), (2, 0.5, 5.0, 0), (0, 0.1, 1.0, 3))
    result = transition(initial(torch.arange(3), params), design, params, toy_model)
    scores = torch.tensor([12.9, 4.1, 0.0])
    assert_close(result.score, scores)
    assert torch.equal(result.reward, result.score)
    assert result.is_optimal.tolist() == [True, False, False]
    assert result.state.iteration.tolist() == [1, 1, 1]
    assert explored_polymers(result.state).nonzero().tolist() == [[0, 4], [1, 2], [2, 0]]
    obs = observation(result.state, params)
    assert obs.shape == (3, 13)
    assert_close(obs[:, 11], scores)
    assert obs[:, 12].tolist() == [1.0, 1.0, 1.0]


def test_episode_pays_novelty_once_a_polymer_marks_it_and_ends_at_its_horizon(params, toy_model):
    params = replace(params, observe_explored=True)
    state, trace = initial(torch.tensor([0]), params), []
    for polymer_id in (5, 23, 5):
        result = transition(state, designs((polymer_id, 0.0, 5.0, 0)), params, toy_model)
        state, paid = result.state, round(result.terms.reward_novelty.item(), 6)
        marked = observation(state, params)[0, 13:].nonzero().flatten().tolist()
        trace.append((paid, marked, result.terminated.item()))
    assert trace == [(0.1, [5], False), (0.1, [5, 23], False), (0.0, [5, 23], True)]
    fresh = next_episode(state, params)
    assert (observation(fresh, params)[0, 11:] == 0.0).all()
    again = transition(fresh, designs((5, 0.0, 5.0, 0)), params, toy_model)
    assert again.terms.reward_novelty.item() == pytest.approx(0.1)


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
    assert clip_formulation(formulation[2]).tolist() == low
    with pytest.raises(ValueError, match="zip"):
        clip_formulation(formulation[:, :3])
    index = torch.zeros(5, dtype=torch.long)
    result = transition(
        initial(torch.arange(5), params), Design(index, formulation, index), params, toy_model
    )
    assert result.formulation_clipped.tolist() == [False, False, True, True, True]
    assert torch.equal(result.formulation, clip_formulation(formulation))


def test_row_of_a_batch_depends_on_that_row_alone(eight_environments):
    (state, design, params), model = eight_environments, MechanisticModel()
    batch = transition(state, design, params, model)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    for index in (order, *(slice(i, i + 1) for i in range(8))):
        some = transition(*rows(index, (state, design)), params, model)
        assert_close(some, rows(index, batch))


def test_select_takes_masked_rows_and_leaves_the_others_bit_equal(eight_environments):
    state, _, params = eight_environments
    mask = torch.arange(8) == 3
    chosen = select(mask, next_episode(state, params), state)
    for new, old, fresh in zip(
        *map(tree_leaves, (chosen, state, next_episode(state, params))), strict=True
    ):
        assert torch.equal(new[~mask], old[~mask])
        assert torch.equal(new[mask], fresh[mask])


@pytest.mark.parametrize(
    ("mode", "begun", "ended"),
    [
        ("SameStep", [True, False, True], [True, False, True]),
        ("NextStep", [False, False, True], [True, False, False]),
        ("Disabled", [False, False, False], [True, False, True]),
    ],
)
@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_step_reports_what_ends_apart_from_what_begins(eight_environments, end, mode, begun, ended):
    state, _, params = eight_environments
    if end == "truncated":
        params = replace(params, horizon=99, max_episode_steps=2)
    # One goes into its last step, one into its first, one has ended before.
    order = [state.iteration.tolist().index(i) for i in (1, 0, 2)]
    state = rows(order, state)
    design = random_designs(3, 7)
    design.formulation[:2, 3] = 9.0
    begun, ended = torch.tensor(begun), torch.tensor(ended)
    result = transition(state, design, params, MechanisticModel())
    done = torch.tensor([False, False, True])
    got, names = step(state, done, design, params, MechanisticModel(), mode), STEP_ROWS[mode]
    after = select(begun, next_episode(result.state, params), result.state)
    assert_close(got.state, after, rtol=0, atol=0)
    assert torch.equal(got.obs, observation(after, params))
    if mode == "SameStep":
        assert torch.equal(got.final_obs, observation(result.state, params))
    else:
        assert got.final_obs is None
    assert got.defect.tolist() == [0.0, 0.0, 0.0]

    given = result._asdict() | result.outcomes._asdict() | result.terms._asdict()
    given["patient_index"] = result.state.patient_index
    expected = {"always": torch.ones(3), "stepped": ~begun}
    expected |= dict.fromkeys(("terminated", "truncated"), torch.zeros(3)) | {"done": ended}
    expected[end] = ended
    expected["reward"] = result.reward.where(~begun | (mode == "SameStep"), 0.0)
    for name in (*INFO_SCALARS, *INFO_FLAGS, "formulation", "patient_index"):
        mask = begun.view(3, *[1] * (given[name].dim() - 1))
        expected[name] = given[name].where(~mask, 0)
        if mode == "SameStep":
            expected[final(name)] = given[name].where(mask, 0)
    expected["patient_index"] = after.patient_index
    reported = {}
    for kind in names._fields:
        reported |= dict(zip(getattr(names, kind), getattr(got, kind), strict=True))
    assert reported.keys() == expected.keys()
    for name, row in reported.items():
        assert torch.equal(row, expected[name].to(row.dtype)), name
    assert got.flags.dtype == torch.uint8


def test_step_marks_the_environments_whose_outcomes_are_not_finite(params, toy_model):
    def model(patient, *rest):
        outcomes = toy_model(patient, *rest)
        return outcomes._replace(optimal_logit=1.0 / (patient[..., 9] - 0.5))

    state, done = initial(torch.arange(3), params), torch.zeros(3, dtype=torch.bool)
    got = step(state, done, random_designs(3, 0), params, model, "NextStep")
    assert got.defect.isnan().tolist() == [False, True, False]


def test_rows_are_stacked_in_the_order_of_their_names_and_must_match_them():
    one = torch.ones(2)
    assert stack_rows(("b", "a"), {"a": one, "b": 2 * one}).tolist() == [[2.0, 2.0], [1.0, 1.0]]
    with pytest.raises(KeyError, match="b"):
        stack_rows(("a", "b"), {"a": one})
    with pytest.raises(ValueError, match=r"rows \['c'\] have no place in \('a', 'b'\)"):
        stack_rows(("a", "b"), {"a": one, "b": one, "c": one})


def test_transition_writes_into_none_of_its_arguments(eight_environments):
    state, design, params = eight_environments
    arguments = tree_leaves([state, design, params.patients])
    before = [value.clone() for value in arguments]
    transition(state, design, params, MechanisticModel())
    assert all(map(torch.equal, arguments, before))


def episode_step(state, design, params, model):
    done = torch.zeros_like(state.seed, dtype=torch.bool)
    return step(state, done, design, params, model, "SameStep")


@pytest.mark.slow
def test_step_compiles_to_one_graph_that_equals_eager(eight_environments):
    compiled = torch.compile(episode_step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        there = compiled(*eight_environments, MechanisticModel())
        assert_close(there, episode_step(*eight_environments, MechanisticModel()))


def test_step_on_a_device_equals_the_step_on_the_cpu(eight_environments, device):
    state, design, params = eight_environments
    moved = tree_map(lambda x: x.to(device), (state, design))
    there_params = replace(params, patients=params.patients.to(device))
    there = episode_step(*moved, there_params, MechanisticModel().to(device))
    assert {value.device.type for value in tree_leaves(there)} == {device}
    here = episode_step(*eight_environments, MechanisticModel())
    assert_close(tree_map(torch.Tensor.cpu, there), here, rtol=1e-4, atol=1e-4)
