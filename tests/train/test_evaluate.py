"""Saved policies, and checkpoints, on other patients and by other reward models."""

from __future__ import annotations

import json
import re
import shutil
from importlib.resources import files

import pandas as pd
import pytest
import torch

from hydrogel_gym import compute_reward, load_cohort, load_reward_model
from hydrogel_gym.models.ensemble import save_stage1
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.runs import policies
from hydrogel_gym.runs.metrics import COHORTS, YARDSTICK
from hydrogel_gym.train import evaluate


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    """Flags, or arguments, that name eight patients of each shipped cohort."""
    folder = tmp_path_factory.mktemp("few")
    paths = {"cohort": folder / "cohort.csv", "holdout_cohort": folder / "cohort_holdout.csv"}
    for path in paths.values():
        table = pd.read_csv(files("hydrogel_gym.patients") / path.name)
        table.head(8).to_csv(path, index=False)
    return paths


@pytest.fixture(scope="module")
def trained(ppo, small_run, patients, tmp_path_factory):
    """A run by the built-in model with an oracle: its folder and its summary."""
    args = small_run(tmp_path_factory.mktemp("runs") / "run", oracle=True, **patients)
    return args.output_dir, ppo.train(args)


@pytest.fixture(scope="module")
def fitted(ppo, small_run, patients, make_stage1, tmp_path_factory):
    """A run by a fitted Stage 1: its folder and its summary."""
    folder = tmp_path_factory.mktemp("fitted")
    save_stage1(folder / "stage1.pt", make_stage1(pessimism=1.0), {})
    model = str(folder / "stage1.pt")
    args = small_run(folder / "run", num_iterations=2, reward_model=model, **patients)
    return args.output_dir, ppo.train(args)


@pytest.fixture
def run(patients, tmp_path):
    """Evaluates a policy on the eight patients of each cohort; returns what was written."""

    def evaluated(policy, *flags):
        flags = [*flags, "--cohort", str(patients["cohort"])]
        flags += ["--holdout-cohort", str(patients["holdout_cohort"])]
        assert evaluate.main([str(policy), *flags, "--output-dir", str(tmp_path / "out")]) == 0
        (path,) = (tmp_path / "out").iterdir()
        content = path.read_text()
        path.unlink()
        return path.name, content

    return evaluated


def designed(ppo, policy, path, model):
    """(P,) rewards, by a model, of the deterministic designs for the patients of a file."""
    agent, _ = policies.load_policy(policy, ppo.Agent, "cpu")
    features = load_cohort(path).features.float()
    with torch.no_grad():
        design, _ = agent.design(torch.cat([features, torch.zeros(len(features), 2)], -1))
    return compute_reward(model(features, *design.values()))


def test_a_policy_repeats_the_figures_of_its_run(trained, run, capsys):
    output_dir, summary = trained
    for policy in (output_dir, output_dir / "stage2_policy.pt"):
        name, content = run(policy)
        figures = json.loads(content)
        assert name == "evaluation-cohort.json"
        deterministic = [key for key in summary if re.match("(train|holdout)_", key)]
        assert len(deterministic) == 2 * (3 + len(YARDSTICK))
        for key in deterministic:
            assert figures[key] == pytest.approx(summary[key], rel=1e-6), key
        # Of other samples of the same designs.
        assert figures["mean_reward"] == pytest.approx(summary["mean_reward"], rel=0.1)
        assert f"{summary['train_deterministic_reward']:.3f}" in capsys.readouterr().out
    assert (figures["num_patients"], figures["reward_model"]) == (8, "mechanistic")


def test_a_seed_gives_the_same_samples_and_another_does_not(trained, run):
    first, again, other = (
        json.loads(run(trained[0], "--no-oracle", *flags)[1])
        for flags in ([], ["--seed", "1"], ["--seed", "2"])
    )
    assert first["mean_reward"] == again["mean_reward"] != other["mean_reward"]
    assert first["train_deterministic_reward"] == other["train_deterministic_reward"]


def test_a_policy_is_evaluated_on_any_cohort(ppo, trained, tmp_path):
    table = pd.read_csv(files("hydrogel_gym.patients") / "cohort_holdout.csv").tail(50)
    table.to_parquet(tmp_path / "mine.parquet", index=False)
    flags = ["--cohort", str(tmp_path / "mine.parquet"), "--output-dir", str(tmp_path)]
    assert evaluate.main([str(trained[0]), *flags, "--no-oracle"]) == 0
    figures = json.loads((tmp_path / "evaluation-mine.json").read_text())
    assert figures["num_patients"] == 50
    assert "holdout_deterministic_reward" not in figures
    assert figures["train_regret"] is None
    policy, model = trained[0] / "stage2_policy.pt", load_reward_model("mechanistic")
    expected = designed(ppo, policy, tmp_path / "mine.parquet", model).mean().item()
    assert figures["train_deterministic_reward"] == pytest.approx(expected, rel=1e-5)


def test_without_patients_the_shipped_ones_are_evaluated_beside_the_policy(trained, tmp_path):
    shutil.copy(trained[0] / "stage2_policy.pt", tmp_path)
    assert evaluate.main([str(tmp_path / "stage2_policy.pt"), "--no-oracle"]) == 0
    figures = json.loads((tmp_path / "evaluation-shipped.json").read_text())
    assert figures["num_patients"] == len(load_cohort())
    assert "holdout_deterministic_reward" in figures


def test_a_policy_is_evaluated_by_the_model_that_it_was_trained_on(fitted, run):
    output_dir, summary = fitted
    figures = json.loads(run(output_dir, "--no-oracle")[1])
    for cohort in COHORTS:
        key = f"{cohort}_deterministic_reward"
        assert figures[key] == pytest.approx(summary[key], rel=1e-6)


def test_another_model_evaluates_and_its_oracle_is_the_yardstick(ppo, fitted, run, patients):
    output_dir, summary = fitted
    name, content = run(output_dir, "--reward-model", "mechanistic")
    figures = json.loads(content)
    assert (name, figures["reward_model"]) == ("evaluation-cohort-mechanistic.json", "mechanistic")
    for cohort, path in zip(COHORTS, patients.values(), strict=True):
        model = load_reward_model("mechanistic")
        reward = designed(ppo, output_dir / "stage2_policy.pt", path, model)
        key = f"{cohort}_deterministic_reward"
        assert figures[key] == pytest.approx(reward.mean().item(), rel=1e-5)
        assert figures[key] != pytest.approx(summary[key], rel=1e-2)
        regret = (best_designs(path).score - reward).mean().item()
        assert figures[f"{cohort}_regret"] == pytest.approx(regret, rel=1e-4)


def test_another_model_stands_in_for_one_that_is_gone(fitted, run, tmp_path, capsys):
    output_dir, _ = fitted
    saved = torch.load(output_dir / "stage2_policy.pt", weights_only=True)
    saved["training_config"]["reward_model"] = str(tmp_path / "gone.pt2")
    saved["training_config"]["pessimism"] = 0.5  # of that model, not of another
    torch.save(saved, tmp_path / "policy.pt")
    assert evaluate.main([str(tmp_path / "policy.pt"), "--no-oracle"]) == 2
    assert "gone.pt2" in capsys.readouterr().err
    flags = ["--no-oracle", "--reward-model", "mechanistic"]
    there, gone = (
        json.loads(run(policy, *flags)[1]) for policy in (output_dir, tmp_path / "policy.pt")
    )
    assert gone["mean_reward"] == there["mean_reward"]


def test_less_pessimism_promises_more(fitted, run):
    figures = json.loads(run(fitted[0], "--no-oracle", "--pessimism", "0")[1])
    assert figures["train_deterministic_reward"] > fitted[1]["train_deterministic_reward"]


def test_every_checkpoint_is_a_row(trained, run, ppo):
    output_dir, summary = trained
    name, content = run(output_dir, "--every-checkpoint")
    assert name == "evaluation-cohort-checkpoints.csv"
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


def test_a_policy_of_an_earlier_version_is_evaluated(trained, run, tmp_path):
    saved = torch.load(trained[0] / "stage2_policy.pt", weights_only=True)
    saved["training_config"] |= {"reward_precision": "fp32", "true_reward_model": None, "old": 1}
    torch.save(saved, tmp_path / "policy.pt")
    figures = json.loads(run(tmp_path / "policy.pt", "--no-oracle")[1])
    key = "holdout_deterministic_reward"
    assert figures[key] == pytest.approx(trained[1][key], rel=1e-6)


def test_figures_have_no_columns_of_a_second_model(trained, run):
    for content in (run(trained[0], "--no-oracle")[1], json.dumps(trained[1])):
        assert not [key for key in json.loads(content) if key.startswith("true_")]


class _Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def damage(folder, what):
    """A copy of a run, in a state."""
    if what == "no policy":
        (folder / "stage2_policy.pt").unlink()
    elif what == "cut off":
        path = folder / "stage2_policy.pt"
        path.write_bytes(path.read_bytes()[:-2000])
    elif what == "malicious":
        torch.save(_Payload(), folder / "stage2_policy.pt")
    elif what == "no checkpoints":
        shutil.rmtree(folder / "checkpoints")
    elif what == "damaged checkpoint":
        path = folder / "checkpoints" / "checkpoint-000004.pt"
        path.write_bytes(path.read_bytes()[:-100])
    elif what == "unreadable cohort":
        (folder / "mine.csv").write_text("patient_id,age\nann,40\n")
    elif what == "unwritable":
        (folder / "file").touch()


@pytest.mark.parametrize(
    ("what", "flags", "message"),
    [
        ("no policy", [], "POLICY {run}: there is no {run}/stage2_policy.pt; `python "),
        ("cut off", [], "policy {run}/stage2_policy.pt cannot be used: it is cut off"),
        ("malicious", [], "policy {run}/stage2_policy.pt cannot be used: Weights only load fai"),
        ("no checkpoints", ["--every-checkpoint"], "{run} has no checkpoints"),
        (
            "damaged checkpoint",
            ["--every-checkpoint"],
            "checkpoint {run}/checkpoints/checkpoint-000004.pt cannot be used: it is ",
        ),
        ("absent cohort", ["--cohort", "{run}/absent.csv"], "{run}/absent.csv"),
        ("unreadable cohort", ["--cohort", "{run}/mine.csv"], "{run}/mine.csv"),
        ("unwritable", ["--output-dir", "{run}/file"], "{run}/file cannot be written to"),
        ("absent model", ["--reward-model", "mine"], "reward_model is 'mine'; allowed: 'mech"),
        ("no ensemble", ["--pessimism", "1"], "pessimism is 1.0; only a Stage-1 checkpoint"),
        ("absent device", ["--device", "abacus"], "--device abacus cannot be used"),
        ("unknown flag", ["--every"], "--every"),
    ],
    ids=lambda value: value if isinstance(value, str) and "run" not in value else "",
)
def test_a_bad_request_ends_in_one_line_and_writes_nothing(
    trained, tmp_path, capsys, what, flags, message
):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    damage(folder, what)
    before = sorted(tmp_path.rglob("*"))
    flags = [flag.format(run=folder) for flag in flags]
    assert evaluate.main([str(folder), "--no-oracle", *flags]) == 2
    printed = capsys.readouterr().err
    assert message.format(run=folder) in printed
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
