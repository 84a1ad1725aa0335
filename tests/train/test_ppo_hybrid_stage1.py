"""Training against a fitted Stage 1: which model rewards, and by how much."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest
import torch

from hydrogel_gym import load_cohort, load_reward_model
from hydrogel_gym.runs import environments, evaluation, policies

CPU = torch.device("cpu")


@pytest.fixture
def on_checkpoint(fitted_run):
    """Arguments with the checkpoint named from anywhere."""
    args, _ = fitted_run
    return dataclasses.replace(args, reward_model=str(args.output_dir.parent / "stage1.pt"))


def test_policy_is_rewarded_by_the_checkpoint_and_names_it_for_whoever_reads_it(
    ppo, fitted_run, on_checkpoint
):
    (args, summary), checkpoint = fitted_run, on_checkpoint.reward_model
    agent, saved = policies.load_policy(args.output_dir / "stage2_policy.pt", ppo.Agent, "cpu")
    assert saved["training_config"]["reward_model"] == checkpoint  # not relative to where it was
    cohort = load_cohort(args.holdout_cohort)
    designs = evaluation.policy_designs(
        agent.design, environments.make_envs(on_checkpoint, cohort, CPU)
    )
    design = [designs[name] for name in ("polymer_id", "formulation", "coverage")]
    predicted = load_reward_model(checkpoint)(cohort.features.float(), *design)
    torch.testing.assert_close(designs["delta_ef_pct"], predicted.delta_ef_pct)
    expected = pytest.approx(designs["reward"].mean().item(), rel=1e-5)
    assert summary["holdout_deterministic_reward"] == expected
    metrics = pd.read_csv(args.output_dir / "metrics.csv")
    assert metrics["holdout_deterministic_reward"].iloc[-1] == expected
    assert (metrics["reward_model_seconds"] > 0.0).all()


def test_regret_is_to_the_oracle_of_the_checkpoint(on_checkpoint, tmp_path, monkeypatch):
    searched = []

    def search(cohort, reward_model, *_, **__):
        searched.append(reward_model._get_name())
        return type("Best", (), {"score": torch.full((len(cohort),), 40.0)})

    monkeypatch.setattr(evaluation, "best_designs", search)
    cohorts = {"holdout": load_cohort(on_checkpoint.holdout_cohort)}
    sets = evaluation.evaluation_sets(on_checkpoint, cohorts, CPU, cache_dir=tmp_path)
    assert searched == ["Stage1Ensemble"]
    assert sets["holdout"].best_score.tolist() == [40.0] * 8


def rewards_of_random_designs(args, **settings) -> torch.Tensor:
    envs = environments.make_envs(args, load_cohort(args.cohort), CPU, num_envs=40, **settings)
    envs.reset(seed=1)
    envs.action_space.seed(1)
    return envs.step(envs.action_space.sample())[1]


def test_more_pessimism_is_rewarded_less(on_checkpoint):
    none, own, more = (
        rewards_of_random_designs(dataclasses.replace(on_checkpoint, pessimism=pessimism)).mean()
        for pessimism in (0.0, None, 2.0)  # None is the checkpoint's own, 1
    )
    assert none > own > more
    assert load_reward_model(on_checkpoint.reward_model).pessimism == 1.0


@pytest.mark.slow
def test_compiled_environment_pays_the_same_for_a_checkpoint(on_checkpoint):
    plain, compiled = (
        rewards_of_random_designs(on_checkpoint, compile=compile) for compile in (False, True)
    )
    torch.testing.assert_close(plain, compiled, rtol=1e-4, atol=1e-4)
