from __future__ import annotations

import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import (
    ClipAction,
    FlattenObservation,
    NormalizeObservation,
    RecordEpisodeStatistics,
)
from gymnasium.wrappers import vector as vector_wrappers
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import hydrogel_gym  # noqa: F401  registers the environments
from hydrogel_gym.envs.spaces import FLAT_ACTION_DIM, action_space
from hydrogel_gym.envs.wrappers import (
    DiscretizeHybridAction,
    FlattenHybridAction,
    RescaleFormulation,
    VectorDiscretizeHybridAction,
    VectorFlattenHybridAction,
    VectorRescaleFormulation,
)
from hydrogel_gym.problem.fields import (
    COVERAGES,
    FORMULATION_FIELDS,
    FORMULATION_HIGH,
    FORMULATION_LOW,
)
from hydrogel_gym.problem.polymers import NUM_POLYMERS

SINGLE = (FlattenHybridAction, DiscretizeHybridAction, RescaleFormulation)
VECTOR = (VectorFlattenHybridAction, VectorDiscretizeHybridAction, VectorRescaleFormulation)
PAIRS = list(zip(SINGLE, VECTOR, strict=True))
BUILT_IN = {
    "HydrogelDesignFlat-v0": (FlattenHybridAction, VectorFlattenHybridAction),
    "HydrogelDesignDiscrete-v0": (DiscretizeHybridAction, VectorDiscretizeHybridAction),
}
FORMATS = pytest.mark.parametrize("action_format", ["dict", "tuple"])
# Two float32 roundings of a number up to 1, stretched to the width of the range.
TOLERANCE = 2e-7 * (FORMULATION_HIGH - FORMULATION_LOW) + 1e-6

UNIT_ACTIONS = arrays(np.float32, FLAT_ACTION_DIM, elements=st.floats(-1, 1, width=32))
HYBRID_ACTIONS = st.fixed_dictionaries(
    {
        "polymer_id": st.integers(0, NUM_POLYMERS - 1).map(np.int64),
        "formulation": st.tuples(
            *(st.floats(item.low, item.high, width=32) for item in FORMULATION_FIELDS)
        ).map(np.float32),
        "coverage": st.integers(0, len(COVERAGES) - 1).map(np.int64),
    }
)


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
    """Equal nests of arrays, tensors, dicts and tuples."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert set(one) == set(other)
        one, other = list(one.values()), [other[key] for key in one]
    if isinstance(one, (list, tuple)) or getattr(one, "dtype", None) is np.dtype(object):
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("env_id", BUILT_IN)
@FORMATS
def test_wrapped_environment_is_the_one_with_the_form_built_in(action_format, env_id, make):
    wrapper, _ = BUILT_IN[env_id]
    wrapped = wrapper(make(action_format=action_format, horizon=3))
    built_in = make(env_id=env_id, horizon=3)
    assert wrapped.action_space == built_in.action_space
    wrapped.action_space.seed(5)
    assert_same(wrapped.reset(seed=1), built_in.reset(seed=1))
    for _ in range(3):
        action = wrapped.action_space.sample()
        assert_same(wrapped.step(action), built_in.step(action))


@pytest.mark.parametrize("env_id", BUILT_IN)
@pytest.mark.parametrize("output", ["numpy", "torch"])
@FORMATS
def test_wrapped_vector_is_the_one_with_the_form_built_in(action_format, output, env_id, make):
    _, wrapper = BUILT_IN[env_id]
    wrapped = wrapper(make(3, action_format=action_format, horizon=2, output=output))
    built_in = make(3, env_id=env_id, horizon=2, output=output)
    assert wrapped.single_action_space == built_in.single_action_space
    assert wrapped.action_space == built_in.action_space
    wrapped.action_space.seed(5)
    assert_same(wrapped.reset(seed=1), built_in.reset(seed=1))
    for _ in range(3):
        action = wrapped.action_space.sample()
        action = torch.from_numpy(action) if output == "torch" else action
        assert_same(wrapped.step(action), built_in.step(action))


@FORMATS
def test_rescaled_formulation_reaches_its_bounds_and_leaves_the_other_heads(action_format, make):
    env = RescaleFormulation(make(action_format=action_format))
    space = action_space(action_format, rescaled=True)
    assert env.action_space == space
    for value, bound in ((-1.0, FORMULATION_LOW), (1.0, FORMULATION_HIGH)):
        heads = [np.int64(7), np.full(4, value, np.float32), np.int64(2)]
        names = ("polymer_id", "formulation", "coverage")
        action = dict(zip(names, heads, strict=True)) if action_format == "dict" else tuple(heads)
        converted = env.action(action)
        assert env.env.action_space.contains(converted)
        values = list(converted.values()) if action_format == "dict" else list(converted)
        assert (values[0], values[2]) == (7, 2)
        np.testing.assert_array_equal(values[1], bound)


@given(HYBRID_ACTIONS)
@pytest.mark.parametrize("wrapper", [FlattenHybridAction, RescaleFormulation])
def test_every_hybrid_action_survives_the_way_there_and_back(wrapper, make, hybrid):
    env = wrapper(make())
    action = env.reverse_action(hybrid)
    assert env.action_space.contains(action)
    again = env.action(action)
    assert (again["polymer_id"], again["coverage"]) == (hybrid["polymer_id"], hybrid["coverage"])
    assert (abs(again["formulation"] - hybrid["formulation"]) <= TOLERANCE).all()


@given(HYBRID_ACTIONS, st.tuples(*[st.integers(2, 60)] * 4))
def test_discrete_action_of_a_hybrid_one_is_the_nearest(make, hybrid, num_levels):
    env = DiscretizeHybridAction(make(), num_levels)
    action = env.reverse_action(hybrid)
    assert env.action_space.contains(action)
    again = env.action(action)
    assert (again["polymer_id"], again["coverage"]) == (hybrid["polymer_id"], hybrid["coverage"])
    half = (FORMULATION_HIGH - FORMULATION_LOW) / (np.array(num_levels) - 1) / 2
    assert (abs(again["formulation"] - hybrid["formulation"]) <= half + TOLERANCE).all()


@given(st.data(), st.tuples(*[st.integers(2, 60)] * 4))
def test_reverse_is_the_exact_inverse_of_every_discrete_action(make, data, num_levels):
    env = DiscretizeHybridAction(make(), num_levels)
    sizes = [NUM_POLYMERS, *num_levels, len(COVERAGES)]
    assert env.action_space.nvec.tolist() == sizes
    action = np.array(data.draw(st.tuples(*(st.integers(0, size - 1) for size in sizes))))
    hybrid = env.action(action)
    assert env.env.action_space.contains(hybrid)
    np.testing.assert_array_equal(env.reverse_action(hybrid), action)


@given(UNIT_ACTIONS)
def test_reversed_flat_action_stands_for_the_same_design(make, action):
    env = FlattenHybridAction(make())
    hybrid = env.action(action)
    assert env.env.action_space.contains(hybrid)
    again = env.action(env.reverse_action(hybrid))
    assert (again["polymer_id"], again["coverage"]) == (hybrid["polymer_id"], hybrid["coverage"])
    assert (abs(again["formulation"] - hybrid["formulation"]) <= TOLERANCE).all()


@pytest.mark.parametrize(("single", "vector"), PAIRS)
@FORMATS
def test_vector_wrapper_converts_each_row_as_the_single_one_does(
    action_format, single, vector, make
):
    env = single(make(action_format=action_format))
    envs = vector(make(3, action_format=action_format))
    envs.action_space.seed(3)
    actions = envs.action_space.sample()
    converted = envs.actions(actions)
    assert envs.env.action_space.contains(converted)
    assert_same(envs.actions(envs.reverse_actions(converted)), envs.actions(actions))
    rows = gym.vector.utils.iterate(envs.action_space, actions)
    inner = gym.vector.utils.iterate(envs.env.action_space, converted)
    for row, expected in zip(rows, inner, strict=True):
        assert_same(env.action(row), expected)


@pytest.mark.parametrize("wrapper", SINGLE)
def test_checker_finds_the_wrapped_environment_sound(wrapper, make):
    with pytest.warns(UserWarning, match=r"different from the unwrapped version") as record:
        check_env(wrapper(make()))
    assert len(record) == 1


@pytest.mark.parametrize("wrapper", SINGLE)
def test_wrappers_of_gymnasium_lie_around_and_between(wrapper, make):
    env = wrapper(RecordEpisodeStatistics(make(obs_format="dict", horizon=2)))
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


def test_clipped_action_is_what_the_wrapper_is_given(make):
    env = ClipAction(FlattenHybridAction(make()))
    env.reset(seed=0)
    action = np.zeros(FLAT_ACTION_DIM, np.float32)
    action[:4] = 3.0
    _, _, _, _, info = env.step(action)
    np.testing.assert_array_equal(info["formulation"], FORMULATION_HIGH)
    assert not info["formulation_clipped"]


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
    kwargs = {"num_levels": [5, 6, 7, 8]} if wrapper is DiscretizeHybridAction else {}
    env = wrapper(gym.make("HydrogelDesign-v0"), **kwargs)
    spec = gym.envs.registration.EnvSpec.from_json(env.spec.to_json())
    again = gym.make(spec)
    assert isinstance(again, wrapper)
    assert again.action_space == env.action_space
    assert again.spec == env.spec


@pytest.mark.parametrize("wrapper", VECTOR)
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vector_wrapper_tells_the_autoreset_mode_of_the_vector(mode, wrapper, make):
    envs = wrapper(make(3, autoreset_mode=mode))
    assert envs.autoreset_mode is mode
    assert envs.metadata["autoreset_mode"] is mode
    assert envs.metadata["render_modes"] == ["rgb_array", "ansi"]


@pytest.mark.parametrize(("single", "vector"), PAIRS)
def test_vectors_of_gymnasium_may_be_wrapped_row_by_row_or_as_a_whole(single, vector):
    make_vec = gym.make_vec
    rows = make_vec("HydrogelDesign-v0", 2, "sync", wrappers=[single])
    whole = vector(make_vec("HydrogelDesign-v0", 2, "sync"))
    assert rows.action_space == whole.action_space
    rows.action_space.seed(1)
    assert_same(rows.reset(seed=2), whole.reset(seed=2))
    actions = rows.action_space.sample()
    assert_same(rows.step(actions), whole.step(actions))


@pytest.mark.parametrize("wrapper", VECTOR)
def test_wrapped_vector_steps_on_a_device_without_values(wrapper):
    # There a read on the host, a tensor left on the CPU and a shape that depends on data all raise.
    envs = wrapper(gym.make_vec("HydrogelDesign-v0", 4, device="meta", output="torch"))
    envs.reset()
    sample = envs.action_space.sample()
    if isinstance(sample, dict):
        action = {name: torch.from_numpy(x).to("meta") for name, x in sample.items()}
    else:
        action = torch.from_numpy(sample).to("meta")
    obs, reward, *_ = envs.step(action)
    assert (obs.device.type, reward.shape) == ("meta", (4,))


def test_action_that_is_not_looked_at_is_never_taken_for_another(make):
    # As on an accelerator, where values are not read on the host.
    envs = VectorDiscretizeHybridAction(make(3, output="torch", validate_actions=False))
    codec, good = envs._conversion.outer, [3, 0, 0, 0, 0, 1]
    tensors = codec.read(torch.tensor([good, [3, 11, 0, 0, 0, 1], [24, *good[1:]]]), (3,))
    assert codec.allows(tensors).tolist() == [True, False, False]


@pytest.mark.parametrize("wrapper", [*SINGLE, *VECTOR])
def test_environment_with_another_action_is_refused_with_both_spaces(wrapper):
    is_vector = wrapper in VECTOR
    env = gym.make_vec("CartPole-v1", 2) if is_vector else gym.make("CartPole-v1")
    message = f"{wrapper.__name__} wraps an environment with the action space of HydrogelDesign-v0"
    with pytest.raises(ValueError, match=rf"^{message}, Dict\(.*; got Discrete\(2\)$"):
        wrapper(env)


@pytest.mark.parametrize("outer", SINGLE)
@pytest.mark.parametrize("inner", SINGLE)
def test_wrapping_twice_is_refused_with_what_has_converted_the_action_already(inner, outer, make):
    env = RecordEpisodeStatistics(inner(make()))
    message = f"{outer.__name__} wraps the hybrid action .* which {inner.__name__} has converted"
    with pytest.raises(ValueError, match=message):
        outer(env)
    # Nothing was lost.
    env.reset(seed=0)
    assert env.step(env.action_space.sample())[2]


@pytest.mark.parametrize("outer", VECTOR)
@pytest.mark.parametrize("inner", VECTOR)
def test_wrapping_a_vector_twice_is_refused_likewise(inner, outer, make):
    message = f"{outer.__name__} wraps the hybrid action .* which {inner.__name__} has converted"
    with pytest.raises(ValueError, match=message):
        outer(vector_wrappers.RecordEpisodeStatistics(inner(make(3))))


@pytest.mark.parametrize(("single", "vector"), PAIRS)
def test_single_and_vector_are_not_taken_for_each_other(single, vector, make):
    with pytest.raises(
        TypeError, match=rf"{single.__name__} wraps a gymnasium.Env, got a Hydrogel"
    ):
        single(make(3))
    message = rf"{vector.__name__} wraps a gymnasium.vector.VectorEnv, got a OrderEnforcing"
    with pytest.raises(TypeError, match=message):
        vector(make())


@pytest.mark.parametrize("num_levels", [1, 0, 2.5, [3, 3, 3], [3, 3, 3, 1], [3, 3, 3, "4"], "11"])
def test_impossible_number_of_levels_is_refused(num_levels, make):
    message = re.escape(f"num_levels is {num_levels!r}; allowed: a whole number, 2 or more")
    for wrapper, env in ((DiscretizeHybridAction, make()), (VectorDiscretizeHybridAction, make(3))):
        with pytest.raises(ValueError, match=message):
            wrapper(env, num_levels)


ZEROS = {
    FlattenHybridAction: np.zeros(32, np.float32),
    DiscretizeHybridAction: np.zeros(6, int),
    RescaleFormulation: {
        "polymer_id": np.int64(0),
        "formulation": np.zeros(4, np.float32),
        "coverage": np.int64(0),
    },
}


def put(action: np.ndarray, place: int, value: float) -> np.ndarray:
    action = action.copy()
    action[place] = value
    return action


BAD = {
    "flat width": (
        FlattenHybridAction,
        lambda a: a[:31],
        "action has shape (31,); expected (32,)",
    ),
    "flat dtype": (
        FlattenHybridAction,
        lambda a: a.astype(bool),
        "action has dtype torch.bool; expected a real number dtype",
    ),
    "flat nan": (
        FlattenHybridAction,
        lambda a: put(a, 2, np.nan),
        "env 0: action[2] is nan; allowed: a finite number, clipped to [-1, 1]",
    ),
    "flat score inf": (
        FlattenHybridAction,
        lambda a: put(a, 20, np.inf),
        "env 0: action[20] is inf; allowed: a finite number",
    ),
    "discrete width": (
        DiscretizeHybridAction,
        lambda a: a[:5],
        "action has shape (5,); expected (6,)",
    ),
    "discrete dtype": (
        DiscretizeHybridAction,
        lambda a: a.astype(np.float32),
        "action has dtype torch.float32; expected an integer dtype",
    ),
    "discrete range": (
        DiscretizeHybridAction,
        lambda a: put(a, 3, 11),
        "env 0: action[3] is 11; allowed: whole numbers 0 to 10",
    ),
    "rescaled nan": (
        RescaleFormulation,
        lambda a: a | {"formulation": put(a["formulation"], 1, np.nan)},
        "env 0: formulation[1] is nan; allowed: a finite number, clipped to [-1, 1]",
    ),
    "rescaled width": (
        RescaleFormulation,
        lambda a: a | {"formulation": a["formulation"][:3]},
        "formulation has shape (3,); expected (4,)",
    ),
    "rescaled polymer": (
        RescaleFormulation,
        lambda a: a | {"polymer_id": np.int64(24)},
        "env 0: polymer_id is 24; allowed: whole numbers 0 to 23",
    ),
    "rescaled container": (
        RescaleFormulation,
        lambda a: tuple(a.values()),
        "action is a tuple; expected a dict of ('polymer_id', 'formulation', 'coverage')",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_action_is_one_clear_error_and_nothing_is_lost(fault, make):
    wrapper, spoil, message = BAD[fault]
    env = wrapper(make(horizon=2))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=re.escape(message)):
        env.step(spoil(ZEROS[wrapper]))
    obs, *_ = env.step(ZEROS[wrapper])
    assert obs[12] == 1.0  # the first step of the episode


def test_bad_row_of_a_batch_is_named(make):
    envs = VectorFlattenHybridAction(make(3))
    envs.reset(seed=0)
    actions = np.zeros((3, 32), np.float32)
    actions[2, 0] = np.nan
    with pytest.raises(ValueError, match=r"^env 2: action\[0\] is nan; allowed: a finite number"):
        envs.step(actions)
    with pytest.raises(ValueError, match=r"action has shape \(2, 32\); expected \(3, 32\)"):
        envs.step(actions[:2])
