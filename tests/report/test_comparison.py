"""Runs that differ by nothing but the seed are one group of a comparison."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hydrogel_gym.report.comparison import comparison_page, group_runs
from hydrogel_gym.report.reading import SavedRun


@pytest.fixture
def several(trained, tmp_path, edit_json):
    """Three runs that differ by the seed, and one of another width and the name of the first."""
    runs = []
    for i, (seed, reward) in enumerate(((1, 20.0), (2, 23.0), (3, 21.5), (1, 10.0))):
        path = shutil.copytree(trained, tmp_path / ("other/run-0" if i == 3 else f"run-{i}"))
        width = 16 if i < 3 else 32
        edit_json(path / "config.json", seed=seed, output_dir=str(path), hidden_dim=width)
        edit_json(path / "summary.json", mean_reward=reward)
        runs.append(path)
    return runs


@pytest.mark.parametrize(
    ("changes", "labels"),
    {
        "seed": ([{"seed": 2}, {"seed": 3}], ["run-0 and 2 more"]),
        "width": ([{"seed": 2}, {"hidden_dim": 32}], ["hidden_dim 16", "hidden_dim 32"]),
        "much": (
            [{"seed": 2}, {"preset": "full", "gamma": 0.9, "num_steps": 7, "ent_coef": 0.5}],
            ["preset quick", "preset full"],
        ),
        "one preset": ([{"gamma": 0.9, "num_steps": 7, "ent_coef": 0.5, "env_id": "x"}], None),
        # Runs of earlier versions are in the group of today unless a setting meant something else.
        "removed": ([{"evaluate": None, "reward_precision": "fp32"}], ["run-0 and 1 more"]),
        "gone": ([{"reward_precision": "bf16"}], ["run-0", "reward_precision bf16"]),
        "tracker": ([{"wandb_project": "x", "wandb_entity": "x"}], ["run-0 and 1 more"]),
        "patients": ([{"cohort": "x"}], ["cohort None", "cohort x"]),
        "held out": ([{"holdout_cohort": "x"}], ["holdout_cohort None", "holdout_cohort x"]),
        "outcomes": ([{"reward_model": "x"}], ["reward_model mechanistic", "reward_model x"]),
    }.values(),
)
def test_group_is_named_by_the_settings_that_tell_it_from_others(trained, changes, labels):
    config = json.loads((trained / "config.json").read_text())
    config |= dict(cohort=None, holdout_cohort=None)
    runs = [SavedRun(Path(f"run-{i}"), config | change) for i, change in enumerate([{}, *changes])]
    assert [group.label for group in group_runs(runs)] == (labels or ["run-0", "run-1"])


def test_comparison_tabulates_mean_and_deviation_over_the_seeds_of_a_group(
    several, content, edit_json
):
    shown = content(*several)
    figures, runs, differing = shown["sections"][0].tables
    assert figures.header == ["figure", "hidden_dim 16 (n = 3)", "hidden_dim 32 (n = 1)"]
    assert figures.rows[0][1:] == [f"21.50 ± {np.std([20.0, 23.0, 21.5], ddof=1):.2f}", "10.00"]
    # Runs of one name are told apart by their paths.
    assert [row[0] for row in runs.rows] == [str(path) for path in several]
    assert differing.rows == [["hidden_dim", "16", "32"]]
    assert shown["patients"] is None
    # Unfinished runs are marked and left out of the figures.
    (several[1] / "summary.json").unlink()
    edit_json(several[2] / "summary.json", interrupted=True)
    shown = content(*several)
    figures, runs, _ = shown["sections"][0].tables
    assert (figures.header[1], figures.rows[0][1]) == ("hidden_dim 16 (n = 1)", "20.00")
    assert [row[3] for row in runs.rows] == ["finished", "unfinished", "unfinished", "finished"]
    unfinished = f"Unfinished, in the curves only: {several[1]}, {several[2]}."
    assert unfinished in shown["sections"][0].texts
    assert any(gap.startswith(f"{several[1]}: summary.json is mis") for gap in shown["gaps"])


def test_comparison_draws_every_run_and_their_mean_as_far_as_all_got(several, content):
    metrics = pd.read_csv(several[1] / "metrics.csv")
    metrics["mean_reward"] += 3.0
    metrics.iloc[:4].to_csv(several[1] / "metrics.csv", index=False)
    shown = content(*several[:2])
    one, other, mean, source = shown["sections"][1].plots[0].figure.data
    np.testing.assert_allclose(mean.y, np.array(one.y)[:4] + 1.5)
    assert len(mean.y) == len(other.y) == 4
    assert (one.line.width, other.line.width, mean.line.width) == (1, 1, 3)
    assert source.line.dash == "dot"
    bar, *_ = shown["sections"][2].plots[0].figure.data
    assert bar.marker.color == mean.line.color != source.line.color


def test_comparison_page_is_whole_and_names_in_its_legends_are_no_markup(
    several, read_run, edit_json, content
):
    edit_json(several[3] / "config.json", hidden_dim="<b>x</b>")
    page = comparison_page([read_run(path) for path in several]).decode()
    assert "21.50 ± 1.50" in page
    assert "<b>x</b>" not in page
    assert len(page) < 6e6
    legend = content(*several)["sections"][1].plots[0].figure.data[-2].name
    assert legend == "hidden_dim &lt;b&gt;x&lt;/b&gt;"
