"""How good a policy is: figures of whole episodes, and their distance to the oracle."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

import hydrogel_gym
from hydrogel_gym import errors
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.runs import environments, evaluation, metrics, policies
from hydrogel_gym.train.ppo_hybrid import Agent


@pytest.fixture
def agent(finished_run):
    return policies.load_policy(finished_run[0].output_dir / "stage2_policy.pt", Agent, "cpu")[0]


def test_policy_designs_are_what_the_environment_says_of_the_deterministic_action(
    finished_run, agent
):
    args, _ = finished_run
    cohort = hydrogel_gym.load_cohort(args.cohort)
    envs = environments.make_envs(args, cohort, torch.device("cpu"))
    designs = evaluation.policy_designs(agent.design, envs)
    model = hydrogel_gym.load_reward_model("mechanistic")
    design = [designs[name] for name in ("polymer_id", "formulation", "coverage")]
    outcomes = model(cohort.features.float(), *design)
    for name, value in outcomes._asdict().items():
        torch.testing.assert_close(designs[name], value)
    torch.testing.assert_close(designs["reward"], hydrogel_gym.compute_reward(outcomes))
    obs = torch.cat([cohort.features.float(), torch.zeros(len(cohort), 2)], -1)
    expected = agent.to_env(agent(obs).action)["formulation"]
    torch.testing.assert_close(designs["formulation"], expected)


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


def test_a_reward_model_that_the_oracle_cannot_use_is_a_bad_request(
    ppo, finished_run, tmp_path, monkeypatch
):
    def refuse(*_, **__):
        raise ValueError("outcome is nan")

    monkeypatch.setattr(evaluation, "best_designs", refuse)
    with pytest.raises(errors.UsageError, match="the oracle cannot search: outcome is nan"):
        ppo.train(dataclasses.replace(finished_run[0], output_dir=tmp_path / "run"))


def test_a_progress_bar_shows_regret_of_both_cohorts_where_there_is_an_oracle(finished_run):
    _, summary = finished_run
    shown = evaluation.shown_regret(summary)
    both = [summary["train_regret"], summary["holdout_regret"]]
    assert shown["regret"] == " / ".join(f"{regret:.2f}" for regret in both)
    assert evaluation.shown_regret(summary | {"holdout_regret": None}) == {}
