"""`HydrogelAdapt-v0`: hidden responses, measurements, the history, and stopping."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch.utils._pytree import tree_leaves, tree_map

from hydrogel_gym import (
    HydrogelAdaptEnv,
    HydrogelAdaptVectorEnv,
    HydrogelEnv,
    HydrogelVectorEnv,
    RewardConfig,
    compute_reward,
    load_cohort,
)
from hydrogel_gym.models.mechanistic import MechanisticModel
from hydrogel_gym.problem.adaptive import MEASURED_FIELDS, SLOT_WIDTH, slot_fields
from hydrogel_gym.problem.fields import OUTCOME_FIELDS, Outcomes

MODES = ["SameStep", "NextStep", "Disabled"]
NAMES = [item.name for item in slot_fields(RewardConfig())]


@functools.cache
def cohort():
    return load_cohort()


def make(**kwargs) -> HydrogelAdaptVectorEnv:
    return HydrogelAdaptVectorEnv(
        3, **{"cohort": cohort(), "patient_assignment": "random", "horizon": 3} | kwargs
    )


def sampled(env, num: int) -> list:
    env.action_space.seed(0)
    return [env.action_space.sample() for _ in range(num)]


def rollout(env, actions, seed=0) -> list:
    trace, done = [env.reset(seed=seed)], np.zeros(3, bool)
    for action in actions:
        if env.metadata["autoreset_mode"] is AutoresetMode.DISABLED and done.any():
            trace.append(env.reset(options={"reset_mask": done}))
        trace.append(env.step(action))
        done = np.asarray(trace[-1][2] | trace[-1][3])
    return trace


def assert_same(one, other) -> None:
    assert data_equivalence(one, other, exact=True), f"{one}\n!=\n{other}"


def slot(history, name: str):
    return history[..., NAMES.index(name)]


@pytest.mark.parametrize(
    ("action_format", "obs_format", "allow_stop"),
    [("dict", "box", True), ("tuple", "dict", False), ("box", "dict", True)],
)
def test_checker_says_nothing_but_that_physical_units_are_not_normalised(
    action_format, obs_format, allow_stop
):
    kwargs = dict(action_format=action_format, obs_format=obs_format, allow_stop=allow_stop)
    env = gym.make("HydrogelAdapt-v0", outcome_noise=0.1, **kwargs).unwrapped
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        check_env(env)
    assert all("symmetric and normalized" in str(warning.message) for warning in record)
    leaves = tree_leaves(env.observation_space.sample())
    assert sum(leaf.size for leaf in leaves) == 13 + 8 * SLOT_WIDTH == 117


@pytest.mark.parametrize("reward_mode", ["score", "improvement"])
def test_without_response_noise_and_cost_it_is_the_first_environment_bit_for_bit(reward_mode):
    kwargs = dict(horizon=3, reward_mode=reward_mode, cohort=cohort(), patient_assignment="random")
    pairs = [
        (HydrogelAdaptEnv(response_sd=0, **kwargs), HydrogelEnv(**kwargs)),
        (HydrogelAdaptVectorEnv(3, response_sd=0, **kwargs), HydrogelVectorEnv(3, **kwargs)),
    ]
    for adaptive, first in pairs:
        obs, info = first.reset(seed=5)
        found = adaptive.reset(seed=5)
        assert_same((found[0][..., :13], found[1]), (obs, info))
        for action in sampled(first, 3):
            obs, *flags, info = first.step(action)
            found_obs, *found_flags, found_info = adaptive.step(action)
            last, found_last = info.pop("final_obs", None), found_info.pop("final_obs", None)
            assert_same((found_obs[..., :13], found_flags, found_info), (obs, flags, info))
            if last is not None:
                assert_same([row[:13] for row in found_last], list(last))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "settings",
    [
        dict(reveal_response=True),
        dict(outcome_noise=0.5, obs_format="dict", allow_stop=True, check_cost=0.25),
        dict(action_format="multidiscrete", allow_stop=True, reward_mode="score"),
        dict(observe="sample", obs_format="dict", outcome_noise=0.1),
        dict(observe="estimate", allow_stop=True),
    ],
    ids=["revealed", "noisy", "discrete", "sample", "estimate"],
)
def test_vector_agrees_with_gymnasiums_own_over_single_ones_and_tensors_with_arrays(mode, settings):
    ours = make(autoreset_mode=mode, **settings)
    tensors = make(autoreset_mode=mode, output="torch", **settings)
    kwargs = {"cohort": cohort(), "patient_assignment": "random", "horizon": 3} | settings
    theirs = SyncVectorEnv([lambda: HydrogelAdaptEnv(**kwargs)] * 3, autoreset_mode=mode)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    actions = sampled(ours, 7)
    trace, other = rollout(ours, actions), rollout(tensors, actions)
    for step, their_step, tensor_step in zip(trace, rollout(theirs, actions), other, strict=True):
        if len(step) == 5:  # Gymnasium's rewards are float64, ours float32
            step = (step[0], step[1].astype(float), *step[2:])
        assert_same(step, their_step)
        assert ours.observation_space.contains(step[0])
        assert_same(tree_map(lambda x: x.numpy(), tensor_step[0]), step[0])
        if "response" in step[-1]:
            assert_same(tensor_step[-1]["response"].numpy(), step[-1]["response"])


def test_history_has_designs_and_outcomes_of_the_revealed_response_in_their_order():
    env = HydrogelAdaptEnv(response_sd=0.4, reveal_response=True, obs_format="dict", horizon=3)
    obs, info = env.reset(seed=3)
    assert not obs["history"].any()
    patient = np.concatenate([obs["patient_features"], obs["tissue_features"]])
    first, best = info["response"], 0.0
    for step, action in enumerate(sampled(env, 3)):
        obs, _, terminated, _, info = env.step(action)
        assert_same(info["response"], first)
        inputs = (patient, action["polymer_id"], action["formulation"], action["coverage"], first)
        outcomes = MechanisticModel()(*map(torch.as_tensor, inputs))
        row, tried = obs["history"][step], obs["history"][: step + 1]
        assert slot(tried, "polymer_number").all()
        assert slot(row, "polymer_number") == action["polymer_id"] + 1
        assert slot(row, "coverage") == action["coverage"]
        assert_same(row[1:5], action["formulation"])
        np.testing.assert_allclose(row[6:12], torch.stack(list(outcomes)), rtol=1e-5, atol=1e-6)
        assert slot(row, "measured_score") == info["score"]
        best = max(best, info["score"])
        assert obs["current_best_score"] == best
        assert not obs["history"][step + 1 :].any()
    assert terminated


def test_without_a_history_factors_are_observed():
    envs = {name: make(observe=name, reveal_response=True) for name in ("response", "estimate")}
    actions = sampled(envs["response"], 2)
    for name, env in envs.items():
        env.reset(seed=0)
        for action in actions:
            obs, *_, info = env.step(action)
        assert obs.shape == (3, 19) == env.observation_space.shape
        error = np.abs(np.exp(obs[:, 13:]) - info["response"])
        assert obs in env.observation_space
        assert error.max() < 1e-6 if name == "response" else error[:, 4:].max() < 0.05 < error.max()


def test_a_sample_is_another_draw_before_each_check_with_the_spread_of_the_belief():
    env = HydrogelAdaptVectorEnv(
        2000, observe="sample", reveal_response=True, output="torch", autoreset_mode="Disabled"
    )
    first, info = env.reset(seed=0)
    before, response = first[:, -6:].exp(), info["response"]
    torch.testing.assert_close(before.mean(0), response.mean(0), rtol=0.05, atol=0)
    design = {"polymer_id": torch.full((2000,), 9), "coverage": torch.full((2000,), 3)}
    design["formulation"] = torch.tensor([15.0, 60.0, 0.3, 2.0]).expand(2000, -1)
    one, two = (env.step(design)[0][:, -6:].exp() for _ in range(2))
    assert not one.equal(two)
    # Toxicity is known after a check, the gain of one pathway is not.
    error = [(x - response).square().mean(0).sqrt() for x in (before, one, two)]
    assert error[1][4] < 0.05 * error[0][4]
    assert 0.5 * error[0][1] < error[1][1] < 0.99 * error[0][1]
    torch.testing.assert_close(error[1], error[2], rtol=0.1, atol=0.02)


def test_responses_differ_between_episodes_and_seeds_and_hide_unless_revealed():
    env = make(reveal_response=True, patient_assignment="fixed")
    drawn = [env.reset(seed=0)[1]["response"]] + [env.reset()[1]["response"] for _ in range(2)]
    assert len({tuple(row) for rows in drawn for row in rows}) == 9
    assert_same(env.reset(seed=0)[1]["response"], drawn[0])
    hidden = make()
    assert "response" not in hidden.reset(seed=0)[1]
    assert "response" not in hidden.step(sampled(hidden, 1)[0])[4]


def test_noise_has_the_deviation_that_was_given_in_the_unit_of_each_outcome():
    given = {"delta_ef_pct": 2.0, "fibrosis_risk": 0.01}
    noisy, exact = (
        HydrogelAdaptVectorEnv(2000, outcome_noise=noise, output="torch", reward_mode="score")
        for noise in (given, 0.0)
    )
    noisy.reset(seed=0), exact.reset(seed=0)
    action = sampled(noisy, 1)[0]
    _, reward, *_, info = noisy.step(action)
    _, true_reward, *_, true_info = exact.step(action)
    for item, bounds in zip(OUTCOME_FIELDS, MEASURED_FIELDS, strict=True):
        error = info[item.name] - true_info[item.name]
        sd = given.get(item.name, 0.0)
        assert error.std().item() == pytest.approx(sd, rel=0.06)
        assert error.mean().abs() <= 0.1 * sd
        assert info[item.name].clamp(bounds.low, bounds.high).equal(info[item.name])
    assert reward.equal(true_reward)  # paid is the truth, reported the measurement
    measured = compute_reward(Outcomes(*(info[name] for name in Outcomes._fields)))
    torch.testing.assert_close(info["score"], measured)


@pytest.mark.parametrize("action_format", ["dict", "tuple", "box", "multidiscrete"])
def test_stop_ends_the_episode_without_a_check_and_costs_nothing(action_format):
    env = make(
        allow_stop=True,
        check_cost=0.5,
        action_format=action_format,
        output="torch",
        autoreset_mode="Disabled",
    )
    before, _ = env.reset(seed=0)
    action = sampled(env, 1)[0]
    codec = env.problem.actions
    design = codec.decode(codec.read(action, (3,)))
    stop = torch.tensor([False, True, False])
    obs, reward, terminated, _, info = env.step(codec.encode(design, stop))
    assert terminated.tolist() == stop.tolist()
    assert obs[1].equal(before[1])
    assert reward[1] == info["score"][1] == info["formulation"][1].abs().sum() == 0.0
    improvement = info["score"].clamp(min=0.0)[~stop]
    torch.testing.assert_close(reward[~stop], improvement - 0.5)
    assert obs[:, 12].tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("observe", ["history", "estimate", "sample", "response"])
@pytest.mark.parametrize("mode", MODES)
def test_steps_and_resets_run_on_a_device_without_values(mode, observe):
    def trace(device: str) -> list[torch.Tensor]:
        env = make(
            device=device,
            output="torch",
            validate_actions=False,
            autoreset_mode=mode,
            outcome_noise=0.1,
            allow_stop=True,
            reveal_response=True,
            observe=observe,
            obs_format="dict",
        )
        action = tree_map(lambda x: torch.from_numpy(x).to(device), sampled(env, 1)[0])
        mask = torch.tensor([True, False, True], device=device)
        results = [env.reset(seed=0), env.step(action)]
        results.append(env.reset(options={"reset_mask": mask}))
        return tree_leaves([*results, env.step(action), env.step(action)])

    there, here = trace("meta"), trace("cpu")
    assert {x.device.type for x in there} == {"meta"}
    assert [(x.shape, x.dtype) for x in there] == [(x.shape, x.dtype) for x in here]


@pytest.mark.torch("2.10")
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(
    ("mode", "observe"),
    [
        ("SameStep", "history"),
        ("SameStep", "sample"),
        ("NextStep", "estimate"),
        ("Disabled", "history"),
    ],
)
def test_traced_steps_equal_those_that_are_not(mode, observe, monkeypatch):
    inductor = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, *, options, **kwargs: inductor(function, backend="aot_eager", **kwargs),
    )
    kwargs = dict(output="torch", outcome_noise=0.1, allow_stop=True, observe=observe)
    kwargs["autoreset_mode"] = mode
    env, twin = make(compile=True, **kwargs), make(**kwargs)
    actions = sampled(env, 5)
    one, other = rollout(env, actions), rollout(twin, actions)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_loaded_state_continues_as_the_saved_one_and_another_layout_is_refused():
    env, again = (make(outcome_noise=0.1) for _ in range(2))
    env.reset(seed=0)
    actions = sampled(env, 6)
    env.step(actions[0])
    saved = copy.deepcopy(env.state_dict())
    assert {"response", "history", "best_measured", "belief"} <= saved.keys()
    again.load_state_dict(saved)
    for action in actions[1:]:
        assert_same(again.step(action), env.step(action))
    other = make(horizon=4)
    message = r"'history' is a \(3, 3, 13\) tensor of torch.float32; expected \(3, 0, 13\) of"
    with pytest.raises(ValueError, match=message):
        make(observe="sample").load_state_dict(saved)
    message = r"'history' is a \(3, 3, 13\) tensor of torch.float32; expected \(3, 4, 13\) of"
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"^state has \['belief', .*; expected \['best_sc"):
        HydrogelVectorEnv(3, horizon=3).load_state_dict(saved)


def no_model(patient, polymer_id, formulation, coverage):
    return MechanisticModel()(patient, polymer_id, formulation, coverage)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"response_sd": -0.1}, "response_sd is -0.1; allowed: a finite number, 0 to 1.09"),
        ({"response_sd": float("nan")}, "response_sd is nan; allowed: a finite number, 0 to"),
        ({"response_sd": 1.5}, "response_sd is 1.5; allowed: a finite number, 0 to 1.09"),
        ({"response_sd": "0.3"}, "response_sd is '0.3'; allowed: a finite number"),
        ({"outcome_noise": -1.0}, "outcome_noise is -1.0; allowed: a finite number, 0 or more"),
        ({"outcome_noise": "x"}, "outcome_noise is 'x'; allowed: a finite number, 0 or more"),
        ({"outcome_noise": {"lvef": 1.0}}, "outcome_noise names 'lvef'; allowed: ('delta_ef_pct'"),
        ({"outcome_noise": {"delta_ef_pct": -1}}, "outcome_noise of delta_ef_pct is -1; allowed"),
        ({"outcome_noise": [0.1] * 5}, "outcome_noise has 5 numbers; expected one for ('delta_"),
        ({"check_cost": -1}, "check_cost is -1; allowed: a finite number, 0 or more"),
        ({"horizon": 0}, "horizon is 0; allowed: a whole number, 1 or more"),
        ({"reward_mode": "best"}, "reward_mode is 'best'; allowed: ('score', 'improvement')"),
        (
            {"observe": "belief"},
            "observe is 'belief'; allowed: ('history', 'estimate', 'sample', 'resp",
        ),
        ({"reward_model": no_model}, "allowed: 'mechanistic', or what returns a MechanisticModel"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_argument_that_is_not_allowed_is_refused_in_one_line(changes, message):
    for env_class in (HydrogelAdaptEnv, HydrogelAdaptVectorEnv):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            env_class(**changes)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("action_format", "change", "message"),
    [
        ("dict", lambda a: a | {"stop": [0, 2, 0]}, "env 1: stop is 2; allowed: whole numbers 0 "),
        ("dict", lambda a: {k: a[k] for k in a if k != "stop"}, "expected ('polymer_id', 'formul"),
        ("tuple", lambda a: a[:3], "action has 3 entries; expected a tuple of ('polymer_id', "),
        ("box", lambda a: a[:, :-1], "action has shape (3, 32); expected (3, 33)"),
        ("box", lambda a: a * np.nan, "env 0: action[0] is nan; allowed: a finite number"),
        ("multidiscrete", lambda a: a * 0 + 2, "env 0: action[6] is 2; allowed: whole numbers 0"),
    ],
)
def test_bad_stop_is_refused_with_its_reason(action_format, change, message):
    env = make(allow_stop=True, action_format=action_format)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=re.escape(message)):
        env.step(change(sampled(env, 1)[0]))


def test_spec_survives_json_and_makes_the_same_environment_again():
    kwargs = dict(outcome_noise={"delta_ef_pct": 0.5}, response_sd=0.2, num_envs=3)
    env = gym.make_vec("HydrogelAdapt-v0", **kwargs)
    again = gym.make_vec(EnvSpec.from_json(env.spec.to_json()))
    actions = sampled(env, 3)
    assert_same(rollout(again, actions), rollout(env, actions))


def test_arguments_have_the_defaults_of_the_manual_and_those_of_the_vector_but_one():
    def defaults(env_class) -> dict:
        return {name: x.default for name, x in inspect.signature(env_class).parameters.items()}

    manual = inspect.getdoc(HydrogelAdaptEnv)
    table = manual.split("## Arguments")[1]
    documented = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| `(.*?)` \|", table, re.MULTILINE))
    single, vector = defaults(HydrogelAdaptEnv), defaults(HydrogelAdaptVectorEnv)
    assert documented == {name: repr(x).replace("'", '"') for name, x in single.items()}
    assert {name for name in single if single[name] != vector[name]} == {"patient_assignment"}
    for i, item in enumerate(slot_fields(RewardConfig())):
        assert f"\n| {i} | {item.name} | {item.low:g} | {item.high:g} |" in manual
    assert "$" not in manual
