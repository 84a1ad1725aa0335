"""Saved policies, and checkpoints, on other patients and by other reward models."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from hydrogel_gym import RewardConfig, compute_reward, load_cohort, load_reward_model
from hydrogel_gym.models.ensemble import save_stage1
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.runs import environments, evaluation, policies
from hydrogel_gym.runs.metrics import COHORTS, YARDSTICK
from hydrogel_gym.runs.safeguard import on_safe_side
from hydrogel_gym.runs.uncertainty import PREDICTED
from hydrogel_gym.train import evaluate


@pytest.fixture
def run(finished_run):
    """Evaluates a policy on the patients of the shared run; returns what was written."""
    args, _ = finished_run
    folder = args.output_dir.parent / "evaluated"  # beside the run, so that its oracle is found
    cohorts = ["--cohort", str(args.cohort), "--holdout-cohort", str(args.holdout_cohort)]

    def evaluated(policy, *flags):
        flags = [*flags, *cohorts, "--output-dir", str(folder)]
        assert evaluate.main([str(policy), *flags]) == 0
        paths = list(folder.iterdir())
        (path,) = (path for path in paths if not path.stem.endswith("-patients"))
        content = path.read_text()
        for each in paths:
            each.unlink()
        return path.name, content

    return evaluated


def designed(ppo, policy, path, model):
    """(P,) rewards, by a model, of the deterministic designs for the patients of a file."""
    agent, _ = policies.load_policy(policy, ppo.Agent, "cpu")
    features = load_cohort(path).features.float()
    with torch.no_grad():
        design, _ = agent.design(torch.cat([features, torch.zeros(len(features), 2)], -1))
    params = SimpleNamespace(patients=features, reward_config=RewardConfig())
    design = on_safe_side(design, SimpleNamespace(params=params, reward_model=model))
    return compute_reward(model(features, *design.values()))


def test_a_policy_repeats_the_figures_of_its_run(finished_run, run, capsys):
    output_dir, summary = finished_run[0].output_dir, finished_run[1]
    for policy in (output_dir, output_dir / "stage2_policy.pt"):
        name, content = run(policy)
        figures = json.loads(content)
        assert re.fullmatch(r"evaluation-cohort-[0-9a-f]{8}\.json", name)
        deterministic = [key for key in summary if re.match("(train|holdout)_", key)]
        assert len(deterministic) == 2 * (3 + len(YARDSTICK) + len(PREDICTED))
        for key in deterministic:
            assert figures[key] == pytest.approx(summary[key], rel=1e-6), key
        # Of other samples of the same designs.
        assert figures["mean_reward"] == pytest.approx(summary["mean_reward"], rel=0.1)
        assert f"{summary['train_deterministic_reward']:.3f}" in capsys.readouterr().out
    assert (figures["num_patients"], figures["reward_model"]) == (12, "mechanistic")
    again, other = (
        json.loads(run(output_dir, "--no-oracle", "--seed", seed)[1]) for seed in ("1", "2")
    )
    assert figures["mean_reward"] == again["mean_reward"] != other["mean_reward"]


def test_a_policy_is_evaluated_on_any_cohort_or_the_shipped_ones(ppo, finished_run, tmp_path):
    policy = Path(shutil.copy(finished_run[0].output_dir / "stage2_policy.pt", tmp_path))
    table = pd.read_csv(files("hydrogel_gym.patients") / "cohort_holdout.csv").tail(50)
    table.to_parquet(tmp_path / "mine.parquet", index=False)
    for flags in (["--cohort", str(tmp_path / "mine.parquet")], []):
        assert evaluate.main([str(policy), *flags, "--no-oracle"]) == 0
    (mine,) = tmp_path.glob("evaluation-mine-????????.json")
    mine, shipped = (
        json.loads(path.read_text()) for path in (mine, tmp_path / "evaluation-shipped.json")
    )
    assert (mine["num_patients"], shipped["num_patients"]) == (50, len(load_cohort()))
    assert "holdout_deterministic_reward" in set(shipped) - set(mine)
    assert mine["train_regret"] is None
    rewards = designed(ppo, policy, tmp_path / "mine.parquet", load_reward_model("mechanistic"))
    expected = pytest.approx(rewards.mean().item(), rel=1e-5)
    assert mine["train_deterministic_reward"] == expected


def test_its_own_model_evaluates_or_another_whose_oracle_is_the_yardstick(
    ppo, finished_run, fitted_run, run
):
    args, summary = fitted_run
    output_dir, paths = args.output_dir, (args.cohort, args.holdout_cohort)
    oracle = finished_run[0].output_dir.parent / "oracle"
    own, hopeful = (
        json.loads(run(output_dir, "--no-oracle", *flags)[1])
        for flags in ([], ["--pessimism", "0"])
    )
    name, content = run(output_dir, "--reward-model", "mechanistic")
    figures = json.loads(content)
    assert re.fullmatch(r"evaluation-cohort-[0-9a-f]{8}-mechanistic\.json", name)
    assert figures["reward_model"] == "mechanistic"
    for cohort, path in zip(COHORTS, paths, strict=True):
        model = load_reward_model("mechanistic")
        reward = designed(ppo, output_dir / "stage2_policy.pt", path, model)
        key = f"{cohort}_deterministic_reward"
        assert own[key] == pytest.approx(summary[key], rel=1e-6)
        assert hopeful[key] > summary[key]
        assert figures[key] == pytest.approx(reward.mean().item(), rel=1e-5)
        assert figures[key] != pytest.approx(summary[key], rel=1e-2)
        regret = (best_designs(path, cache_dir=oracle).score - reward).mean().item()
        assert figures[f"{cohort}_regret"] == pytest.approx(regret, rel=1e-4)


def test_every_checkpoint_is_a_row(finished_run, run):
    output_dir, summary = finished_run[0].output_dir, finished_run[1]
    name, content = run(output_dir, "--every-checkpoint")
    assert re.fullmatch(r"evaluation-cohort-[0-9a-f]{8}-checkpoints\.csv", name)
    lines = [line.split(",") for line in content.splitlines()]
    table = pd.DataFrame(lines[1:], columns=lines[0]).astype(float)
    assert table["iteration"].tolist() == [2, 4, 6]
    metrics = pd.read_csv(output_dir / "metrics.csv").set_index("iteration")
    for key in ("train_deterministic_reward", "holdout_deterministic_reward", "holdout_regret"):
        expected = metrics.loc[[2, 4, 6], key].tolist()
        assert table[key].tolist() == pytest.approx(expected, rel=1e-6)
    assert table["train_fraction_of_oracle"].iloc[-1] == pytest.approx(
        summary["train_fraction_of_oracle"], rel=1e-6
    )
    shares = table.filter(like="share of ")
    assert shares.shape == (3, 24)
    assert shares.sum(axis=1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)


def test_reward_and_oracle_are_of_the_checkpoint_which_is_named_from_anywhere(
    ppo, fitted_run, tmp_path, monkeypatch
):
    (args, summary), device, searched = fitted_run, torch.device("cpu"), []
    checkpoint = str(args.output_dir.parent / "stage1.pt")
    agent, saved = policies.load_policy(args.output_dir / "stage2_policy.pt", ppo.Agent, "cpu")
    assert saved["training_config"]["reward_model"] == checkpoint
    args = dataclasses.replace(args, reward_model=checkpoint)
    cohort = load_cohort(args.holdout_cohort)
    envs = environments.make_envs(args, cohort, device)
    designs = evaluation.policy_designs(agent.design, envs)
    design = [designs[name] for name in ("polymer_id", "formulation", "coverage")]
    predicted = load_reward_model(checkpoint)(cohort.features.float(), *design)
    for name, value in predicted._asdict().items():
        torch.testing.assert_close(designs[name], value)
    torch.testing.assert_close(designs["reward"], compute_reward(predicted))
    expected = pytest.approx(designs["reward"].mean().item(), rel=1e-5)
    assert summary["holdout_deterministic_reward"] == expected

    def search(cohort, reward_model, *_, **__):
        searched.append(reward_model._get_name())
        return type("Best", (), {"score": torch.full((len(cohort),), 40.0)})

    monkeypatch.setattr(evaluation, "best_designs", search)
    sets = evaluation.evaluation_sets(args, {"holdout": cohort}, device, cache_dir=tmp_path)
    assert searched == ["Stage1Ensemble"]
    assert sets["holdout"].best_score.tolist() == [40.0] * 8


def test_patients_are_listed_by_the_regret_that_is_predicted_for_them(finished_run, capsys):
    args, summary = finished_run
    folder = args.output_dir.parent / "listed"  # beside the run, so that its oracle is found
    flags = ["--cohort", str(args.cohort), "--output-dir", str(folder)]
    assert evaluate.main([str(args.output_dir), *flags, "--no-oracle"]) == 0
    mean = f"mean {summary['train_predicted_regret']:.3f}"
    assert f"predicted regret, train: {mean}\n" in capsys.readouterr().out
    (path,) = folder.glob("*-patients.csv")
    assert "regret" not in pd.read_csv(path)
    assert evaluate.main([str(args.output_dir), *flags]) == 0
    correlation = f"{summary['train_regret_rank_correlation']:.2f}"
    assert f"{mean} (true {summary['train_regret']:.3f}), rank correlation {correlation}, " in (
        capsys.readouterr().out
    )
    table = pd.read_csv(path).set_index("patient_id")
    assert sorted(table.index) == sorted(load_cohort(args.cohort).patient_ids)
    assert table["predicted_regret"].is_monotonic_decreasing
    assert (table["predicted_regret"] >= table["gain_found"]).all()
    best = best_designs(args.cohort, cache_dir=args.output_dir.parent / "oracle").to_frame()
    regret = best.set_index("patient_id")["reward"] - table["reward"]
    assert (table["regret"] - regret).abs().max() < 2e-4


def test_regret_is_predicted_only_by_a_calibration_of_the_same_model(
    finished_run, make_stage1, tmp_path, capsys
):
    run = finished_run[0].output_dir
    saved = torch.load(run / "stage2_policy.pt", weights_only=True)
    torch.save(saved | {"regret_calibration": None}, tmp_path / "without.pt")
    del saved["regret_calibration"]
    torch.save(saved, tmp_path / "earlier.pt")
    save_stage1(tmp_path / "other.pt", make_stage1(), {})
    flags = ["--cohort", str(finished_run[0].cohort), "--output-dir", str(tmp_path), "--no-oracle"]
    for policy, more, why in (
        (tmp_path / "without.pt", [], "the policy was trained without an oracle, or by an earlier"),
        (tmp_path / "earlier.pt", [], "the policy was trained without an oracle, or by an earlier"),
        (run, ["--reward-model", str(tmp_path / "other.pt")], "the policy's calibration is of ano"),
    ):
        assert evaluate.main([str(policy), *flags, *more]) == 0
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1
        assert printed.err.startswith(f"note: no regret is predicted: {why}")
        assert "predicted regret" not in printed.out
    assert not list(tmp_path.glob("*-patients.csv"))


POLICY, CHECKPOINT = "stage2_policy.pt", "checkpoints/checkpoint-000004.pt"
EVERY = "--every-checkpoint"


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-2000])


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (lambda run: (run / POLICY).unlink(), "", "POLICY {run}: there is no {run}/stage2_pol"),
        (lambda run: cut_off(run / POLICY), "", "policy {run}/{POLICY} cannot be used: it is cut"),
        (lambda run: shutil.rmtree(run / "checkpoints"), EVERY, "{run} has no checkpoints"),
        (lambda run: cut_off(run / CHECKPOINT), EVERY, "checkpoint {run}/{CHECKPOINT} cannot be "),
        (None, "--cohort {run}/absent.csv", "{run}/absent.csv"),
        (None, "--cohort {run}/metrics.csv", "{run}/metrics.csv"),
        (None, "--output-dir {run}/metrics.csv", "{run}/metrics.csv cannot be written to"),
        (None, "--reward-model mine", "reward_model is 'mine'; allowed: 'mech"),
        (None, "--pessimism 1", "pessimism is 1.0; only a Stage-1 checkpoint"),
        (None, "--device abacus", "--device abacus cannot be used"),
    ],
)
def test_a_bad_request_ends_in_one_line_and_writes_nothing(
    finished_run, tmp_path, capsys, spoil, flags, message
):
    names = dict(run=tmp_path / "run", POLICY=POLICY, CHECKPOINT=CHECKPOINT)
    shutil.copytree(finished_run[0].output_dir, names["run"])
    if spoil:
        spoil(names["run"])
    before = sorted(tmp_path.rglob("*"))
    flags = flags.format(**names).split()
    assert evaluate.main([str(names["run"]), "--no-oracle", *flags]) == 2
    printed = capsys.readouterr().err
    assert message.format(**names) in printed
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
