from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from hydrogel_gym import HydrogelVectorEnv
from hydrogel_gym.envs import infos
from hydrogel_gym.problem import dynamics

MODES = pytest.mark.parametrize("mode", [mode.value for mode in AutoresetMode])
OUTPUTS = pytest.mark.parametrize("output", ["numpy", "torch"])
NUM_ENVS, HORIZON = 6, 2


def staggered(mode: str, output: str, **kwargs) -> HydrogelVectorEnv:
    """Environments of which every second one is a step further into its episode."""
    kwargs = {"horizon": HORIZON, "patient_assignment": "random", "cohort": "holdout"} | kwargs
    env = HydrogelVectorEnv(NUM_ENVS, autoreset_mode=mode, output=output, **kwargs)
    env.reset(seed=0)
    env.step(sampled(env, 1)[0])
    env.reset(options={"reset_mask": np.arange(NUM_ENVS) % 2 == 0})
    return env


def sampled(env: HydrogelVectorEnv, num: int) -> list:
    env.action_space.seed(0)
    return [env.action_space.sample() for _ in range(num)]


def expected_step(env: HydrogelVectorEnv, action) -> dict:
    """Every array that a step must return, by name, from one transition of the whole batch."""
    mode, state, done = env.autoreset_mode, env._state, env._done
    skip = done if mode is AutoresetMode.NEXT_STEP else torch.zeros_like(done)
    design = env.problem.design(action, (NUM_ENVS,), skip=skip)
    result = dynamics.transition(state, design, env.problem.params, env.problem.reward_model)
    terminated = result.terminated & ~skip
    begins = terminated if mode is AutoresetMode.SAME_STEP else skip
    after = dynamics.next_episode(result.state, env.problem.params).patient_index
    patient_index = torch.where(begins, after, result.state.patient_index)
    if mode is AutoresetMode.DISABLED:
        patient_index = result.state.patient_index
    reported = {
        **result.outcomes._asdict(),
        **result.terms._asdict(),
        "score": result.score,
        "is_optimal": result.is_optimal,
        "formulation_clipped": result.formulation_clipped,
        "formulation": result.formulation,
    }

    def info(mask: torch.Tensor, **patient: torch.Tensor) -> dict:
        values = {
            name: value.masked_fill(~(mask.unsqueeze(-1) if value.dim() == 2 else mask), 0)
            for name, value in reported.items()
        }
        masks = {f"_{name}": mask for name in reported}
        return values | masks | patient

    every = torch.ones_like(skip)
    expected = {
        "reward": result.reward.masked_fill(skip, 0.0),
        "terminated": terminated,
        "truncated": torch.zeros_like(skip),
        "info": info(~begins, patient_index=patient_index, _patient_index=every),
    }
    if mode is AutoresetMode.SAME_STEP:
        ended = result.state.patient_index * terminated
        final = info(terminated, patient_index=ended, _patient_index=terminated)
        expected["info"] |= {"final_info": final, "_final_info": terminated}
        obs = dynamics.observation(result.state, env.problem.params)
        expected["info"] |= {"final_obs": obs, "_final_obs": terminated}
    return expected


def assert_equal(got, expected, name: str = "") -> None:
    if isinstance(expected, dict):
        assert list(got) == list(expected), name
        for key in expected:
            assert_equal(got[key], expected[key], key)
    elif getattr(got, "dtype", None) == np.dtype(object):  # the rows of those that ended
        for row, value in enumerate(got):
            assert value is None or (value == expected[row].numpy()).all(), name
    else:
        np.testing.assert_array_equal(np.asarray(got), expected.numpy(), err_msg=name, strict=True)


def step_and_compare(env: HydrogelVectorEnv, num_steps: int) -> None:
    for action in sampled(env, num_steps):
        if env.autoreset_mode is AutoresetMode.DISABLED and env._done.any():
            env.reset(options={"reset_mask": env._done.clone()})
        expected = expected_step(env, action)
        _, reward, terminated, truncated, info = env.step(action)
        got = {"reward": reward, "terminated": terminated, "truncated": truncated, "info": info}
        assert_equal(got, expected)


@MODES
@OUTPUTS
def test_each_entry_of_an_info_is_what_a_transition_gives_under_its_name(mode, output):
    step_and_compare(staggered(mode, output), 4)


@MODES
def test_rows_in_another_order_reach_the_same_names(mode, monkeypatch):
    """Both sides go by the names, so that no order can be wrong."""
    rows = dynamics.STEP_ROWS[mode]
    turned = dynamics.StepRows(*(tuple(reversed(names)) for names in rows))
    for module in (dynamics, infos):
        monkeypatch.setattr(module, "STEP_ROWS", {mode: turned})
    step_and_compare(staggered(mode, "numpy"), 3)


@pytest.mark.parametrize("kind", dynamics.StepRows._fields)
@pytest.mark.parametrize("change", ["one too many", "one too few"])
def test_tensor_with_another_number_of_rows_is_refused(kind, change):
    env = staggered("SameStep", "torch")
    step, _ = env._step(env._state, env._done, env.problem.actions.read(sampled(env, 1)[0], (6,)))
    rows = getattr(step, kind)
    rows = torch.cat([rows, rows[-1:]]) if change == "one too many" else rows[:-1]
    with pytest.raises(ValueError, match="rows|zip"):
        env._accept(step._replace(**{kind: rows}))
    assert env._accept(step)[0].shape == (6, 13)


def test_value_without_a_place_and_place_without_a_value_are_refused():
    one = torch.ones(2)
    with pytest.raises(ValueError, match=r"rows \['c'\] have no place in \('a', 'b'\)"):
        dynamics.stack_rows(("a", "b"), {"a": one, "b": one, "c": one})
    with pytest.raises(KeyError, match="b"):
        dynamics.stack_rows(("a", "b"), {"a": one, "c": one})
    stacked = dynamics.stack_rows(("b", "a"), {"a": one, "b": 2 * one})
    assert stacked.tolist() == [[2.0, 2.0], [1.0, 1.0]]
