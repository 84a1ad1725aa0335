from __future__ import annotations

import copy
import functools
import inspect
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
from gymnasium.utils.env_match import check_environments_match
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import FlattenObservation, RecordEpisodeStatistics
from gymnasium.wrappers.vector import RecordEpisodeStatistics as VectorRecordEpisodeStatistics

from hydrogel_gym import Cohort, HydrogelEnv, HydrogelVectorEnv, RewardConfig, load_cohort
from hydrogel_gym.envs.spaces import episode_fields
from hydrogel_gym.problem.fields import (
    COVERAGES,
    FORMULATION_FIELDS,
    OUTCOME_FIELDS,
    PATIENT_FIELDS,
)
from hydrogel_gym.problem.polymers import NUM_POLYMERS
from hydrogel_gym.problem.reward import RewardTerms

ACTION_FORMATS = ("dict", "tuple", "box", "multidiscrete")
FORMATS = pytest.mark.parametrize("action_format", ACTION_FORMATS)
OBS_FORMATS = pytest.mark.parametrize("obs_format", ["box", "dict"], ids=["box-obs", "dict-obs"])
MODES = pytest.mark.parametrize("mode", [mode.value for mode in AutoresetMode])
KINDS = pytest.mark.parametrize("kind", ["single", "vector"])
SPACES = {
    "HydrogelDesign-v0": gym.spaces.Dict,
    "HydrogelDesignFlat-v0": gym.spaces.Box,
    "HydrogelDesignDiscrete-v0": gym.spaces.MultiDiscrete,
}
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


def each(function, value):
    """Apply a function to every array of a nest of dicts, tuples and lists."""
    if isinstance(value, dict):
        return {key: each(function, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(each(function, item) for item in value)
    return function(value)


def arrays(value) -> list:
    """Every array and tensor of a nest of dicts, tuples, lists and object arrays."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)) or getattr(value, "dtype", None) == "O":
        return [array for item in value for array in arrays(item)]
    return [value] if isinstance(value, (np.ndarray, torch.Tensor)) else []


def to_numpy(value):
    return each(lambda x: x.cpu().numpy() if isinstance(x, torch.Tensor) else x, value)


def to_torch(value, device="cpu"):
    return each(lambda x: torch.from_numpy(np.array(x)).to(device), value)


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


@pytest.mark.parametrize("horizon", [1, 5], ids=["horizon-1", "horizon-5"])
@OBS_FORMATS
@FORMATS
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


@pytest.mark.parametrize(
    ("env_id", "vectorization_mode"),
    [(env_id, mode) for env_id in SPACES for mode in (None, "sync")]
    # Its process loads torch, which takes seconds.
    + [("HydrogelDesign-v0", "async")],
)
def test_ids_make_single_and_vector_environments_that_agree(env_id, vectorization_mode):
    single = gym.make(env_id)
    assert isinstance(single.action_space, SPACES[env_id])
    kwargs = {
        None: {"patient_assignment": "random", "autoreset_mode": "NextStep"},
        "sync": {},
        # A fork of a process in which torch has threads may hang.
        "async": {"vector_kwargs": {"context": "spawn"}},
    }[vectorization_mode]
    num_envs = 1 if vectorization_mode == "async" else 2
    envs = gym.make_vec(env_id, num_envs, vectorization_mode, **kwargs)
    assert isinstance(envs, HydrogelVectorEnv) == (vectorization_mode is None)
    actions = sampled(envs, 3)
    trace = rollout(envs, actions)
    envs.close()
    for row in range(num_envs):
        alone = rollout(
            single, [row_of(action, row, envs.action_space) for action in actions], seed=row
        )
        for (obs, _, flags), (obs_alone, _, flags_alone) in zip(trace, alone, strict=True):
            assert_same(obs[row], obs_alone)
            if flags:
                assert flags[0][row] == (flags_alone[0] if flags_alone else 0.0)


def row_of(batch, row, space):
    """One action of a batch, as the single environment takes it."""
    return list(gym.vector.utils.iterate(space, batch))[row]


@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [
        ("HydrogelDesign-v0", {}),
        ("HydrogelDesignFlat-v0", {"horizon": 2}),
        (
            "HydrogelDesign-v0",
            {
                "device": "cpu",
                "horizon": 3,
                "cohort": "holdout",
                "reward_model": "mechanistic",
                "action_format": "tuple",
                "obs_format": "dict",
                "observe_explored": True,
                "reward_mode": "improvement",
                "patient_assignment": "random",
            },
        ),
    ],
    ids=["default", "flat", "every keyword"],
)
@KINDS
def test_spec_survives_json(kind, env_id, kwargs):
    maker = gym.make
    if kind == "vector":
        maker, kwargs = gym.make_vec, kwargs | {"num_envs": 3, "autoreset_mode": "NextStep"}
    env = maker(env_id, **kwargs)
    spec = EnvSpec.from_json(env.spec.to_json())
    assert spec.kwargs.items() >= kwargs.items()
    again = maker(spec)
    assert again.unwrapped.spec.to_json() == env.unwrapped.spec.to_json()
    actions = sampled(env, 4)
    assert_same(rollout(again, actions), rollout(env, actions))


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))],
    ids=["copy", "pickle"],
)
@KINDS
def test_copy_made_within_an_episode_continues_identically_and_on_its_own(kind, duplicate):
    env = make(kind, horizon=4, observe_explored=True)
    actions = sampled(env, 4)
    env.reset(seed=3)
    env.step(actions[0])
    first, second = duplicate(env), duplicate(env)
    ahead = [first.step(action) for action in actions[1:]] + [first.reset()]
    assert_same([second.step(action) for action in actions[1:]] + [second.reset()], ahead)
    assert_same([env.step(action) for action in actions[1:]] + [env.reset()], ahead)


@KINDS
def test_seed_decides_everything(kind):
    env, twin = make(kind, horizon=2), make(kind, horizon=2)
    actions = sampled(env, 6)
    trace = rollout(env, actions, seed=11)
    assert_same(rollout(twin, actions, seed=11), trace)
    assert_same(rollout(env, actions, seed=11), trace)
    assert not data_equivalence(rollout(twin, actions, seed=12), trace)


@KINDS
def test_global_generators_are_never_touched(kind):
    def states():
        legacy = np.random.get_state()  # noqa: NPY002
        return random.getstate(), legacy, torch.get_rng_state().numpy()

    before = states()
    env = make(kind)
    rollout(env, sampled(env, 3), seed=None)
    assert_same(states(), before)


def test_list_of_seeds_begins_anew_the_rows_that_have_one():
    env, twin = make("vector"), make("vector")
    first = env.reset(seed=[5, 6, 7])
    assert_same(twin.reset(seed=np.int64(5)), first)
    following = twin.reset()[1]["patient_index"]
    mixed = env.reset(seed=[5, None, 7])[1]["patient_index"]
    drawn = first[1]["patient_index"]
    assert mixed.tolist() == [drawn[0], following[1], drawn[2]]


@FORMATS
@OBS_FORMATS
@KINDS
def test_observations_stay_inside_their_space(kind, obs_format, action_format):
    env = make(
        kind, obs_format=obs_format, action_format=action_format, observe_explored=True, horizon=3
    )
    for obs, *_ in rollout(env, sampled(env, 7)):
        assert env.observation_space.contains(obs)


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
        ({"num_envs": 0}, "num_envs is 0; allowed: a whole number, 1 or more"),
        ({"num_envs": 2, "output": "jax"}, "output is 'jax'; allowed: ('numpy', 'torch')"),
        ({"num_envs": 2, "autoreset_mode": "Same"}, "autoreset_mode is 'Same'; allowed: ('NextSt"),
    ],
    ids=lambda value: [*value][-1] if isinstance(value, dict) else "",
)
def test_argument_that_is_not_allowed_is_refused_with_its_name(changes, message):
    for env_class in (HydrogelVectorEnv, *([] if "num_envs" in changes else [HydrogelEnv])):
        with pytest.raises(ValueError, match=re.escape(message)):
            env_class(**changes)


@MODES
def test_autoreset_mode_is_an_attribute_and_in_the_metadata_of_the_instance(mode):
    env = HydrogelVectorEnv(2, autoreset_mode=mode)
    assert env.autoreset_mode is env.metadata["autoreset_mode"] is AutoresetMode(mode)
    assert HydrogelVectorEnv.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP


@pytest.fixture(scope="module")
def manual() -> str:
    return inspect.getdoc(HydrogelEnv)


@pytest.fixture(scope="module")
def tables(manual) -> list[list[list[str]]]:
    """Cells of the tables in the manual: actions, observations, arguments."""
    blocks = re.findall(r"^\|.*\n\|[-|]+\n((?:\|.*\n)+)", manual, re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        for block in blocks
    ]


def test_manual_has_the_headings_of_gymnasium_in_their_order(manual):
    assert re.findall(r"^## (.*)$", manual, re.MULTILINE) == [
        "Description",
        "Action Space",
        "Observation Space",
        "Rewards",
        "Starting State",
        "Episode End",
        "Arguments",
        "Version History",
    ]


def test_manual_lists_the_action_as_the_space_has_it(tables):
    formulation = [
        ["formulation", str(i), item.name, f"{item.low:g}", f"{item.high:g}"]
        for i, item in enumerate(FORMULATION_FIELDS)
    ]
    assert [row[:5] for row in tables[0]] == [
        ["polymer_id", "", "row of the polymer table", "0", str(NUM_POLYMERS - 1)],
        *formulation,
        ["coverage", "", ", ".join(COVERAGES), "0", str(len(COVERAGES) - 1)],
    ]


def test_manual_lists_the_observation_as_the_space_has_it(tables):
    fields = (*PATIENT_FIELDS, *episode_fields(1, RewardConfig().max_score))
    expected = [
        [str(i), item.name, f"{item.low:g}", f"{item.high:g}"] for i, item in enumerate(fields)
    ]
    expected[-1][-1] = "horizon"
    assert [row[:4] for row in tables[1]] == expected


def test_manual_lists_the_arguments_with_their_defaults(tables):
    documented = {name.strip("`"): default.strip("`") for name, _, default, _ in tables[2]}
    assert documented == {
        name: repr(item.default).replace("'", '"')
        for name, item in inspect.signature(HydrogelEnv).parameters.items()
    }


def test_manual_names_the_terms_of_the_reward_and_everything_in_info(manual):
    rewards = manual.split("## Rewards")[1].split("## Starting State")[0]
    config = RewardConfig()
    terms = re.findall(r"^- `(\w+)`: (.*)$", rewards, re.MULTILINE)
    assert {name: list(map(float, re.findall(r"[-+]?\d[\d.]*", x))) for name, x in terms} == {
        "reward_delta_ef": [config.delta_ef_weight],
        "reward_stress_reduction": [config.stress_reduction_weight, 100.0],
        "reward_optimal_prob": [config.optimal_prob_weight],
        "reward_toxicity": [-config.toxicity_penalty, config.toxicity_limit],
        "reward_integrity": [-config.integrity_penalty, config.integrity_limit],
        "reward_fibrosis": [-config.fibrosis_penalty, config.fibrosis_limit],
        "reward_novelty": [config.novelty_bonus],
    }
    assert tuple(name for name, _ in terms) == RewardTerms._fields
    env = HydrogelEnv()
    _, (_, info, _) = rollout(env, sampled(env, 1))
    assert set(info) <= set(re.findall(r"`(\w+)`", rewards))
    assert set(info) >= {item.name for item in OUTCOME_FIELDS} | set(RewardTerms._fields)
    assert not set(info) & {"episode", "state"}


def test_vector_arguments_have_the_defaults_of_the_single_ones_but_for_the_assignment():
    single, vector = (
        {name: item.default for name, item in inspect.signature(env_class).parameters.items()}
        for env_class in (HydrogelEnv, HydrogelVectorEnv)
    )
    assert {name for name in single if single[name] != vector[name]} == {"patient_assignment"}
    assert {name: vector[name] for name in vector if name not in single} == {
        "num_envs": 2000,
        "output": "numpy",
        "autoreset_mode": "SameStep",
        "validate_actions": None,
        "compile": False,
        "dtype": "float32",
    }


class FirstRow(gym.Env):
    """The only row of a vector environment as a single environment."""

    def __init__(self, **kwargs):
        self.envs = HydrogelVectorEnv(
            1, patient_assignment="random", autoreset_mode="Disabled", **kwargs
        )
        self.action_space = self.envs.single_action_space
        self.observation_space = self.envs.single_observation_space

    def reset(self, *, seed=None, options=None):
        obs, info = self.envs.reset(seed=seed, options=options)
        return each(lambda rows: rows[0], obs), self._info(info)

    def step(self, action):
        obs, *flags, info = self.envs.step(each(lambda x: np.asarray(x)[None], action))
        return (
            each(lambda rows: rows[0], obs),
            *(flag.item() for flag in flags),
            self._info(info),
        )

    def _info(self, info):
        assert all(info[f"_{key}"].all() for key in info if not key.startswith("_"))
        return {
            key: rows[0] if rows.dtype == np.float32 else rows[0].item()
            for key, rows in info.items()
            if not key.startswith("_")
        }


@OBS_FORMATS
@FORMATS
def test_single_environment_matches_the_row_of_a_vector_of_one(action_format, obs_format):
    kwargs = {"horizon": 3, "action_format": action_format, "obs_format": obs_format}
    check_environments_match(HydrogelEnv(**kwargs), FirstRow(**kwargs), num_steps=7)


# A constant design each for Ann, Bo and Cy: it scores FIRST when its polymer is new, then LATER.
TOY_ACTION = {
    "polymer_id": np.array([1, 2, 3]),
    "formulation": np.float32([[20.0, 30.0, 0.0, 5.0]] * 3),
    "coverage": np.array([0, 0, 0]),
}
FIRST, LATER = np.float32([3.625, 6.125, 9.125]), np.float32([3.5, 6.0, 9.0])
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
PATIENT_INDEX = {"patient_index": np.arange(3)}


def masked(values: dict, mask: np.ndarray) -> dict:
    """Info of Gymnasium's form: zero where the mask is false; nothing if it is false everywhere."""
    info = {}
    for key, value in values.items() if mask.any() else ():
        rows = mask[:, None] if value.ndim == 2 else mask
        info |= {key: np.where(rows, value, np.zeros_like(value)), f"_{key}": mask}
    return info


def toy_info(score: np.ndarray) -> dict:
    """Info of a step with TOY_ACTION."""
    zero, half = np.zeros(3, np.float32), np.full(3, 0.5, np.float32)
    return {
        "delta_ef_pct": np.float32([1, 2, 3]),
        "stress_reduction_pct": zero,
        "optimal_logit": zero,
        "toxicity_risk": zero,
        "structural_integrity": zero + 1,
        "fibrosis_risk": np.float32([0, 0.25, 0.5]),
        "reward_delta_ef": np.float32([3, 6, 9]),
        "reward_stress_reduction": zero,
        "reward_optimal_prob": half,
        "reward_toxicity": zero,
        "reward_integrity": zero,
        "reward_fibrosis": np.float32([0, -0.5, -0.5]),
        "reward_novelty": np.where(score == FIRST, half / 4, zero),
        "score": score,
        "is_optimal": np.array([F, F, F]),
        "formulation": TOY_ACTION["formulation"],
        "formulation_clipped": np.array([F, F, F]),
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
    patients, everyone = three_patients.features.numpy(), np.array([T, T, T])
    env.reset()
    stagger(env, TOY_ACTION)
    done = np.array([F, F, F])
    for iteration, reward, terminated in TRACES[mode]:
        obs, info, flags = step_or_reset(env, TOY_ACTION, done)
        best = np.where(np.array(iteration) > 0, FIRST, 0.0)
        assert_same(obs, np.column_stack([patients, best, iteration]).astype(np.float32))
        before, done = done, np.array(terminated)
        if reward is None:
            assert_same((info, flags), (masked(PATIENT_INDEX, before), None))
            continue
        reward = np.float32(reward)
        assert_same(flags, [reward, done, np.array([F, F, F])])
        stepped = {"SameStep": ~done, "NextStep": ~before, "Disabled": everyone}[mode]
        expected = masked(toy_info(reward), stepped) | masked(PATIENT_INDEX, everyone)
        if mode == "SameStep" and done.any():
            final_obs = np.full(3, None)
            for row in done.nonzero()[0]:
                final_obs[row] = np.float32([*patients[row], FIRST[row], 3])
            final_info = masked(toy_info(reward) | PATIENT_INDEX, done)
            expected |= {"final_obs": final_obs, "_final_obs": done}
            expected |= {"final_info": final_info, "_final_info": done}
        assert_same(info, expected)


@pytest.mark.parametrize("staggered", [True, False], ids=["staggered", "in-step"])
@pytest.mark.parametrize("action_format", ["dict", "tuple", "multidiscrete"])
@OBS_FORMATS
@MODES
def test_vector_environment_agrees_with_gymnasiums_own_over_single_ones(
    mode, obs_format, action_format, staggered, three_patients
):
    kwargs = {
        "horizon": 3,
        "cohort": three_patients,
        "obs_format": obs_format,
        "action_format": action_format,
        "observe_explored": True,
    }
    ours = make("vector", autoreset_mode=mode, **kwargs)
    theirs = SyncVectorEnv([lambda: HydrogelEnv(**kwargs)] * 3, autoreset_mode=mode)
    actions = sampled(ours, 9)
    our_trace = rollout(ours, actions, staggered=staggered)
    for (obs, info, flags), (obs_2, info_2, flags_2) in zip(
        our_trace, rollout(theirs, actions, staggered=staggered), strict=True
    ):
        assert_same((obs, info), (obs_2, info_2))
        # Gymnasium's rewards are float64, ours float32.
        assert_same(flags and [flags[0].astype(float), *flags[1:]], flags_2)
    drawn = {tuple(info["patient_index"]) for _, info, flags in our_trace if flags}
    assert len(drawn) > 2


@OBS_FORMATS
@FORMATS
@MODES
def test_torch_output_equals_numpy_output(mode, action_format, obs_format):
    kwargs = {
        "horizon": 3,
        "action_format": action_format,
        "obs_format": obs_format,
        "autoreset_mode": mode,
    }
    env, numpy_env = make("vector", output="torch", **kwargs), make("vector", **kwargs)
    actions = sampled(numpy_env, 7)
    trace = rollout(env, to_torch(actions), staggered=True)
    np_trace = rollout(numpy_env, actions, staggered=True)
    for (obs, info, flags), (np_obs, np_info, np_flags) in zip(trace, np_trace, strict=True):
        assert all(isinstance(array, torch.Tensor) for array in arrays([obs, info, flags or ()]))
        assert_same(to_numpy((obs, flags)), (np_obs, np_flags))
        assert_info_equals_numpy(to_numpy(info), np_info)
    assert len({tuple(info) for _, info, flags in trace if flags}) == 1  # keys never change


def assert_info_equals_numpy(info: dict, np_info: dict) -> None:
    """Equal where a mask holds, else zero; Gymnasium leaves out what holds for no environment."""
    assert np_info.keys() <= info.keys()
    for key in [key for key in info if not key.startswith("_")]:
        mask = info[f"_{key}"]
        assert_same(mask, np_info.get(f"_{key}", np.zeros(3, bool)))
        for row in range(3):
            value = each(lambda x, row=row: np.asarray(x[row]), info[key])
            if mask[row]:
                np_value = each(lambda x, row=row: x[row], np_info[key])
                assert_same(value, each(np.asarray, np_value))
            elif key != "final_obs":  # holds the last observation of every row
                assert not any(array.any() for array in arrays(value))


BAD = {
    "dict": (lambda a: a | {"polymer_id": a["polymer_id"] + 24}, "polymer_id is "),
    "tuple": (lambda a: (a[0], a[1] * NAN, a[2]), "formulation[0] is nan; "),
    "box": (lambda a: a[..., 1:], "action has shape "),
    "multidiscrete": (lambda a: a - 30, "action[0] is -"),
}


@pytest.mark.parametrize("library", ["numpy", "torch"])
@FORMATS
@KINDS
def test_bad_action_leaves_the_state_as_it_was(kind, action_format, library):
    env, twin = (make(kind, horizon=3, action_format=action_format) for _ in range(2))
    good, later = sampled(env, 2)
    spoil, message = BAD[action_format]
    bad = to_torch(spoil(good)) if library == "torch" else spoil(good)
    for each_env in (env, twin):
        each_env.reset(seed=0)
        each_env.step(good)
    with pytest.raises(ValueError, match=re.escape(message)):
        env.step(bad)
    assert_same(env.step(later), twin.step(later))


def test_formulation_outside_its_box_is_clipped_and_flagged():
    env = HydrogelVectorEnv(3, action_format="box", autoreset_mode="Disabled")
    env.reset(seed=0)
    action = np.zeros((3, 32))
    action[1, :4] = [0.2, 1e6, -3.0, 0.5]
    info = env.step(action)[4]
    assert info["formulation_clipped"].tolist() == [F, T, F]
    np.testing.assert_allclose(info["formulation"][1], [20.0, 180.0, 0.0, 4.0], rtol=1e-6)


@FORMATS
def test_next_step_ignores_the_actions_of_rows_that_it_resets(action_format):
    env, twin = (
        make("vector", horizon=3, action_format=action_format, autoreset_mode="NextStep")
        for _ in range(2)
    )
    good, *actions = sampled(env, 6)
    for each_env in (env, twin):
        each_env.reset(seed=0)
        stagger(each_env, good)
    done = np.array([F, F, F])

    def spoil(x: np.ndarray) -> np.ndarray:
        rows = done.reshape(-1, *[1] * (x.ndim - 1))
        return np.where(rows, x.dtype.type(NAN if x.dtype.kind == "f" else -99), x)

    for action in actions:
        returned = env.step(each(spoil, action))
        assert_same(returned, twin.step(action))
        done = returned[2]
    assert done.any()


@MODES
def test_vector_environment_must_be_reset_before_a_step(mode):
    env = HydrogelVectorEnv(3, autoreset_mode=mode)
    with pytest.raises(ResetNeeded, match=r"call reset\(\) before step\(\)"):
        env.step(env.action_space.sample())
    with pytest.raises(ResetNeeded, match="reset every environment once before"):
        env.reset(options={"reset_mask": np.array([T, F, F])})


def test_single_environment_must_be_reset_before_an_episode():
    env = HydrogelEnv()
    for action in sampled(env, 2):
        with pytest.raises(ResetNeeded, match="the episode has ended or has not begun"):
            env.step(action)
        env.reset()
        env.step(action)


def test_disabled_mode_refuses_to_step_an_episode_that_has_ended():
    env = make("vector", horizon=3, autoreset_mode="Disabled")
    action, *_ = sampled(env, 1)
    env.reset(seed=0)
    stagger(env, action)
    env.step(action)
    with pytest.raises(ResetNeeded, match=r"env 2 has ended; reset it with reset\(options="):
        env.step(action)


@MODES
def test_reset_mask_leaves_other_rows_bit_equal(mode):
    kwargs = {"horizon": 3, "observe_explored": True, "autoreset_mode": mode}
    env, twin = make("vector", **kwargs), make("vector", **kwargs)
    action, later = sampled(env, 2)
    _, first = env.reset(seed=0)
    twin.reset(seed=0)
    obs, twin_obs = env.step(action)[0], twin.step(action)[0]
    mask = np.array([F, T, F])
    # The seed that row 1 had from `seed=0`: it meets its first patient again.
    fresh, info = env.reset(seed=[9, 1, 9], options={"reset_mask": mask})
    assert_same(fresh[~mask], twin_obs[~mask])
    assert_same(fresh[1], np.float32([*obs[1, :11], *[0] * 26]))
    assert_same(info, masked({"patient_index": first["patient_index"]}, mask))
    for one, other in zip(env.step(later)[:4], twin.step(later)[:4], strict=True):
        assert_same(one[~mask], other[~mask])


def test_rows_outside_the_reset_mask_stay_ended():
    next_step, disabled = (make("vector", autoreset_mode=mode) for mode in ("NextStep", "Disabled"))
    action, *_ = sampled(next_step, 1)
    for env in (next_step, disabled):
        env.reset(seed=0)
        env.step(action)
        env.reset(options={"reset_mask": np.array([T, F, F])})
    with pytest.raises(ResetNeeded, match="env 1 has ended"):
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


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        ("single", {"options": {"patient_id": "dan"}}, "no patient 'dan'; nearest: "),
        (
            "single",
            {"options": {"patient_id": 3}},
            "patient_id is 3; allowed: whole numbers 0 to 2",
        ),
        ("single", {"options": {"patient": 1}}, "['patient'] are unknown; allowed: ['patient_id']"),
        ("single", {"options": {"reset_mask": 1}}, "['reset_mask'] are unknown"),
        (
            "vector",
            {"options": {"patient_id": [0, 3, 1]}},
            "env 1: patient_id is 3; allowed: whole",
        ),
        ("vector", {"options": {"mask": 1}}, "allowed: ['patient_id', 'reset_mask']"),
        ("vector", {"options": {"reset_mask": np.array([T, F])}}, "(2,) array of torch.bool"),
        ("vector", {"options": {"reset_mask": np.array([1, 0, 0])}}, "array of torch.int64; expec"),
        ("vector", {"options": {"reset_mask": np.array([F, F, F])}}, "reset_mask is all False"),
        ("vector", {"seed": [1, 2]}, "seed has 2 entries; expected num_envs = 3"),
        ("vector", {"seed": [1, -2, 3]}, "seed is -2; allowed: whole numbers, 0 or more, or None"),
        ("vector", {"seed": [1, 2.0, 3]}, "seed is 2.0; allowed: whole numbers"),
        ("vector", {"seed": -1}, "seed is -1; allowed: whole numbers"),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_bad_reset_is_refused_with_its_reason_and_resets_nothing(
    kind, kwargs, message, three_patients
):
    env, twin = (make(kind, horizon=3, cohort=three_patients) for _ in range(2))
    action, later = sampled(env, 2)
    for each_env in (env, twin):
        each_env.reset(seed=0)
        each_env.step(action)
    with pytest.raises(ValueError, match=re.escape(message)):
        env.reset(**{"seed": 7} | kwargs)
    assert_same(env.step(later), twin.step(later))
    assert_same(env.reset(), twin.reset())


@pytest.mark.parametrize("output", ["numpy", "torch"])
@OBS_FORMATS
@MODES
def test_arrays_handed_out_or_taken_in_share_no_memory_with_the_state(mode, obs_format, output):
    def run(overwrite: bool) -> list:
        """What an environment returns, everything being overwritten after each call or not."""
        env = make(
            "vector",
            horizon=3,
            obs_format=obs_format,
            observe_explored=True,
            output=output,
            autoreset_mode=mode,
            patient_assignment="fixed",
        )
        steps = [(env.step, {"actions": action}) for action in sampled(env, 7)]
        picked, all_of_them, middle = (
            (env.reset, {"options": {name: np.array(value)}})
            for name, value in [
                ("patient_id", [5, 6, 7]),
                ("reset_mask", [T, T, T]),
                ("reset_mask", [F, T, F]),
            ]
        )
        first = steps[: 3 if mode == "Disabled" else 4]
        handed_out, snapshots = [], []
        for call, arguments in [picked, *first, all_of_them, *steps[4:6], middle, steps[6]]:
            arguments = to_torch(arguments) if output == "torch" else arguments
            handed_out.append(call(**arguments))
            snapshots.append(copy.deepcopy(handed_out[-1]))
            addresses = [torch.as_tensor(array).data_ptr() for array in arrays(handed_out[-1])]
            assert len(set(addresses)) == len(addresses)
            for array in arrays([handed_out[-1], arguments]) if overwrite else ():
                array[...] = 1
        if not overwrite:
            assert_same(to_numpy(handed_out), to_numpy(snapshots))
        return to_numpy(snapshots)

    assert_same(run(overwrite=True), run(overwrite=False))


def test_single_environment_shares_no_memory_with_what_it_handed_out():
    env, twin = (make("single", horizon=4, observe_explored=True) for _ in range(2))
    assert_same(env.reset(seed=1), twin.reset(seed=1))
    for action in sampled(env, 4):
        returned = env.step(action)
        assert_same(returned, twin.step(action))
        for array in arrays([returned, action]):
            array[...] = 1


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


@pytest.mark.parametrize("action_format", ["dict", "box", "multidiscrete"])
@OBS_FORMATS
@MODES
def test_torch_path_reads_nothing_on_the_host(mode, obs_format, action_format):
    """On the meta device a tensor has no values, so that any read raises."""
    env = make(
        "vector",
        horizon=2,
        device="meta",
        output="torch",
        action_format=action_format,
        obs_format=obs_format,
        autoreset_mode=mode,
        observe_explored=True,
    )
    action = to_torch(sampled(env, 1)[0], "meta")
    mask = torch.tensor([T, F, T], device="meta")
    trace = [env.reset(seed=0), env.step(action), env.step(action)]
    trace += [env.reset(options={"reset_mask": mask, "patient_id": [1, 2, 3]}), env.step(action)]
    assert all(array.is_meta and len(array) == 3 for array in arrays(trace))
    assert len(arrays(trace)) > 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@MODES
def test_step_on_cuda_equals_the_cpu_and_never_waits_for_the_device(mode):
    env, cpu_env = (
        make("vector", horizon=2, device=device, output="torch", autoreset_mode=mode)
        for device in ("cuda", "cpu")
    )
    action, *_ = to_torch(sampled(env, 1))
    cuda_action, mask = to_torch([action, np.array([T, T, T])], "cuda")
    env.reset(seed=0)
    env.step(cuda_action)
    try:
        torch.cuda.set_sync_debug_mode("error")
        returned = env.step(cuda_action)
        env.reset(options={"reset_mask": mask})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(array.is_cuda for array in arrays(returned))
    cpu_env.reset(seed=0)
    cpu_env.step(action)
    for one, other in zip(arrays(returned), arrays(cpu_env.step(action)), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-4)


@KINDS
def test_outcome_that_is_not_finite_leaves_the_state_as_it_was(kind, three_patients, toy_model):
    def broken_model(patient, polymer_id, formulation, coverage):
        outcomes = toy_model(patient, polymer_id, formulation, coverage)
        # Not where a model is looked at when it is loaded, in the middle of the formulations.
        broken = torch.where((polymer_id == 7) & (formulation[..., 0] < 6.0), NAN, 0.0)
        return outcomes._replace(delta_ef_pct=outcomes.delta_ef_pct + broken)

    kwargs = {"horizon": 3, "cohort": three_patients, "action_format": "multidiscrete"}
    env, twin = (make(kind, reward_model=broken_model, **kwargs) for _ in range(2))
    env.reset(seed=0)
    twin.reset(seed=0)
    good = np.zeros(env.action_space.shape, np.int64)
    with pytest.raises(ValueError, match=r"env 0: the reward model returned .* polymer_id=7, "):
        env.step(good + [7, 0, 0, 0, 0, 0])
    assert_same(env.step(good), twin.step(good))


@MODES
def test_vector_episode_statistics_of_gymnasium_add_up(mode):
    if mode == "SameStep" and tuple(map(int, gym.__version__.split(".")[:2])) < (1, 4):
        pytest.skip("this Gymnasium's wrapper counts as if the next step were a reset")
    env = make("vector", horizon=3, autoreset_mode=mode)
    env = VectorRecordEpisodeStatistics(env)
    trace = rollout(env, sampled(env, 4), staggered=True)
    ended = [(info["episode"], flags[1]) for _, info, flags in trace if flags and "episode" in info]
    assert len(ended) == {"SameStep": 4, "NextStep": 3, "Disabled": 2}[mode]
    for episode, done in ended:
        assert set(episode["l"][done]) == {3}
    assert list(env.return_queue)[0] == pytest.approx(
        sum(np.float64(flags[0][2]) for _, _, flags in trace[:6] if flags)
    )


def test_single_wrappers_of_gymnasium_apply():
    env = gym.make("HydrogelDesign-v0", horizon=5, obs_format="dict", max_episode_steps=2)
    env = RecordEpisodeStatistics(FlattenObservation(env))
    assert env.observation_space.shape == (13,)
    _, first, (obs, info, flags) = rollout(env, sampled(env, 2))
    assert env.observation_space.contains(obs)
    assert flags[1:] == [F, T]
    assert info["episode"]["l"] == 2
    assert info["episode"]["r"] == pytest.approx(first[2][0] + flags[0])


# --- saved state


@pytest.mark.parametrize("assignment", ["fixed", "random"])
@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_a_loaded_state_continues_as_the_saved_one(mode, assignment):
    kwargs = dict(
        horizon=3, autoreset_mode=mode, patient_assignment=assignment, cohort=shipped_cohort()
    )
    env = HydrogelVectorEnv(8, observe_explored=True, **kwargs)
    env.reset(seed=3)
    # Rows out of step with each other.
    actions = sampled(env, 9)
    env.step(actions[0])
    env.reset(options={"reset_mask": np.arange(8) % 2 == 0})
    env.step(actions[1])
    saved = copy.deepcopy(env.state_dict())
    again = HydrogelVectorEnv(8, observe_explored=True, **kwargs)
    again.load_state_dict(saved)
    for action in actions[2:]:
        assert data_equivalence(env.step(action), again.step(action))
    assert data_equivalence(env.reset(), again.reset())


def test_rows_of_a_saved_state_make_a_smaller_environment():
    env = HydrogelVectorEnv(8, horizon=4, cohort=shipped_cohort(), output="torch")
    env.reset(seed=0)
    actions = sampled(env, 2)
    env.step(actions[0])
    half = HydrogelVectorEnv(4, horizon=4, cohort=shipped_cohort(), output="torch")
    half.load_state_dict({name: rows[4:] for name, rows in env.state_dict().items()})
    obs, reward, *_ = env.step(actions[1])
    half_obs, half_reward, *_ = half.step({k: v[4:] for k, v in actions[1].items()})
    torch.testing.assert_close(half_obs, obs[4:])
    torch.testing.assert_close(half_reward, reward[4:])


def test_a_saved_state_is_not_written_to():
    env = HydrogelVectorEnv(3, horizon=4, cohort=shipped_cohort())
    env.reset(seed=0)
    saved = env.state_dict()
    before = copy.deepcopy(saved)
    env.step(env.action_space.sample())
    assert all(torch.equal(saved[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("episode"), "expected ['best_score', 'done', 'episode'"),
        (lambda s: s.update(extra=s["done"]), "state has ['best_score', 'done', 'episode', 'expl"),
        (lambda s: s.update(done=s["done"][:2]), "'done' is a (2,) tensor of torch.bool"),
        (lambda s: s.update(best_score=s["best_score"].double()), "expected (3,) of torch.float32"),
        (lambda s: s["patient_index"].fill_(2000), "runs from 2000 to 2000; allowed: 0 to 1999"),
    ],
    ids=["missing", "unknown", "shape", "dtype", "patient"],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded(change, message):
    env = HydrogelVectorEnv(3, cohort=shipped_cohort())
    env.reset(seed=0)
    before = copy.deepcopy(env.state_dict())
    state = copy.deepcopy(before)
    change(state)
    with pytest.raises(ValueError, match=re.escape(message)):
        env.load_state_dict(state)
    assert all(torch.equal(rows, before[name]) for name, rows in env.state_dict().items())


def test_there_is_no_state_before_the_first_reset():
    with pytest.raises(ResetNeeded, match="before state_dict"):
        HydrogelVectorEnv(3, cohort=shipped_cohort()).state_dict()


# --- double precision


def test_double_precision_is_that_of_the_model_throughout():
    single, double = (
        HydrogelVectorEnv(64, cohort=shipped_cohort(), output="torch", horizon=2, dtype=dtype)
        for dtype in ("float32", "float64")
    )
    double.reset(seed=0)
    single.reset(seed=0)
    action = sampled(single, 1)[0]
    _, expected, *_ = single.step(action)
    action["formulation"] = torch.from_numpy(action["formulation"]).double() + 1e-12
    obs, reward, _, _, info = double.step(action)
    assert {obs.dtype, reward.dtype, info["formulation"].dtype} == {torch.float64}
    assert torch.equal(info["formulation"], action["formulation"])  # float32 would lose the 1e-12
    torch.testing.assert_close(reward.float(), expected, rtol=1e-4, atol=1e-4)


def test_double_precision_needs_tensors_since_the_spaces_are_of_float32():
    with pytest.raises(ValueError, match=r"dtype is 'float64'; allowed: \('float32',\)"):
        HydrogelVectorEnv(3, cohort=shipped_cohort(), dtype="float64")
