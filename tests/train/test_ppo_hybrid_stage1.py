"""Training against a fitted Stage 1: which model rewards, and what is refused."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest
import torch

from hydrogel_gym import errors, load_cohort, load_reward_model
from hydrogel_gym.models.ensemble import save_stage1
from hydrogel_gym.runs import environments, evaluation, policies

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture(scope="module")
def checkpoint(make_stage1, tmp_path_factory):
    """A Stage-1 checkpoint of random weights."""
    path = tmp_path_factory.mktemp("stage1") / "stage1.pt"
    save_stage1(path, make_stage1(pessimism=1.0), {})
    return path


@pytest.fixture(scope="module")
def trained(ppo, small_run, checkpoint, tmp_path_factory):
    """A run on a checkpoint: its arguments and its summary."""
    args = small_run(
        tmp_path_factory.mktemp("runs") / "run",
        reward_model=str(checkpoint),
        num_iterations=2,
    )
    return args, ppo.train(args)


def metrics(args) -> pd.DataFrame:
    return pd.read_csv(args.output_dir / "metrics.csv")


def test_policy_is_rewarded_by_the_checkpoint(ppo, trained, checkpoint):
    args, summary = trained
    agent, _ = policies.load_policy(args.output_dir / "stage2_policy.pt", ppo.Agent, "cpu")
    cohort = load_cohort(args.holdout_cohort)
    envs = environments.make_envs(args, cohort, torch.device("cpu"))
    assert envs.unwrapped.problem.reward_model._get_name() == "Stage1Ensemble"
    designs = evaluation.policy_designs(agent.design, envs)
    expected = designs["reward"].mean().item()
    assert summary["holdout_deterministic_reward"] == pytest.approx(expected, rel=1e-5)
    assert metrics(args)["holdout_deterministic_reward"].iloc[-1] == pytest.approx(
        summary["holdout_deterministic_reward"]
    )
    design = [designs[name] for name in ("polymer_id", "formulation", "coverage")]
    predicted = load_reward_model(checkpoint)(cohort.features.float(), *design)
    torch.testing.assert_close(designs["delta_ef_pct"], predicted.delta_ef_pct)


def test_regret_is_to_the_oracle_of_the_checkpoint(
    ppo, small_run, checkpoint, tmp_path, monkeypatch
):
    searched = []

    def search(cohort, reward_model, *_, **__):
        searched.append(reward_model._get_name())
        return type("Best", (), {"score": torch.full((len(cohort),), 40.0)})

    monkeypatch.setattr(evaluation, "best_designs", search)
    args = small_run(tmp_path / "run", reward_model=str(checkpoint), num_iterations=1, oracle=True)
    summary = ppo.train(args)
    assert searched == ["Stage1Ensemble"] * 2
    expected = pytest.approx(40.0 - summary["holdout_deterministic_reward"])
    assert summary["holdout_regret"] == expected


def test_what_reads_the_policy_later_finds_the_checkpoint_from_any_folder(
    ppo, small_run, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(checkpoint.parent)
    ppo.train(small_run(tmp_path / "run", reward_model=checkpoint.name, num_iterations=1))
    saved = torch.load(tmp_path / "run" / "stage2_policy.pt", weights_only=True)
    assert saved["training_config"]["reward_model"] == str(checkpoint)


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


def test_cost_of_the_frozen_model_is_measured_apart(trained):
    args, _ = trained
    seconds = metrics(args)["reward_model_seconds"]
    assert (seconds > 0.0).all()


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
    with pytest.raises(errors.UsageError, match=r"reward model: "):
        ppo.train(
            dataclasses.replace(again, reward_model=str(other), output_dir=tmp_path / "third")
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pessimism", "1"], "pessimism is 1.0; only a Stage-1 checkpoint (.pt) has an ensemble"),
        (["--pessimism", "-1"], "--pessimism is -1.0; allowed: 0 or more"),
        (["--reward-model", "no.pt"], "reward_model 'no.pt': Stage-1 checkpoint no.pt: no such fi"),
        (["--reward-model", "no.pt2"], "reward_model 'no.pt2': there is no such file"),
        (["--reward-model", "mine"], "reward_model is 'mine'; allowed: 'mechanistic', a path to"),
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
def test_compiled_environment_pays_the_same_for_a_checkpoint(small_run, checkpoint, tmp_path):
    args = small_run(tmp_path, reward_model=str(checkpoint))
    cohort = load_cohort(args.cohort)
    rewards = []
    for compile in (False, True):
        envs = environments.make_envs(
            args, cohort, torch.device("cpu"), num_envs=40, compile=compile
        )
        envs.reset(seed=1)
        envs.action_space.seed(1)
        rewards.append(envs.step(envs.action_space.sample())[1])
    torch.testing.assert_close(*rewards, rtol=1e-4, atol=1e-4)


def test_checkpoint_is_loaded_by_the_public_name(checkpoint):
    assert load_reward_model(str(checkpoint)).pessimism == 1.0
    assert load_reward_model(checkpoint, pessimism=0.5).pessimism == 0.5
