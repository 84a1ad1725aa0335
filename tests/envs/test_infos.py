from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence

from hydrogel_gym import HydrogelVectorEnv
from hydrogel_gym.envs import infos
from hydrogel_gym.problem import dynamics


def sampled(env: HydrogelVectorEnv, num: int) -> list:
    env.action_space.seed(0)
    return [env.action_space.sample() for _ in range(num)]


def trace(mode: str) -> list:
    """Steps of environments of which every second one is a step further into its episode."""
    env = HydrogelVectorEnv(6, horizon=3, patient_assignment="random", autoreset_mode=mode)
    first, *actions = sampled(env, 5 if mode != "Disabled" else 3)
    begun = [env.reset(seed=0), env.step(first)]
    begun.append(env.reset(options={"reset_mask": np.arange(6) % 2 == 0}))
    return begun + [env.step(action) for action in actions]


@pytest.mark.parametrize("mode", dynamics.STEP_ROWS)
def test_rows_in_another_order_reach_the_same_names(mode, monkeypatch):
    """Both sides go by the names, so that no order can be wrong."""
    expected = trace(mode)
    turned = dynamics.StepRows(*(tuple(reversed(names)) for names in dynamics.STEP_ROWS[mode]))
    for module in (dynamics, infos):
        monkeypatch.setattr(module, "STEP_ROWS", {mode: turned})
    assert data_equivalence(trace(mode), expected, exact=True)


@pytest.mark.parametrize("kind", dynamics.StepRows._fields)
def test_tensor_with_another_number_of_rows_is_refused(kind):
    env = HydrogelVectorEnv(6, output="torch")
    env.reset(seed=0)
    step, _ = env._step(env._state, env._done, env.problem.actions.read(sampled(env, 1)[0], (6,)))
    rows = getattr(step, kind)
    for changed in (torch.cat([rows, rows[-1:]]), rows[:-1]):
        with pytest.raises(ValueError, match="rows|zip"):
            env._accept(step._replace(**{kind: changed}))
    assert env._accept(step)[0].shape == (6, 13)


def test_value_without_a_place_and_place_without_a_value_are_refused():
    one = torch.ones(2)
    with pytest.raises(ValueError, match=r"rows \['c'\] have no place in \('a', 'b'\)"):
        dynamics.stack_rows(("a", "b"), {"a": one, "b": one, "c": one})
    with pytest.raises(KeyError, match="b"):
        dynamics.stack_rows(("a", "b"), {"a": one, "c": one})
    stacked = dynamics.stack_rows(("b", "a"), {"a": one, "b": 2 * one})
    assert stacked.tolist() == [[2.0, 2.0], [1.0, 1.0]]
