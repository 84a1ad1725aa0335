from __future__ import annotations

import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import (
    FlattenObservation,
    NormalizeObservation,
    RecordEpisodeStatistics,
)
from gymnasium.wrappers import vector as vector_wrappers
from torch.utils._pytree import tree_map

import hydrogel_gym  # noqa: F401  registers the environments
from hydrogel_gym.envs.wrappers import (
    DiscretizeHybridAction,
    FlattenHybridAction,
    RescaleFormulation,
    VectorDiscretizeHybridAction,
    VectorFlattenHybridAction,
    VectorRescaleFormulation,
)
from hydrogel_gym.problem.fields import FORMULATION_HIGH, FORMULATION_LOW, Design

SINGLE = (FlattenHybridAction, DiscretizeHybridAction, RescaleFormulation)
VECTOR = (VectorFlattenHybridAction, VectorDiscretizeHybridAction, VectorRescaleFormulation)
PAIRS = list(zip(SINGLE, VECTOR, strict=True))
FLAT, DISCRETE = "HydrogelDesignFlat-v0", "HydrogelDesignDiscrete-v0"


@pytest.fixture(scope="module")
def make(three_patients, toy_model):
    """Makes an environment, or a vector of three, of a model worked out by hand."""

    def make(num_envs: int | None = None, env_id: str = "HydrogelDesign-v0", **kwargs):
        kwargs = {"cohort": three_patients, "reward_model": toy_model} | kwargs
        if num_envs is None:
            return gym.make(env_id, **kwargs)
        return gym.make_vec(env_id, num_envs, **kwargs)

    return make


def assert_same(one, other):
    """Equal keys, types, shapes and values, whether arrays or tensors."""
    one, other = (
        tree_map(lambda x: x.numpy() if isinstance(x, torch.Tensor) else x, value)
        for value in (one, other)
    )
    assert data_equivalence(one, other, exact=True), f"{one}\n!=\n{other}"


@pytest.mark.parametrize(
    ("wrapper", "env_id", "kwargs"),
    [
        (FlattenHybridAction, FLAT, {"action_format": "dict"}),
        (DiscretizeHybridAction, DISCRETE, {"action_format": "tuple"}),
        (VectorFlattenHybridAction, FLAT, {"action_format": "tuple", "output": "torch"}),
        (VectorFlattenHybridAction, FLAT, {"action_format": "dict"}),
        (VectorDiscretizeHybridAction, DISCRETE, {"action_format": "dict", "output": "torch"}),
        (VectorDiscretizeHybridAction, DISCRETE, {"action_format": "tuple"}),
    ],
)
def test_wrapped_environment_is_the_one_with_the_form_built_in(wrapper, env_id, kwargs, make):
    num_envs = 3 if wrapper in VECTOR else None
    wrapped = wrapper(make(num_envs, horizon=3, **kwargs))
    kwargs = {name: value for name, value in kwargs.items() if name != "action_format"}
    built_in = make(num_envs, env_id, horizon=3, **kwargs)
    assert wrapped.action_space == built_in.action_space
    if num_envs:
        assert wrapped.single_action_space == built_in.single_action_space
    wrapped.action_space.seed(5)
    assert_same(wrapped.reset(seed=1), built_in.reset(seed=1))
    for _ in range(3):
        action = wrapped.action_space.sample()
        action = torch.from_numpy(action) if "output" in kwargs else action
        assert_same(wrapped.step(action), built_in.step(action))


def heads_of(action) -> tuple:
    """Polymer, formulation and coverage of a hybrid action."""
    return tuple(action[head] for head in Design._fields) if isinstance(action, dict) else action


@pytest.mark.parametrize(
    ("single", "vector", "action_format"),
    [(*pair, "dict") for pair in PAIRS] + [(*PAIRS[-1], "tuple")],
)
def test_actions_are_turned_back_in_the_library_that_they_come_in(
    single, vector, action_format, make
):
    """How exactly is tested with the codec."""
    env = single(make(action_format=action_format))
    envs = vector(make(3, action_format=action_format))
    envs.env.action_space.seed(0)
    hybrid = envs.env.action_space.sample()
    batch = envs.reverse_actions(hybrid)
    assert envs.action_space.contains(batch)
    tensors = envs.reverse_actions(tree_map(torch.from_numpy, hybrid))
    assert_same(tree_map(torch.Tensor.numpy, tensors), batch)  # had they been arrays, an error
    middle = tree_map(lambda rows: rows[1], hybrid)
    action = env.reverse_action(middle)
    assert env.action_space.contains(action)
    assert_same(action, tree_map(lambda rows: rows[1], batch))
    again = env.action(action)
    assert env.env.action_space.contains(again)
    half_a_level = (FORMULATION_HIGH - FORMULATION_LOW) / 20 * (single is DiscretizeHybridAction)
    for one, other in zip(heads_of(again), heads_of(middle), strict=True):
        tolerance = half_a_level + 5e-5 if np.ndim(one) else 0
        assert (abs(one - other) <= tolerance).all()


@pytest.mark.parametrize("wrapper", SINGLE)
def test_checker_finds_the_wrapped_environment_sound(wrapper, make):
    with pytest.warns(UserWarning, match=r"different from the unwrapped version") as record:
        check_env(wrapper(make()))
    assert len(record) == 1


def test_wrappers_of_gymnasium_lie_around_and_between(make):
    env = FlattenHybridAction(RecordEpisodeStatistics(make(obs_format="dict", horizon=2)))
    env = NormalizeObservation(FlattenObservation(env))
    assert env.observation_space.shape == (13,)
    obs, _ = env.reset(seed=0)
    total = 0.0
    for _ in range(2):
        obs, reward, terminated, _, info = env.step(env.action_space.sample())
        total += reward
        assert env.observation_space.contains(obs.astype(np.float32))
    assert terminated
    assert info["episode"]["r"] == pytest.approx(total)


@pytest.mark.parametrize("wrapper", VECTOR)
def test_vector_wrappers_of_gymnasium_lie_around_and_between(wrapper, make):
    # Gymnasium's wrappers of a vector's observations do not take the mode SameStep.
    envs = make(3, obs_format="dict", horizon=2, autoreset_mode="NextStep")
    envs = wrapper(vector_wrappers.RecordEpisodeStatistics(envs))
    assert envs.autoreset_mode is envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert envs.metadata["render_modes"] == ["rgb_array", "ansi"]
    envs = vector_wrappers.NormalizeObservation(vector_wrappers.FlattenObservation(envs))
    assert envs.single_observation_space.shape == (13,)
    envs.reset(seed=0)
    totals = np.zeros(3)
    for _ in range(2):
        obs, reward, terminated, _, info = envs.step(envs.action_space.sample())
        totals += reward
    assert obs.shape == (3, 13)
    assert terminated.all()
    np.testing.assert_allclose(info["episode"]["r"], totals, rtol=1e-6)


def test_value_beyond_the_unit_range_is_clipped_by_the_environment_which_says_so(make):
    envs = VectorRescaleFormulation(make(3))
    envs.reset(seed=0)
    action = {
        "polymer_id": np.zeros(3, int),
        "formulation": np.float32([[0.0] * 4, [1.5] * 4, [-9.0] * 4]),
        "coverage": np.zeros(3, int),
    }
    info = envs.step(action)[4]["final_info"]
    assert info["formulation_clipped"].tolist() == [False, True, True]
    np.testing.assert_array_equal(info["formulation"][1:], [FORMULATION_HIGH, FORMULATION_LOW])


@pytest.mark.parametrize("wrapper", SINGLE)
def test_specification_with_the_wrapper_makes_the_same_environment_again(wrapper):
    kwargs = {"num_levels": [2, 6, 7, 8]} if wrapper is DiscretizeHybridAction else {}
    env = wrapper(gym.make("HydrogelDesign-v0"), **kwargs)
    spec = gym.envs.registration.EnvSpec.from_json(env.spec.to_json())
    again = gym.make(spec)
    assert isinstance(again, wrapper)
    assert again.action_space == env.action_space
    assert again.spec == env.spec


@pytest.mark.parametrize(("single", "vector"), PAIRS)
def test_vectors_of_gymnasium_may_be_wrapped_row_by_row_or_as_a_whole(single, vector):
    rows = gym.make_vec("HydrogelDesign-v0", 2, "sync", wrappers=[single])
    whole = vector(gym.make_vec("HydrogelDesign-v0", 2, "sync"))
    assert rows.action_space == whole.action_space
    rows.action_space.seed(1)
    assert_same(rows.reset(seed=2), whole.reset(seed=2))
    actions = rows.action_space.sample()
    assert_same(rows.step(actions), whole.step(actions))


@pytest.mark.parametrize(("single", "vector"), PAIRS)
def test_environment_that_cannot_be_wrapped_is_refused_with_the_reason(single, vector, make):
    for wrapper, other in (
        (single, gym.make("CartPole-v1")),
        (vector, gym.make_vec("CartPole-v1")),
    ):
        message = f"{wrapper.__name__} wraps an environment with the action space of Hydrogel"
        with pytest.raises(ValueError, match=rf"^{message}Design-v0, Dict\(.*; got Discrete\(2\)$"):
            wrapper(other)
    with pytest.raises(TypeError, match=f"{single.__name__} wraps a gymnasium.Env, got a Hydrogel"):
        single(make(3))
    message = f"{vector.__name__} wraps a gymnasium.vector.VectorEnv, got a OrderEnforcing"
    with pytest.raises(TypeError, match=message):
        vector(make())
    inside = RecordEpisodeStatistics(single(make()))
    for outer in SINGLE:
        message = f"{outer.__name__} wraps the hybrid action .* which {single.__name__} has conv"
        with pytest.raises(ValueError, match=message):
            outer(inside)
    inside.reset(seed=0)
    assert inside.step(inside.action_space.sample())[2]  # nothing was lost
    for outer in VECTOR:
        message = f"{outer.__name__} wraps the hybrid action .* which {vector.__name__} has conv"
        with pytest.raises(ValueError, match=message):
            outer(vector_wrappers.RecordEpisodeStatistics(vector(make(3))))


@pytest.mark.parametrize("num_levels", [1, 0, 2.5, [3, 3, 3], [3, 3, 3, 1], [3, 3, 3, "4"], "11"])
def test_impossible_number_of_levels_is_refused(num_levels, make):
    message = re.escape(f"num_levels is {num_levels!r}; allowed: a whole number, 2 or more")
    for wrapper, env in ((DiscretizeHybridAction, make()), (VectorDiscretizeHybridAction, make(3))):
        with pytest.raises(ValueError, match=message):
            wrapper(env, num_levels)


@pytest.mark.parametrize(
    ("wrapper", "value", "message"),
    [
        (FlattenHybridAction, np.nan, "env 0: action[0] is nan; allowed: a finite number"),
        (DiscretizeHybridAction, 24, "env 0: action[0] is 24; allowed: whole numbers 0 to 23"),
        (RescaleFormulation, 24, "env 0: polymer_id is 24; allowed: whole numbers 0 to 23"),
        (VectorFlattenHybridAction, np.nan, "env 2: action[0] is nan; allowed: a finite number"),
        (VectorDiscretizeHybridAction, 24, "env 2: action[0] is 24; allowed: whole numbers"),
        (VectorRescaleFormulation, 24, "env 2: polymer_id is 24; allowed: whole numbers 0 to 23"),
    ],
)
def test_bad_action_is_one_clear_error_and_nothing_is_lost(wrapper, value, message, make):
    is_vector = wrapper in VECTOR
    env = wrapper(make(3 if is_vector else None, horizon=2))
    env.reset(seed=0)
    good, bad = (tree_map(np.array, env.action_space.sample()) for _ in range(2))
    first = bad["polymer_id"] if isinstance(bad, dict) else bad
    first[(2,) * is_vector + (0,) * (first.ndim - is_vector)] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        env.step(bad)
    assert (env.step(good)[0][..., 12] == 1.0).all()  # the first step of the episode
