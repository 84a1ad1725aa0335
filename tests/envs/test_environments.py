"""The environment of one patient and the vector of many, by what Gymnasium asks of both."""

from __future__ import annotations

import copy
import dataclasses
import functools
import multiprocessing
import pickle
import random
import re
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeAwareObservation, TimeLimit
from torch.utils._pytree import tree_leaves, tree_map

from hydrogel_gym import Cohort, HydrogelEnv, HydrogelVectorEnv, RewardConfig, load_cohort
from hydrogel_gym.oracle import best_designs

MODES = pytest.mark.parametrize("mode", [mode.value for mode in AutoresetMode])
KINDS = pytest.mark.parametrize("kind", ["single", "vector"])
NAN = float("nan")
T, F = True, False


def make(kind: str, **kwargs) -> HydrogelEnv | HydrogelVectorEnv:
    """A single environment, or a vector of three that draws patients as the single one does."""
    kwargs = {"cohort": shipped_cohort(), "patient_assignment": "random"} | kwargs
    return HydrogelEnv(**kwargs) if kind == "single" else HydrogelVectorEnv(3, **kwargs)


@functools.cache
def shipped_cohort() -> Cohort:
    return load_cohort()


def sampled(env, num: int) -> list:
    env.action_space.seed(0)
    return [env.action_space.sample() for _ in range(num)]


def twins(kind: str, **kwargs) -> tuple:
    """Two equal environments, a step into their episodes, and actions to go on with."""
    env, twin = make(kind, **kwargs), make(kind, **kwargs)
    first, *actions = sampled(env, 7)
    for each_env in (env, twin):
        each_env.reset(seed=0)
        each_env.step(first)
    return env, twin, actions


def arrays(value) -> list:
    """Every array and tensor of a nest of dicts, tuples, lists and object arrays."""
    leaves = [x for x in tree_leaves(value) if isinstance(x, (np.ndarray, torch.Tensor))]
    return [a for x in leaves for a in (arrays(list(x)) if x.dtype == object else [x])]


def to_numpy(value):
    return tree_map(lambda x: x.numpy() if isinstance(x, torch.Tensor) else x, value)


def to_torch(value):
    return tree_map(lambda x: torch.from_numpy(np.array(x)), value)


def assert_same(one, other) -> None:
    """Equal keys, types, dtypes, shapes and values."""
    assert data_equivalence(one, other, exact=True), f"{one}\n!=\n{other}"


def step_or_reset(env, action, done) -> tuple:
    """(obs, info, flags) of a step, or of a reset, without flags, where a row has to be reset."""
    if isinstance(env, gym.Env):
        if done:
            return *env.reset(), None
    elif env.metadata["autoreset_mode"] is AutoresetMode.DISABLED and done.any():
        return *env.reset(options={"reset_mask": done}), None
    obs, *flags, info = env.step(action)
    return obs, info, flags


def stagger(env, action) -> list:
    """Leave three rows one, no and two steps into their episodes (of three or more)."""
    trace = []
    for row in range(2):
        trace.append(step_or_reset(env, action, np.array([F, F, F])))
        trace.append((*env.reset(options={"reset_mask": np.arange(3) == row}), None))
    return trace


def rollout(env, actions, *, seed=0, staggered=False) -> list:
    """(obs, info, flags) of a reset and of what follows when each action is sent in turn."""
    trace = [(*env.reset(seed=seed), None)]
    if staggered:
        trace += stagger(env, actions[0])
    done = np.zeros(getattr(env, "num_envs", ()), bool)
    for action in actions:
        trace.append(step_or_reset(env, action, done))
        flags = trace[-1][2]
        done = flags[1] | flags[2] if flags else done & F
    return trace


@pytest.mark.parametrize(
    ("action_format", "obs_format", "horizon"),
    [("dict", "box", 1), ("tuple", "dict", 5), ("box", "dict", 1), ("multidiscrete", "box", 5)],
)
def test_checker_says_nothing_but_that_physical_units_are_not_normalised(
    action_format, obs_format, horizon
):
    kwargs = {"action_format": action_format, "obs_format": obs_format, "horizon": horizon}
    env = gym.make("HydrogelDesign-v0", **kwargs).unwrapped
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        check_env(env)
    messages = [str(warning.message) for warning in record]
    # The formulation is in kPa, days, S/m and mm, and the checker looks into Dict and Tuple.
    assert len(messages) == (action_format in ("dict", "tuple"))
    assert all("we recommend using a symmetric and normalized" in text for text in messages)


EVERY_KEYWORD = dict(device="cpu", horizon=3, cohort="holdout", reward_model="mechanistic")
EVERY_KEYWORD |= dict(action_format="tuple", obs_format="dict", observe_explored=True)
EVERY_KEYWORD |= dict(reward_mode="improvement", patient_assignment="random")


@pytest.mark.parametrize(
    ("kind", "form", "kwargs", "space"),
    [
        ("single", "", EVERY_KEYWORD, gym.spaces.Tuple),
        ("vector", "", EVERY_KEYWORD, gym.spaces.Tuple),
        ("single", "", {}, gym.spaces.Dict),
        ("single", "Flat", {}, gym.spaces.Box),
        ("vector", "Flat", {}, gym.spaces.Box),
        ("single", "Discrete", {}, gym.spaces.MultiDiscrete),
        ("vector", "Discrete", {}, gym.spaces.MultiDiscrete),
    ],
)
def test_environment_made_by_its_id_is_made_again_by_its_spec(kind, form, kwargs, space):
    maker, env_class, flags = gym.make, HydrogelEnv, [float, bool, bool]
    if kind == "vector":
        maker, env_class, flags = gym.make_vec, HydrogelVectorEnv, [np.ndarray] * 3
        kwargs = kwargs | {"num_envs": 3, "max_episode_steps": 2}
    env = maker(f"HydrogelDesign{form}-v0", **kwargs)
    assert isinstance(env.unwrapped, env_class)
    assert isinstance(getattr(env, "single_action_space", env.action_space), space)
    spec = EnvSpec.from_json(env.spec.to_json())
    assert spec.kwargs.items() >= kwargs.items()
    again = maker(spec)
    assert again.unwrapped.spec.to_json() == env.unwrapped.spec.to_json()
    actions = sampled(env, 4)
    trace = rollout(env, actions)
    assert_same(rollout(again, actions), trace)
    assert [type(flag) for flag in trace[1][2]] == flags


@KINDS
def test_copies_made_within_an_episode_continue_identically_and_on_their_own(kind):
    env, _, actions = twins(kind, horizon=4, observe_explored=True)
    copies = [copy.deepcopy(env), pickle.loads(pickle.dumps(env))]

    def continued(env) -> list:
        return [env.step(action) for action in actions[:3]] + [env.reset()]

    ahead = continued(env)
    for each_copy in copies:
        assert_same(continued(each_copy), ahead)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 0}, "horizon is 0; allowed: a whole number, 1 or more"),
        ({"horizon": 1.5}, "horizon is 1.5; allowed"),
        ({"reward_mode": "best"}, "reward_mode is 'best'; allowed: ('score', 'improvement')"),
        ({"patient_assignment": "x"}, "patient_assignment is 'x'; allowed: ('fixed', 'random')"),
        ({"action_format": "x"}, "action_format is 'x'; allowed: ('dict', 'tuple', 'box', 'multi"),
        ({"obs_format": "x"}, "obs_format is 'x'; allowed: ('box', 'dict')"),
        ({"cohort": "no_such.csv"}, "no_such.csv: cannot be read"),
        ({"reward_model": "x"}, "reward_model is 'x'; allowed: 'mechanistic', a path to"),
        ({"render_mode": "human"}, "render_mode is 'human'; allowed: (None, 'rgb_array', 'ansi')"),
        ({"num_envs": 0}, "num_envs is 0; allowed: a whole number, 1 or more"),
        ({"num_envs": 2, "output": "jax"}, "output is 'jax'; allowed: ('numpy', 'torch')"),
        ({"num_envs": 2, "autoreset_mode": "Same"}, "autoreset_mode is 'Same'; allowed: ('NextSt"),
        (
            {"num_envs": 2, "max_episode_steps": 0},
            "max_episode_steps is 0; allowed: a whole number",
        ),
        # The spaces are of float32.
        ({"num_envs": 2, "dtype": "float64"}, "dtype is 'float64'; allowed: ('float32',)"),
    ],
    ids=lambda value: [*value][-1] if isinstance(value, dict) else "",
)
def test_argument_that_is_not_allowed_is_refused_with_its_name(changes, message):
    for env_class in (HydrogelVectorEnv, *([] if "num_envs" in changes else [HydrogelEnv])):
        with pytest.raises(ValueError, match=re.escape(message)):
            env_class(**changes)


@KINDS
def test_seed_decides_everything_and_global_generators_nothing(kind):
    def states():
        legacy = np.random.get_state()  # noqa: NPY002
        return random.getstate(), legacy, torch.get_rng_state().numpy()

    before = states()
    env, twin = make(kind, horizon=2), make(kind, horizon=2)
    actions = sampled(env, 6)
    trace = rollout(env, actions, seed=11)
    assert_same(rollout(twin, actions, seed=11), trace)
    assert_same(rollout(env, actions, seed=11), trace)
    assert not data_equivalence(rollout(twin, actions, seed=12), trace)
    # Without a seed each draws patients of its own.
    unseeded = [make(kind).reset()[1]["patient_index"] for _ in range(3)]
    assert len(np.unique(unseeded)) > 1 + 4 * (kind == "vector")
    assert_same(states(), before)


@KINDS
def test_seed_changes_nothing_under_fixed_assignment(kind):
    env = make(kind, horizon=2, patient_assignment="fixed")
    actions = sampled(env, 4)
    assert_same(rollout(env, actions, seed=2), rollout(env, actions, seed=1))


@pytest.mark.parametrize("form", ["", "Flat", "Discrete"])
def test_limit_that_make_was_given_serves_wrappers_that_ask_for_one(form):
    assert gym.spec(f"HydrogelDesign{form}-v0").max_episode_steps is None
    env = gym.make(f"HydrogelDesign{form}-v0", horizon=2, max_episode_steps=2)
    trace = rollout(TimeAwareObservation(env, normalize_time=False), sampled(env, 2))
    assert [obs[-1] for obs, _, _ in trace] == [0, 1, 2]
    assert [flags[1:] for _, _, flags in trace[1:]] == [[F, F], [T, T]]


def test_list_of_seeds_in_any_form_begins_anew_the_rows_that_have_one():
    env, twin = make("vector"), make("vector")
    first = env.reset(seed=[5, 6, 7])
    for seeds in (5, np.int64(5), np.arange(5, 8), torch.arange(5, 8), (5, np.uint8(6), 7)):
        assert_same(twin.reset(seed=seeds), first)
    following = twin.reset()[1]["patient_index"]
    mixed = env.reset(seed=[5, None, 7])[1]["patient_index"]
    drawn = first[1]["patient_index"]
    assert mixed.tolist() == [drawn[0], following[1], drawn[2]]


# A constant design each for Ann, Bo and Cy, which scores FIRST when its polymer is new, then less.
TOY_ACTION = {
    "polymer_id": np.array([1, 2, 3]),
    "formulation": np.float32([[20.0, 30.0, 0.0, 5.0]] * 3),
    "coverage": np.array([0, 0, 0]),
}
FIRST = np.float32([3.625, 6.125, 9.125])
# Iteration observed, reward and end of each row, beginning one, no and two steps into an episode
# of three; a reset in mode `Disabled` has no rewards.
TRACES = {
    "SameStep": [
        ([2, 1, 0], [3.5, 6.125, 9.0], [F, F, T]),
        ([0, 2, 1], [3.5, 6.0, 9.125], [T, F, F]),
        ([1, 0, 2], [3.625, 6.0, 9.0], [F, T, F]),
        ([2, 1, 0], [3.5, 6.125, 9.0], [F, F, T]),
    ],
    "NextStep": [
        ([2, 1, 3], [3.5, 6.125, 9.0], [F, F, T]),
        ([3, 2, 0], [3.5, 6.0, 0.0], [T, F, F]),
        ([0, 3, 1], [0.0, 6.0, 9.125], [F, T, F]),
        ([1, 0, 2], [3.625, 0.0, 9.0], [F, F, F]),
        ([2, 1, 3], [3.5, 6.125, 9.0], [F, F, T]),
    ],
    "Disabled": [
        ([2, 1, 3], [3.5, 6.125, 9.0], [F, F, T]),
        ([2, 1, 0], None, [F, F, F]),
        ([3, 2, 1], [3.5, 6.0, 9.125], [T, F, F]),
        ([0, 2, 1], None, [F, F, F]),
        ([1, 3, 2], [3.625, 6.0, 9.0], [F, T, F]),
    ],
}


@MODES
def test_trace_of_staggered_episodes_is_exactly_as_written(mode, three_patients, toy_model):
    env = HydrogelVectorEnv(
        3,
        horizon=3,
        cohort=three_patients,
        reward_model=toy_model,
        reward_config=RewardConfig(novelty_bonus=0.125),
        autoreset_mode=mode,
    )
    patients, index = three_patients.features.numpy(), np.arange(3)
    env.reset()
    stagger(env, TOY_ACTION)
    done = np.array([F, F, F])
    for iteration, reward, terminated in TRACES[mode]:
        obs, info, flags = step_or_reset(env, TOY_ACTION, done)
        best = np.where(np.array(iteration) > 0, FIRST, 0.0)
        assert_same(obs, np.column_stack([patients, best, iteration]).astype(np.float32))
        before, done = done, np.array(terminated)
        if reward is None:
            assert_same(info, {"patient_index": index * before, "_patient_index": before})
            continue
        assert_same(flags, [np.float32(reward), done, np.array([F, F, F])])
        stepped = {"SameStep": ~done, "NextStep": ~before, "Disabled": ~(done & F)}[mode]
        assert_same((info["patient_index"], info["_score"]), (index, stepped))
        assert_same(info["score"], np.float32(reward) * stepped)
        assert_same(info["reward_novelty"], np.float32([0.125]) * (info["score"] == FIRST))
        if mode != "SameStep":
            assert "final_info" not in info
        elif done.any():
            last = [np.float32([*patients[i], FIRST[i], 3]) if done[i] else None for i in index]
            assert_same((list(info["final_obs"]), info["_final_obs"]), (last, done))
            assert_same(info["final_info"]["score"], np.float32(reward) * done)


def as_gymnasium_has_it(info: dict) -> dict:
    """An info of tensors without what holds for no environment, last observations one by one."""
    info = {key: x for key, x in info.items() if info[f"_{key.removeprefix('_')}"].any()}
    if "final_obs" in info:
        info["final_info"] = as_gymnasium_has_it(info["final_info"])
        rows = np.full(3, None)
        for row in info["_final_obs"].nonzero()[0]:
            rows[row] = tree_map(lambda x, row=row: x[row], info["final_obs"])
        info["final_obs"] = rows
    return info


# Every pair of mode and form of the observation, every action, rows that end together and not, by
# the horizon and by a limit of steps before it.
@pytest.mark.parametrize(
    ("mode", "obs_format", "action_format", "staggered", "limit"),
    [
        ("SameStep", "box", "dict", T, None),
        ("SameStep", "dict", "multidiscrete", F, 3),
        ("SameStep", "dict", "box", T, None),
        ("NextStep", "box", "multidiscrete", F, None),
        ("NextStep", "dict", "tuple", T, 3),
        ("Disabled", "box", "tuple", F, 3),
        ("Disabled", "dict", "dict", T, None),
    ],
)
def test_vector_agrees_with_gymnasiums_own_over_single_ones_and_tensors_with_arrays(
    mode, obs_format, action_format, staggered, limit, three_patients
):
    kwargs = {"cohort": three_patients, "observe_explored": True, "horizon": 5 if limit else 3}
    kwargs |= {"obs_format": obs_format, "action_format": action_format}
    ours, tensors = (
        make("vector", autoreset_mode=mode, output=output, max_episode_steps=limit, **kwargs)
        for output in ("numpy", "torch")
    )

    def single() -> gym.Env:
        return TimeLimit(HydrogelEnv(**kwargs), limit) if limit else HydrogelEnv(**kwargs)

    theirs = SyncVectorEnv([single] * 3, autoreset_mode=mode)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    actions = sampled(ours, 9)
    trace = rollout(ours, actions, staggered=staggered)
    assert any(flags[1 + bool(limit)].any() for _, _, flags in trace if flags)
    tensor_trace = rollout(tensors, to_torch(actions), staggered=staggered)
    for step, tensor_step in zip(trace, tensor_trace, strict=True):
        assert all(isinstance(array, torch.Tensor) for array in arrays(tensor_step))
        obs, info, flags = to_numpy(tensor_step)
        assert_same((obs, as_gymnasium_has_it(info), flags), step)
        assert ours.observation_space.contains(obs)
    assert len({tuple(info) for _, info, flags in tensor_trace if flags}) == 1  # the same keys
    if action_format != "box":  # which the processor rounds by its place in the batch
        for step, their_step in zip(
            trace, rollout(theirs, actions, staggered=staggered), strict=True
        ):
            obs, info, flags = step
            # Gymnasium's rewards are float64, ours float32.
            assert_same((obs, info, flags and [flags[0].astype(float), *flags[1:]]), their_step)
    assert len({tuple(info["patient_index"]) for _, info, flags in trace if flags}) > 2


@KINDS
def test_improvement_rewards_of_an_episode_add_up_to_its_best_score(kind):
    env = make(kind, horizon=5, reward_mode="improvement")
    trace = rollout(env, sampled(env, 5))
    total = sum(np.float64(flags[0]) for _, _, flags in trace[1:])
    best = np.max([info["score"] for _, info, flags in trace[1:] if "score" in info], axis=0)
    last = trace[-1][0] if kind == "single" else np.stack(trace[-1][1]["final_obs"])
    # Float32 sums of numbers of the size of the score.
    np.testing.assert_allclose(total, last[..., 11], rtol=1e-5)
    assert (last[..., 11] >= best).all()


def test_double_precision_is_that_of_the_model_throughout_and_never_of_the_default(make_stage1):
    double = make("vector", output="torch", horizon=2, dtype="float64")
    double.reset(seed=0)
    torch.set_default_dtype(torch.float64)
    try:
        single = make("vector", output="torch", horizon=2)
        obs, _ = single.reset(seed=0)
        action = sampled(single, 1)[0]
        _, expected, *_ = single.step(action)
        found = best_designs(Cohort(("a",), obs[:1, :11], shipped_cohort().extra[:1], "one"))
        weights = make_stage1().state_dict().values()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {x.dtype for x in weights if x.is_floating_point()} == {torch.float32}
    assert {obs.dtype, expected.dtype, found.design.formulation.dtype} == {torch.float32}
    action["formulation"] = torch.from_numpy(action["formulation"]).double() + 1e-12
    obs, reward, _, _, info = double.step(action)
    assert {obs.dtype, reward.dtype, info["formulation"].dtype} == {torch.float64}
    assert torch.equal(info["formulation"], action["formulation"])  # float32 would lose the 1e-12
    torch.testing.assert_close(reward.float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "send"), [("single", to_numpy), ("vector", to_numpy), ("vector", to_torch)]
)
def test_bad_action_or_outcome_leaves_the_state_as_it_was(kind, send, three_patients, toy_model):
    def broken_model(patient, polymer_id, formulation, coverage):
        outcomes = toy_model(patient, polymer_id, formulation, coverage)
        # Not where a model is looked at when it is loaded, in the middle of the formulations.
        broken = torch.where((polymer_id == 7) & (formulation[..., 0] < 6.0), NAN, 0.0)
        return outcomes._replace(delta_ef_pct=outcomes.delta_ef_pct + broken)

    kwargs = {"horizon": 3, "cohort": three_patients, "action_format": "multidiscrete"}
    env, twin, (good, *_) = twins(kind, reward_model=broken_model, **kwargs)
    for polymer, message in [
        (24, r"env 0: action\[0\] is 24; allowed: whole numbers 0 to 23"),
        (7, r"env 0: the reward model returned .* polymer_id=7, "),
    ]:
        with pytest.raises(ValueError, match=message):
            env.step(send(good * 0 + [polymer, 0, 0, 0, 0, 0]))
    assert_same(env.step(send(good)), twin.step(good))


def test_unchecked_action_that_is_not_allowed_earns_no_number():
    env = HydrogelVectorEnv(3, validate_actions=False, output="torch")
    env.reset(seed=0)
    action = env.action_space.sample() | {"polymer_id": np.array([0, 24, 1])}
    assert env.step(action)[1].isnan().tolist() == [F, T, F]


@pytest.mark.parametrize("action_format", ["dict", "multidiscrete"])
def test_next_step_ignores_the_actions_of_the_rows_that_it_resets_and_no_other(action_format):
    kwargs = {"horizon": 3, "action_format": action_format, "autoreset_mode": "NextStep"}
    env, twin, (good, *actions) = twins("vector", **kwargs)
    stagger(env, good), stagger(twin, good)

    def spoil(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        rows = rows.reshape(-1, *[1] * (x.ndim - 1))
        return np.where(rows, x.dtype.type(NAN if x.dtype.kind == "f" else -99), x)

    done, num_ended = np.array([F, F, F]), 0
    for action in actions:
        num_ended += done.sum()
        with pytest.raises(ValueError, match=f"^env {done.argmin()}: "):
            env.step(tree_map(functools.partial(spoil, rows=done | T), action))
        returned = env.step(tree_map(functools.partial(spoil, rows=done), action))
        assert_same(returned, twin.step(action))
        done = returned[2]
    assert num_ended > 2


@MODES
def test_environments_must_be_reset_before_anything_else_and_a_refused_reset_is_none(mode):
    env = HydrogelVectorEnv(3, autoreset_mode=AutoresetMode(mode))
    assert env.autoreset_mode is env.metadata["autoreset_mode"] is AutoresetMode(mode)
    with pytest.raises(ResetNeeded, match=r"call reset\(\) before step\(\)"):
        env.step(env.action_space.sample())
    with pytest.raises(ResetNeeded, match="reset every environment once before"):
        env.reset(options={"reset_mask": np.array([T, F, F])})
    with pytest.raises(ResetNeeded, match="before state_dict"):
        env.state_dict()
    env = gym.make("HydrogelDesign-v0")
    with pytest.raises(ValueError, match="no patient 'nobody'"):
        env.reset(options={"patient_id": "nobody"})
    for action in sampled(env, 2):
        with pytest.raises(ResetNeeded, match="the episode has ended or has not begun"):
            env.unwrapped.step(action)
        env.reset()
        assert np.isfinite(env.step(action)[1])


@MODES
def test_reset_mask_leaves_other_rows_bit_equal(mode):
    kwargs = {"horizon": 3, "observe_explored": True, "autoreset_mode": mode}
    env, twin, (action, later, *_) = twins("vector", **kwargs)
    _, first = env.reset(seed=0)
    twin.reset(seed=0)
    obs, twin_obs = env.step(action)[0], twin.step(action)[0]
    mask = np.array([F, T, F])
    # The seed that row 1 had from `seed=0`: it meets its first patient again.
    fresh, info = env.reset(seed=[9, 1, 9], options={"reset_mask": mask})
    assert_same(fresh[~mask], twin_obs[~mask])
    assert_same(fresh[1], np.float32([*obs[1, :11], *[0] * 26]))
    index = first["patient_index"] * mask
    assert_same(info, {"patient_index": index, "_patient_index": mask})
    for one, other in zip(env.step(later)[:4], twin.step(later)[:4], strict=True):
        assert_same(one[~mask], other[~mask])


def test_rows_outside_the_reset_mask_stay_ended():
    next_step, disabled = (make("vector", autoreset_mode=mode) for mode in ("NextStep", "Disabled"))
    action, *_ = sampled(next_step, 1)
    for env in (next_step, disabled):
        env.reset(seed=0)
        env.step(action)
        env.reset(options={"reset_mask": np.array([T, F, F])})
    with pytest.raises(ResetNeeded, match=r"env 1 has ended; reset it with reset\(options="):
        disabled.step(action)
    _, reward, terminated, _, info = next_step.step(action)
    assert terminated.tolist() == info["_score"].tolist() == [T, F, F]
    assert reward[1:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("assignment", ["fixed", "random"])
@KINDS
def test_picked_patient_stays_under_fixed_assignment_only(kind, assignment, three_patients):
    def later(options):
        env = make(kind, cohort=three_patients, patient_assignment=assignment)
        env.reset(seed=3, options=options)
        return [np.array(env.reset()[1]["patient_index"]).tolist() for _ in range(4)]

    picked = {"patient_id": [2, 2, 1] if kind == "vector" else 2}
    stays = [picked["patient_id"]] * 4
    assert later(picked) == (stays if assignment == "fixed" else later(None))


def test_number_is_an_id_where_ids_are_numbers_and_else_a_row(three_patients):
    numbered = Cohort(("1", "2", "007"), *dataclasses.astuple(three_patients)[1:])
    for form, cohort, name, rows in [
        (list, numbered, "patient_id", [0, 1, 0]),
        (np.array, numbered, "patient_id", [0, 1, 0]),
        (torch.tensor, numbered, "patient_id", [0, 1, 0]),
        (list, numbered, "patient_index", [1, 2, 1]),
        (np.array, three_patients, "patient_id", [1, 2, 1]),
    ]:
        options = {name: form([1, 2, 1])}
        info = make("vector", cohort=cohort).reset(options=options)[1]
        assert info["patient_index"].tolist() == rows
        info = make("single", cohort=cohort).reset(options={name: options[name][1]})[1]
        assert info["patient_index"] == rows[1]
    with pytest.raises(ValueError, match="three patients has no patient '7'; nearest: 007"):
        make("single", cohort=numbered).reset(options={"patient_id": 7})


def options(**kwargs) -> dict:
    return {"options": kwargs}


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        ("single", options(patient_id="dan"), "no patient 'dan'; nearest: "),
        ("single", options(patient=1), "allowed: ['patient_id', 'patient_index']"),
        ("single", options(reset_mask=1), "['reset_mask'] are unknown"),
        ("single", options(patient_id=1, patient_index=0), "patient_index; expected one"),
        ("single", options(patient_index=3), "patient_index is 3; allowed: whole numbers 0 to 2"),
        ("vector", options(patient_id=[0, 3, 1]), "env 1: patient_id is 3; allowed: whole"),
        ("vector", options(mask=1), "allowed: ['patient_id', 'patient_index', 'reset_mask']"),
        ("vector", options(reset_mask=np.array([T, F])), "(2,) array of torch.bool"),
        ("vector", options(reset_mask=np.array([1, 0, 0])), "int64; expected (3,) of bool, as ter"),
        ("vector", options(reset_mask=torch.tensor([2, 0, 1])), "int64; expected (3,) of bool, as"),
        ("vector", options(reset_mask=1), "reset_mask is a () array of torch.int64; expected (3,)"),
        ("vector", options(reset_mask=np.array([F, F, F])), "reset_mask is all False"),
        ("vector", {"seed": [1, 2]}, "seed has 2 entries; expected num_envs = 3"),
        ("vector", {"seed": [1, -2, 3]}, "seed is -2; allowed: whole numbers, 0 or more, or None"),
        ("vector", {"seed": [1, 2.0, 3]}, "seed is 2.0; allowed: whole numbers"),
        ("vector", {"seed": -1}, "seed is -1; allowed: whole numbers"),
        ("vector", {"seed": "1"}, "seed is '1'; allowed: whole numbers"),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_bad_reset_is_refused_with_its_reason_and_resets_nothing(
    kind, kwargs, message, three_patients
):
    env, twin, (action, *_) = twins(kind, horizon=3, cohort=three_patients)
    with pytest.raises(ValueError, match=re.escape(message)):
        env.reset(**{"seed": 7} | kwargs)
    assert_same(env.step(action), twin.step(action))
    assert_same(env.reset(), twin.reset())


@pytest.mark.parametrize(
    ("kind", "obs_format", "settings"),
    [
        ("single", "box", {}),
        ("vector", "dict", {"autoreset_mode": "SameStep"}),
        ("vector", "box", {"autoreset_mode": "SameStep", "output": "torch"}),
        ("vector", "box", {"autoreset_mode": "NextStep"}),
        ("vector", "dict", {"autoreset_mode": "Disabled", "output": "torch"}),
    ],
)
def test_arrays_handed_out_or_taken_in_share_no_memory_with_the_state(kind, obs_format, settings):
    kwargs = {"horizon": 3, "observe_explored": True, "obs_format": obs_format} | settings
    env, twin = (make(kind, patient_assignment="fixed", **kwargs) for _ in range(2))
    calls = [("step", {"action" + "s" * (kind == "vector"): x}) for x in sampled(env, 6)]
    calls.insert(3, ("reset", {}))
    if kind == "vector":
        calls.insert(4, ("reset", {"options": {"reset_mask": np.array([F, T, F])}}))
        calls.insert(0, ("reset", {"options": {"patient_id": np.array([5, 6, 7])}}))
    else:
        calls.insert(0, ("reset", {"seed": 0}))
    kept = []
    for name, arguments in calls:
        arguments = to_torch(arguments) if "output" in settings else arguments
        expected = getattr(twin, name)(**copy.deepcopy(arguments))
        kept.append((expected, copy.deepcopy(expected)))
        returned = getattr(env, name)(**arguments)
        assert_same(to_numpy(returned), to_numpy(expected))
        addresses = [torch.as_tensor(array).data_ptr() for array in arrays(returned)]
        assert len(set(addresses)) == len(addresses)
        for array in arrays([returned, arguments]):
            array[...] = 1
    for handed_out, as_it_was in kept:
        assert_same(to_numpy(handed_out), to_numpy(as_it_was))


@pytest.mark.parametrize(
    ("mode", "assignment"),
    [("SameStep", "random"), ("NextStep", "random"), ("NextStep", "fixed")],
)
def test_a_loaded_state_continues_as_the_saved_one_also_in_fewer_rows(mode, assignment):
    kwargs = {"horizon": 3, "autoreset_mode": mode, "patient_assignment": assignment}
    kwargs |= {"observe_explored": True}
    env, again = make("vector", **kwargs), make("vector", **kwargs)
    fewer = HydrogelVectorEnv(2, cohort=shipped_cohort(), **kwargs)
    env.reset(seed=3)
    actions = sampled(env, 8)
    stagger(env, actions[0])
    env.step(actions[1])
    state = env.state_dict()
    saved = copy.deepcopy(state)
    again.load_state_dict(saved)
    fewer.load_state_dict({name: rows[1:] for name, rows in saved.items()})
    for action in actions[2:]:
        expected = env.step(action)
        assert_same(again.step(action), expected)
        rows = fewer.step({name: rows[1:] for name, rows in action.items()})
        for one, other in zip(rows[:4], expected[:4], strict=True):
            np.testing.assert_allclose(one, other[1:], rtol=1e-6)
    assert_same(again.reset(), env.reset())
    assert all(torch.equal(rows, saved[name]) for name, rows in state.items())  # never written to


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("episode"), "expected ['best_score', 'done', 'episode'"),
        (lambda s: s.update(extra=s["done"]), "state has ['best_score', 'done', 'episode', 'expl"),
        (lambda s: s.update(done=s["done"][:2]), "'done' is a (2,) tensor of torch.bool"),
        (lambda s: s.update(best_score=s["best_score"].double()), "expected (3,) of torch.float32"),
        (lambda s: s["patient_index"].fill_(2000), "runs from 2000 to 2000; allowed: 0 to 1999"),
        (lambda s: s["home_index"].fill_(-1), "'home_index' runs from -1 to -1; allowed"),
    ],
    ids=["missing", "unknown", "shape", "dtype", "patient", "home"],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded(change, message):
    env, twin, (action, *_) = twins("vector")
    state = copy.deepcopy(env.state_dict())
    change(state)
    with pytest.raises(ValueError, match=re.escape(message)):
        env.load_state_dict(state)
    assert_same(env.step(action), twin.step(action))


def construct_and_step(results) -> None:
    env = make("vector")
    env.reset(seed=0)
    results.put(env.step(sampled(env, 1)[0])[1])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_environments_are_made_in_a_process_forked_from_one_with_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(1_000_000).exp().sum()  # starts the threads
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        context.Process(target=construct_and_step, args=(results,), daemon=True).start()
        assert np.isfinite(results.get(timeout=30)).all()
    finally:
        torch.set_num_threads(before)
