"""What a whole run leaves, and that it is the same for the same seed."""

from __future__ import annotations

import dataclasses
import json
import time

import numpy as np
import pandas as pd
import pytest
import torch

import hydrogel_gym
from hydrogel_gym.problem.reward import RewardTerms
from hydrogel_gym.runs import ALONE, directory, metrics, start_run


def test_a_run_leaves_every_promised_file_and_figure(finished_run):
    output_dir, returned = finished_run[0].output_dir, finished_run[1]
    files = {str(path.relative_to(output_dir)) for path in output_dir.rglob("*.*")}
    every = {*directory.RUN_FILES, *(f"checkpoints/checkpoint-00000{i}.pt" for i in (2, 4, 6))}
    assert files == every - {directory.WANDB_FILE}  # it is not tracked
    summary = json.loads((output_dir / "summary.json").read_text())
    promised = "max_reward optimal_rate entropy samples_per_second seed device versions"
    figures = "deterministic_reward regret regret_p95 fraction_of_oracle".split()
    promised = {*promised.split(), *(f"{c}_{f}" for c in metrics.COHORTS for f in figures)}
    assert promised <= set(summary)
    assert (summary["samples"], summary["interrupted"]) == (6 * 48 * 4, False)
    assert summary == {name: returned[name] for name in summary}
    counts = [share * 12 * 10 for share in summary["polymer_share"].values()]  # ten episodes each
    assert sum(counts) == pytest.approx(120)
    assert counts == pytest.approx([round(count) for count in counts], abs=1e-4)
    assert any(round(count) % 10 for count in counts)
    assert tuple(summary["polymer_share"]) == hydrogel_gym.load_polymers().names


def test_metrics_have_a_row_per_iteration_and_the_columns_of_the_table(finished_run):
    table = pd.read_csv(finished_run[0].output_dir / "metrics.csv")
    assert table["iteration"].tolist() == [1, 2, 3, 4, 5, 6]
    assert table["global_step"].tolist() == [192 * i for i in range(1, 7)]
    assert table.columns.tolist() == [metric.name for metric in metrics.METRICS]
    assert np.isfinite(table.to_numpy()).all()  # no blank: this run has an oracle
    assert (table["reward_model_seconds"] > 0.0).all()
    terms = table[list(RewardTerms._fields)].sum(axis=1)
    assert terms.to_numpy() == pytest.approx(table["mean_reward"].to_numpy(), rel=1e-5)


def test_the_policy_has_the_statistics_of_observations_and_of_first_returns(finished_run, of_runs):
    args, _ = finished_run
    state = of_runs.policy(args.output_dir)
    features = hydrogel_gym.load_cohort(args.cohort).features.float()
    features = features[torch.arange(args.num_envs) % len(features)]
    torch.testing.assert_close(state["obs_mean"][:11], features.mean(0))
    torch.testing.assert_close(state["obs_std"][:11], features.std(0))
    first = of_runs.metrics(args.output_dir).loc[0]  # under limits that are not so strict
    assert 0.5 * first["mean_reward"] < state["return_mean"] < first["mean_reward"]
    assert 1.0 < state["return_std"] < first["max_reward"]


def test_the_same_seed_gives_the_same_run_and_another_does_not(
    ppo, finished_run, of_runs, tmp_path, monkeypatch
):
    monkeypatch.setattr("hydrogel_gym.oracle.best.search", None)  # what was found is kept
    args, _ = finished_run
    folder = args.output_dir.parent
    # What a run left that was killed in its first iteration is nothing to resume.
    again = dataclasses.replace(args, output_dir=folder / "again", resume="auto")
    again.output_dir.mkdir()
    (again.output_dir / "metrics.csv").write_text("half a line")
    assert ppo.train(again)["resumed_at_iteration"] is None
    of_runs.assert_same(again.output_dir, args.output_dir)
    other = dataclasses.replace(args, seed=2, num_iterations=1, output_dir=folder / "other")
    ppo.train(other)
    assert len(list((folder / "oracle").iterdir())) == 2
    first, expected = (of_runs.metrics(each.output_dir).loc[0] for each in (other, args))
    assert first["mean_reward"] != expected["mean_reward"]
    assert first["holdout_regret"] != expected["holdout_regret"]


@pytest.fixture
def run(ppo, small_run, tmp_path):
    """Runs a loop that records, in every iteration, a loss besides those of the rollout."""
    args = small_run(tmp_path / "run", num_iterations=2, overwrite=True)

    def loop(**losses):
        labels = {"preset": args.preset, "policy": args.policy}
        with start_run(args, ALONE, labels, args.num_iterations, args.num_steps) as run:
            cohort, device = run.cohorts["train"], torch.device("cpu")
            learner, _, _ = ppo.make_learner(args, cohort, device, ALONE, compile=False)
            obs = run.restore(learner, learner.agent.design, None)
            for _ in run.iterations():
                _, _, infos = ppo.rollout(learner.envs, learner.agent, obs, args, learner.generator)
                run.record(infos, losses, time.perf_counter())

    loop.output_dir = args.output_dir
    return loop


def test_a_loss_that_is_no_row_of_the_table_or_not_finite_ends_the_run(run, of_runs):
    with pytest.raises(KeyError, match="temperature: no row of"):
        run(policy_loss=0.0, value_loss=0.0, temperature=3.0)
    assert not (run.output_dir / "metrics.csv").exists()
    with pytest.raises(FloatingPointError, match="iteration 1: .*value_loss are not all finite"):
        run(policy_loss=0.0, value_loss=float("nan"))
    assert of_runs.metrics(run.output_dir)["iteration"].tolist() == [1]  # the row is on disk
