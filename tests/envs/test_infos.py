from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence

from hydrogel_gym import HydrogelVectorEnv
from hydrogel_gym.envs import infos
from hydrogel_gym.problem import dynamics


def trace(mode: str) -> list:
    """Steps of environments of which every second one is a step further into its episode."""
    env = HydrogelVectorEnv(6, horizon=3, patient_assignment="random", autoreset_mode=mode)
    env.action_space.seed(0)
    trace = [env.reset(seed=0), env.step(env.action_space.sample())]
    trace.append(env.reset(options={"reset_mask": np.arange(6) % 2 == 0}))
    num_steps = 4 if mode != "Disabled" else 2
    return trace + [env.step(env.action_space.sample()) for _ in range(num_steps)]


@pytest.mark.parametrize("mode", dynamics.STEP_ROWS)
def test_rows_in_another_order_reach_the_same_names(mode, monkeypatch):
    """Both sides go by the names, so that no order can be wrong."""
    expected = trace(mode)
    turned = dynamics.StepRows(*(tuple(reversed(names)) for names in dynamics.STEP_ROWS[mode]))
    for module in (dynamics, infos):
        monkeypatch.setattr(module, "STEP_ROWS", {mode: turned})
    assert data_equivalence(trace(mode), expected, exact=True)


def test_rows_that_are_not_those_that_have_a_place_are_refused():
    env = HydrogelVectorEnv(6, output="torch")
    env.reset(seed=0)
    tensors = env.problem.actions.read(env.action_space.sample(), (6,))
    step, _ = env._step(env._state, env._done, tensors)
    for kind in dynamics.StepRows._fields:
        rows = getattr(step, kind)
        for changed in (torch.cat([rows, rows[-1:]]), rows[:-1]):
            with pytest.raises(ValueError, match="rows|zip"):
                env._accept(step._replace(**{kind: changed}))
    assert env._accept(step)[0].shape == (6, 13)
    one = torch.ones(2)
    with pytest.raises(ValueError, match=r"rows \['c'\] have no place in \('a', 'b'\)"):
        dynamics.stack_rows(("a", "b"), {"a": one, "b": one, "c": one})
    with pytest.raises(KeyError, match="b"):
        dynamics.stack_rows(("a", "b"), {"a": one, "c": one})
