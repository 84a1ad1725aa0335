"""How good a policy is: figures of whole episodes, and their distance to the oracle."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import hydrogel_gym
from hydrogel_gym import errors
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.problem.reward import SAFETY_LIMITS
from hydrogel_gym.runs import evaluation, metrics, policies
from hydrogel_gym.train.ppo_hybrid import Agent

LIMITS = [f"reward_{name}" for name in SAFETY_LIMITS]


@pytest.fixture
def agent(finished_run):
    return policies.load_policy(finished_run[0].output_dir / "stage2_policy.pt", Agent, "cpu")[0]


@pytest.mark.parametrize("cohort", ["train", "holdout"])
def test_regret_is_the_distance_to_the_oracle_of_the_same_patients(finished_run, agent, cohort):
    args, summary = finished_run
    path = args.cohort if cohort == "train" else args.holdout_cohort
    best = best_designs(path, cache_dir=args.output_dir.parent / "oracle").score
    patients = hydrogel_gym.load_cohort(path).features.float()
    action = agent(torch.cat([patients, torch.zeros(len(patients), 2)], -1)).action
    model = hydrogel_gym.load_reward_model("mechanistic")
    outcomes = model(patients, *agent.to_env(action).values())
    reward = hydrogel_gym.compute_reward(outcomes).detach()
    regret = best - reward
    expected = {
        "deterministic_reward": reward.mean().item(),
        "deterministic_limit_breach_rate": breach_rate(outcomes),
        "regret": regret.mean().item(),
        "regret_p95": np.percentile(regret.numpy(), 95),
        "fraction_of_oracle": (reward.mean() / best.mean()).item(),
    }
    for name, value in expected.items():
        assert summary[f"{cohort}_{name}"] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    last = pd.read_csv(args.output_dir / "metrics.csv").iloc[-1]
    for name in ("deterministic_reward", *metrics.YARDSTICK):
        assert last[f"{cohort}_{name}"] == pytest.approx(summary[f"{cohort}_{name}"], rel=1e-6)


def breach_rate(outcomes) -> float:
    limits = hydrogel_gym.RewardConfig()
    breached = outcomes.toxicity_risk > limits.toxicity_limit
    breached |= outcomes.structural_integrity < limits.integrity_limit
    breached |= outcomes.fibrosis_risk > limits.fibrosis_limit
    return breached.float().mean().item()


class TwoPatients:
    """Pays known rewards over two episodes of one step; the second breaks a limit for one."""

    single_action_space = {"polymer_id": SimpleNamespace(n=3)}
    nothing = {"is_optimal": torch.zeros(2), **dict.fromkeys(LIMITS, torch.zeros(2))}
    breach = {"is_optimal": torch.ones(2), LIMITS[0]: torch.tensor([-1.0, 0.0])}

    def reset(self):
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
