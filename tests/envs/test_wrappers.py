from __future__ import annotations

import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.wrappers import (
    RecordEpisodeStatistics,
)
from gymnasium.wrappers import vector as vector_wrappers
from torch.utils._pytree import tree_leaves, tree_map

import hydrogel_gym  # noqa: F401  registers the environments
from hydrogel_gym.envs.wrappers import (
    DiscretizeHybridAction,
    FlattenHybridAction,
    RescaleFormulation,
    VectorDiscretizeHybridAction,
    VectorFlattenHybridAction,
    VectorRescaleFormulation,
)
from hydrogel_gym.problem.fields import FORMULATION_HIGH, FORMULATION_LOW

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
        (VectorDiscretizeHybridAction, DISCRETE, {"action_format": "dict"}),
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
    for distance in tree_leaves(tree_map(lambda one, other: abs(one - other), again, middle)):
        assert np.all(distance <= (half_a_level + 5e-5 if np.ndim(distance) else 0))


@pytest.mark.parametrize("wrapper", SINGLE)
def test_wrapped_environment_is_sound_and_its_specification_makes_the_same_again(wrapper):
    kwargs = {"num_levels": [2, 6, 7, 8]} if wrapper is DiscretizeHybridAction else {}
    env = wrapper(gym.make("HydrogelDesign-v0"), **kwargs)
    with pytest.warns(UserWarning, match=r"different from the unwrapped version") as record:
        check_env(env)
    assert len(record) == 1
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
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
    hybrid = r"the action space of HydrogelDesign-v0, Dict\(.*; got Discrete\(2\)$"
    for wrapper, other, error, message in [
        (single, gym.make("CartPole-v1"), ValueError, hybrid),
        (vector, gym.make_vec("CartPole-v1"), ValueError, hybrid),
        (single, make(3), TypeError, "gymnasium.Env, got a Hydrogel"),
        (vector, make(), TypeError, "gymnasium.vector.VectorEnv, got a OrderEnforcing"),
    ]:
        with pytest.raises(error, match=rf"^{wrapper.__name__} wraps .*{message}"):
            wrapper(other)
    converted = "wraps the hybrid action .* which {} has conv"
    inside = RecordEpisodeStatistics(single(make()))
    insides = vector_wrappers.RecordEpisodeStatistics(vector(make(3)))
    for outer, outers in PAIRS:
        with pytest.raises(ValueError, match=converted.format(single.__name__)):
            outer(inside)
        with pytest.raises(ValueError, match=converted.format(vector.__name__)):
            outers(insides)
    inside.reset(seed=0)
    assert inside.step(inside.action_space.sample())[2]  # nothing was lost


@pytest.mark.parametrize("num_levels", [1, 0, 2.5, [3, 3, 3], [3, 3, 3, 1], [3, 3, 3, "4"], "11"])
def test_impossible_number_of_levels_is_refused(num_levels, make):
    message = re.escape(f"num_levels is {num_levels!r}; allowed: a whole number, 2 or more")
    for wrapper, env in ((DiscretizeHybridAction, make()), (VectorDiscretizeHybridAction, make(3))):
        with pytest.raises(ValueError, match=message):
            wrapper(env, num_levels)


@pytest.mark.parametrize("wrapper", SINGLE + VECTOR)
def test_bad_action_is_one_clear_error_and_nothing_is_lost(wrapper, make):
    is_vector = wrapper in VECTOR
    env = wrapper(make(3 if is_vector else None, horizon=2))
    env.reset(seed=0)
    good, bad = (tree_map(np.array, env.action_space.sample()) for _ in range(2))
    first = bad["polymer_id"] if isinstance(bad, dict) else bad
    value = np.nan if first.dtype.kind == "f" else 24
    first[(2,) * is_vector + (0,) * (first.ndim - is_vector)] = value
    name = "polymer_id" if isinstance(bad, dict) else "action[0]"
    with pytest.raises(ValueError, match=re.escape(f"env {2 * is_vector}: {name} is {value}; ")):
        env.step(bad)
    assert (env.step(good)[0][..., 12] == 1.0).all()  # the first step of the episode
