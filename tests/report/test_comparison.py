"""Runs that differ by nothing but the seed are one group of a comparison."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from hydrogel_gym.report.comparison import Group, comparison_page, overlay
from hydrogel_gym.report.plots import BLUE


@pytest.fixture
def several(trained, tmp_path, edit_json):
    """Three runs that differ by the seed, and one of another width."""
    runs = []
    for seed, reward in ((1, 20.0), (2, 23.0), (3, 21.5), (1, 10.0)):
        path = shutil.copytree(trained, tmp_path / f"run-{len(runs)}")
        width = 16 if len(runs) < 3 else 32
        edit_json(path / "config.json", seed=seed, output_dir=str(path), hidden_dim=width)
        edit_json(path / "summary.json", mean_reward=reward)
        runs.append(path)
    return runs


def test_comparison_tabulates_mean_and_deviation_over_the_seeds_of_a_group(several, content):
    shown = content(*several)
    figures, runs, differing = shown["sections"][0].tables
    assert figures.header == ["figure", "hidden_dim 16 (n = 3)", "hidden_dim 32 (n = 1)"]
    deviation = np.std([20.0, 23.0, 21.5], ddof=1)
    name = "mean reward, sampled designs, training patients"
    assert figures.rows[0] == [name, f"21.50 ± {deviation:.2f}", "10.00"]
    assert [row[0] for row in runs.rows] == [path.name for path in several]
    assert differing.rows == [["hidden_dim", "16", "32"]]
    assert shown["patients"] is None


def test_comparison_marks_unfinished_runs_and_leaves_them_out_of_the_figures(
    several, content, edit_json
):
    (several[1] / "summary.json").unlink()
    edit_json(several[2] / "summary.json", interrupted=True)
    shown = content(*several)
    figures, runs, _ = shown["sections"][0].tables
    assert figures.header[1] == "hidden_dim 16 (n = 1)"
    assert figures.rows[0][1] == "20.00"
    assert [row[3] for row in runs.rows] == ["finished", "unfinished", "unfinished", "finished"]
    assert "Unfinished, in the curves only: run-1, run-2." in shown["sections"][0].texts
    assert any(gap.startswith("run-1: summary.json is missing") for gap in shown["gaps"])
    assert not any("designs are those" in gap for gap in shown["gaps"])  # none is shown


def test_comparison_draws_every_run_thin_and_the_mean_thick_as_far_as_all_got(several, content):
    metrics = pd.read_csv(several[1] / "metrics.csv")
    metrics["mean_reward"] += 3.0
    metrics.iloc[:4].to_csv(several[1] / "metrics.csv", index=False)
    shown = content(*several[:2])
    one, other, mean, source = shown["sections"][1].plots[0].figure.data
    assert (one.line.width, other.line.width, mean.line.width) == (1, 1, 3)
    np.testing.assert_allclose(mean.y, np.array(one.y)[:4] + 1.5)
    assert len(mean.y) == len(other.y) == 4
    assert source.line.dash == "dot"


def test_group_has_one_colour_in_curves_and_bars(several, content):
    for path in several[:3]:
        (path / "summary.json").unlink()
    _, curves, polymers = content(*several)["sections"]
    drawn = {trace.name: trace.line.color for trace in curves.plots[0].figure.data}
    bar, source = polymers.plots[0].figure.data
    assert bar.name == "hidden_dim 32"
    assert bar.marker.color == drawn["hidden_dim 32"]
    assert source.marker.color not in drawn.values()


def test_runs_and_groups_of_one_name_are_told_apart(several, content, edit_json, tmp_path):
    paths = [tmp_path / name / "run" for name in ("one", "two")]
    for width, old, new in zip((16, 32), several, paths, strict=False):
        new.parent.mkdir()
        old.rename(new)
        edit_json(new / "config.json", a=width, b=width, c=width, d=width)
    shown = content(*paths)
    figures, runs, *_ = shown["sections"][0].tables
    assert [row[0] for row in runs.rows] == [str(path) for path in paths]
    assert figures.header[1:] == [f"{path} (n = 1)" for path in paths]
    assert len(shown["sections"][2].plots[0].figure.data) == 3


def test_groups_that_differ_in_many_settings_go_by_their_presets(several, content, edit_json):
    edit_json(several[3] / "config.json", preset="full", gamma=0.9, num_steps=7, ent_coef=0.5)
    preset = json.loads((several[0] / "config.json").read_text())["preset"]
    header = content(*several)["sections"][0].tables[0].header
    assert header[1:] == [f"preset {preset} (n = 3)", "preset full (n = 1)"]


def test_runs_of_another_version_or_tracker_are_in_the_group_of_today(several, content, edit_json):
    removed = dict(evaluate=None, reward_precision="fp32", true_reward_model=None)
    edit_json(several[0] / "config.json", **removed, wandb_project="mine", wandb_entity="me")
    header = content(*several[:3])["sections"][0].tables[0].header
    assert header[1:] == ["run-0 and 2 more (n = 3)"]


@pytest.mark.parametrize("name", ["cohort", "holdout_cohort", "reward_model", "reward_precision"])
def test_runs_of_other_patients_or_model_or_with_a_setting_that_is_gone_are_other_groups(
    several, content, edit_json, name
):
    edit_json(several[1] / "config.json", **{name: "mine"})
    figures, _, differing = content(*several[:2])["sections"][0].tables
    assert [column.endswith("(n = 1)") for column in figures.header[1:]] == [True, True]
    assert [row[0] for row in differing.rows] == [name]
    assert differing.rows[0][2] == "mine"


def test_comparison_page_is_whole_and_names_in_its_legends_are_no_markup(several, read_run):
    runs = [read_run(path) for path in several]
    page = comparison_page(runs).decode()
    assert "Comparison of 4 runs" in page
    assert "21.50 ± 1.50" in page
    assert len(page) < 6e6
    assert page.count("<table") == 3
    figure = overlay([Group("<b>x</b>", runs[:1], BLUE)], "mean_reward", "y")
    assert figure.data[0].name == "&lt;b&gt;x&lt;/b&gt;"
