"""Training against a fitted Stage 1: which model rewards, which one judges, what is refused."""

from __future__ import annotations

import dataclasses
import json

import pandas as pd
import pytest
import torch

from hydrogel_gym import load_reward_model
from hydrogel_gym.models.ensemble import save_stage1


@pytest.fixture(scope="module")
def checkpoint(make_stage1, tmp_path_factory):
    """A Stage-1 checkpoint of random weights."""
    path = tmp_path_factory.mktemp("stage1") / "stage1.pt"
    save_stage1(path, make_stage1(pessimism=1.0), {})
    return path


@pytest.fixture(scope="module")
def trained(ppo, small_run, checkpoint, tmp_path_factory):
    """A run on a checkpoint, judged by the built-in model: its arguments and its summary."""
    args = small_run(
        tmp_path_factory.mktemp("runs") / "run",
        reward_model=str(checkpoint),
        true_reward_model="mechanistic",
        num_iterations=2,
    )
    return args, ppo.train(args)


def metrics(args) -> pd.DataFrame:
    return pd.read_csv(args.output_dir / "metrics.csv")


def test_policy_is_rewarded_by_the_checkpoint_and_judged_by_the_truth(ppo, trained):
    args, summary = trained
    agent, _ = ppo.load_policy(args.output_dir / "stage2_policy.pt", "cpu")
    cohort = ppo.hydrogel_gym.load_cohort(args.holdout_cohort)
    for prefix, true in (("", False), ("true_", True)):
        envs = ppo.make_envs(args, cohort, torch.device("cpu"), true_reward=true)
        expected = ppo.policy_designs(agent, envs)["reward"].mean().item()
        assert summary[f"{prefix}holdout_deterministic_reward"] == pytest.approx(expected, rel=1e-5)
    assert envs.unwrapped.problem.reward_model._get_name() == "MechanisticModel"
    assert metrics(args)["true_holdout_deterministic_reward"].iloc[-1] == pytest.approx(
        summary["true_holdout_deterministic_reward"]
    )


def test_regret_is_to_the_oracle_of_the_truth(ppo, small_run, checkpoint, tmp_path, monkeypatch):
    searched = []

    def search(cohort, reward_model, *_, **__):
        searched.append(reward_model._get_name())
        return type("Best", (), {"score": torch.full((len(cohort),), 40.0)})

    monkeypatch.setattr(ppo, "best_designs", search)
    args = small_run(
        tmp_path / "run",
        reward_model=str(checkpoint),
        true_reward_model="mechanistic",
        num_iterations=1,
        oracle=True,
    )
    summary = ppo.train(args)
    assert searched == ["MechanisticModel"] * 2
    assert summary["holdout_regret"] is None
    assert summary["true_holdout_regret"] == pytest.approx(
        40.0 - summary["true_holdout_deterministic_reward"]
    )


def test_more_pessimism_is_rewarded_less(ppo, small_run, checkpoint, tmp_path):
    rewards = []
    for pessimism in (0.0, None, 2.0):  # None is the checkpoint's own, 1
        args = small_run(
            tmp_path / str(pessimism),
            reward_model=str(checkpoint),
            pessimism=pessimism,
            num_iterations=1,
        )
        ppo.train(args)
        rewards.append(metrics(args)["mean_reward"].iloc[0])  # of the same first designs
    assert rewards[0] > rewards[1] > rewards[2]


def test_bfloat16_is_asked_for_by_a_flag(ppo, small_run, checkpoint, tmp_path):
    args = small_run(tmp_path, reward_model=str(checkpoint), reward_precision="bf16")
    cohort = ppo.hydrogel_gym.load_cohort(args.cohort)
    model = ppo.make_envs(args, cohort, torch.device("cpu")).unwrapped.problem.reward_model
    assert model.compute_dtype == torch.bfloat16


def test_cost_of_the_frozen_model_is_told_apart(trained):
    args, _ = trained
    seconds = metrics(args)["reward_model_seconds"]
    assert (seconds > 0.0).all()


def test_policy_is_judged_later_by_the_model_it_was_trained_on(ppo, trained, tmp_path):
    args, summary = trained
    flags = ["--evaluate", str(args.output_dir / "stage2_policy.pt"), "--no-oracle"]
    flags += ["--cohort", str(args.cohort), "--holdout-cohort", str(args.holdout_cohort)]
    rewards = []
    for more in ([], ["--true-reward-model", "mechanistic"]):
        assert ppo.main([*flags, *more, "--output-dir", str(tmp_path)]) == 0
        figures = json.loads((tmp_path / "evaluation-cohort.json").read_text())
        rewards.append(figures)
    for figures in rewards:
        assert figures["holdout_deterministic_reward"] == pytest.approx(
            summary["holdout_deterministic_reward"], rel=1e-5
        )
    assert rewards[1]["true_holdout_deterministic_reward"] == pytest.approx(
        summary["true_holdout_deterministic_reward"], rel=1e-5
    )


def test_policy_can_be_judged_with_another_pessimism(ppo, trained, tmp_path):
    args, summary = trained
    flags = ["--evaluate", str(args.output_dir / "stage2_policy.pt"), "--no-oracle"]
    flags += ["--cohort", str(args.cohort), "--output-dir", str(tmp_path), "--pessimism", "0"]
    assert ppo.main(flags) == 0
    figures = json.loads((tmp_path / "evaluation-cohort.json").read_text())
    assert figures["train_deterministic_reward"] > summary["train_deterministic_reward"]


def test_run_goes_on_with_the_same_model_in_another_place_only(
    ppo, small_run, checkpoint, make_stage1, tmp_path
):
    args = small_run(tmp_path / "run", reward_model=str(checkpoint), num_iterations=2)
    whole = ppo.train(args)
    first = args.output_dir / "checkpoints" / "checkpoint-000002.pt"
    moved, other = tmp_path / "moved.pt", tmp_path / "other.pt"
    moved.write_bytes(checkpoint.read_bytes())
    save_stage1(other, make_stage1(seed=1), {})
    again = dataclasses.replace(args, resume=str(first), output_dir=tmp_path / "again")
    result = ppo.train(dataclasses.replace(again, reward_model=str(moved)))
    assert result["mean_reward"] == whole["mean_reward"]
    with pytest.raises(ppo.UsageError, match=r"reward model: "):
        ppo.train(
            dataclasses.replace(again, reward_model=str(other), output_dir=tmp_path / "third")
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pessimism", "1"], "pessimism is 1.0; only a Stage-1 checkpoint (.pt) has an ensemble"),
        (["--pessimism", "-1"], "--pessimism is -1.0; allowed: 0 or more"),
        (["--reward-precision", "bf16"], "compute_dtype is torch.bfloat16; only a Stage-1 check"),
        (["--reward-model", "no.pt"], "reward_model 'no.pt': Stage-1 checkpoint no.pt: no such fi"),
        (["--reward-model", "no.pt2"], "reward_model 'no.pt2': there is no such file"),
        (["--reward-model", "mine"], "reward_model is 'mine'; allowed: 'mechanistic', a path to"),
        (["--true-reward-model", "mine"], "reward_model is 'mine'; allowed: 'mechanistic'"),
    ],
)
def test_model_that_cannot_be_used_is_refused_in_one_line(ppo, tmp_path, capsys, flags, message):
    flags = ["--preset", "quick", "--num-iterations", "1", "--no-oracle", *flags]
    flags += ["--output-dir", str(tmp_path / "run")]
    assert ppo.main(flags) == 2
    printed = capsys.readouterr().err
    assert f"error: {message}" in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "run" / "metrics.csv").exists()


@pytest.mark.slow
def test_compiled_environment_pays_the_same_for_a_checkpoint(ppo, small_run, checkpoint, tmp_path):
    args = small_run(tmp_path, reward_model=str(checkpoint))
    cohort = ppo.hydrogel_gym.load_cohort(args.cohort)
    rewards = []
    for compile in (False, True):
        envs = ppo.make_envs(args, cohort, torch.device("cpu"), num_envs=40, compile=compile)
        envs.reset(seed=1)
        envs.action_space.seed(1)
        rewards.append(envs.step(envs.action_space.sample())[1])
    torch.testing.assert_close(*rewards, rtol=1e-4, atol=1e-4)


def test_checkpoint_is_loaded_by_the_public_name(checkpoint):
    assert load_reward_model(str(checkpoint)).pessimism == 1.0
    assert load_reward_model(checkpoint, pessimism=0.5).pessimism == 0.5
