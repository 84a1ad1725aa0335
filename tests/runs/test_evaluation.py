"""How good a policy is: figures of whole episodes, and their distance to the oracle."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from hydrogel_gym import errors
from hydrogel_gym.problem.reward import SAFETY_LIMITS
from hydrogel_gym.runs import evaluation

LIMITS = [f"reward_{name}" for name in SAFETY_LIMITS]


class TwoPatients:
    """Pays known rewards over two episodes of one step; the second breaks a limit for one."""

    unwrapped = None  # no problem that is known
    single_action_space = {"polymer_id": SimpleNamespace(n=3)}
    nothing = {"is_optimal": torch.zeros(2), **dict.fromkeys(LIMITS, torch.zeros(2))}
    breach = {"is_optimal": torch.ones(2), LIMITS[0]: torch.tensor([-1.0, 0.0])}

    def reset(self, seed):
        self.steps = iter([([1.0, 5.0], {}), ([3.0, 7.0], self.breach)])
        return torch.zeros(2, 13), {}

    def step(self, design):
        reward, changes = next(self.steps)
        info = self.nothing | changes | {"final_info": self.nothing}
        return torch.zeros(2, 13), torch.tensor(reward), None, None, info


def test_figures_of_several_episodes_by_hand():
    polymers = iter([torch.tensor([0, 2]), torch.tensor([2, 2])])

    def policy(obs, generator):
        return {"polymer_id": next(polymers)}, torch.tensor([1.0, 2.0])

    best = torch.tensor([4.0, 6.0])
    found = evaluation.evaluate(policy, TwoPatients(), best_score=best, num_episodes=2)
    assert found.pop("polymer_share") == [0.25, 0.0, 0.75]
    expected = dict(mean_reward=4.0, max_reward=7.0, optimal_rate=0.5, limit_breach_rate=0.25)
    # The patients' mean rewards are 2 and 6, so that regrets are 2 and 0.
    expected |= dict(regret=1.0, regret_p95=1.9, fraction_of_oracle=0.8, entropy=1.5)
    assert found == pytest.approx(expected)


def test_a_reward_model_that_the_oracle_cannot_use_is_a_bad_request(
    ppo, finished_run, tmp_path, monkeypatch
):
    def refuse(*_, **__):
        raise ValueError("outcome is nan")

    monkeypatch.setattr(evaluation, "best_designs", refuse)
    with pytest.raises(errors.UsageError, match="the oracle cannot search: outcome is nan"):
        ppo.train(dataclasses.replace(finished_run[0], output_dir=tmp_path / "run"))
