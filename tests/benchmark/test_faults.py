"""What the fault benchmark takes for the end of an undisturbed run, and what it does not."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

PATH = Path(__file__).parents[2] / "benchmark" / "faults" / "runs.py"


@pytest.fixture(scope="module")
def runs():
    spec = importlib.util.spec_from_file_location("fault_runs", PATH)
    module = sys.modules["fault_runs"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fault_runs"]


@pytest.fixture
def pair(runs, tmp_path):
    """Two finished runs that differ in their times alone."""
    for number, name in enumerate(("undisturbed", "continued")):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        for file in runs.FINISHED_FILES:
            (tmp_path / name / file).touch()
        (tmp_path / name / "checkpoints" / "checkpoint-000003.pt").touch()
        weights = {"out.weight": torch.tensor([1.0, -0.0]), "obs_mean": torch.zeros(2)}
        torch.save({"policy_state_dict": weights}, tmp_path / name / "stage2_policy.pt")
        summary = {"entropy": 0.1, "wall_seconds": number, "resumed_at_iteration": number or None}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
        write_rows(tmp_path / name, [(1, 0.5, number), (2, 0.6, number), (3, 0.7, number)])
    return tmp_path / "undisturbed", tmp_path / "continued"


def write_rows(run_dir, rows, columns=("iteration", "mean_reward", "wall_seconds")):
    pd.DataFrame(rows, columns=columns).to_csv(run_dir / "metrics.csv", index=False)


def test_a_run_that_differs_in_its_times_alone_is_the_same(runs, pair):
    assert runs.differences(*pair) == []


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(1, 0.5, 0), (3, 0.7, 0)], "metrics.csv lacks iteration 2"),
        ([(1, 0.5, 0), (2, 0.6, 0)], "metrics.csv lacks iteration 3"),
        (
            [(1, 0.5, 0), (2, 0.6, 0), (2, 0.6, 0), (3, 0.7, 0)],
            "metrics.csv has iteration 2 twice or more",
        ),
        (
            [(1, 0.5, 0), (3, 0.7, 0), (2, 0.6, 0)],
            "metrics.csv has other iterations, or in another order",
        ),
        ([(1, 0.5, 0), (2, 0.6000000000000001, 0), (3, 0.7, 0)], "iteration 2 differs in"),
    ],
    ids=["missing", "last missing", "twice", "order", "value"],
)
def test_a_table_that_is_not_the_same_is_named(runs, pair, rows, expected):
    write_rows(pair[1], rows)
    (line,) = runs.differences(*pair)
    assert line.startswith(expected)


@pytest.mark.parametrize(
    "column", "rollout_seconds reward_model_seconds update_seconds samples_per_second".split()
)
def test_a_time_of_any_kind_may_differ(runs, pair, column):
    for number, run_dir in enumerate(pair):
        write_rows(run_dir, [(1, 0.5, number)], ("iteration", "mean_reward", column))
    assert runs.differences(*pair) == []


def test_a_column_that_is_missing_is_named(runs, pair):
    write_rows(pair[1], [(1, 0.5)], ("iteration", "mean_reward"))
    assert runs.differences(*pair) == ["metrics.csv has other columns"]


@pytest.mark.parametrize(
    "weight", [torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0]).double()], ids=["sign", "dtype"]
)
def test_weights_that_differ_in_a_bit_are_told(runs, pair, weight):
    weights = {"out.weight": weight, "obs_mean": torch.zeros(2)}
    torch.save({"policy_state_dict": weights}, pair[1] / "stage2_policy.pt")
    assert runs.differences(*pair) == ["1 of 2 weights differ, out.weight first"]


def test_a_figure_that_differs_is_named(runs, pair):
    (pair[1] / "summary.json").write_text(json.dumps({"entropy": 0.2, "wall_seconds": 3}))
    assert runs.differences(*pair) == ["summary.json differs in entropy"]


def test_a_file_that_is_missing_or_left_behind_is_named(runs, pair):
    left = pair[1] / "checkpoints" / ".checkpoint-000002.pt.abcdefgh"
    left.touch()
    assert runs.differences(*pair) == [f"checkpoints/{left.name} was left behind"]
    (pair[1] / "summary.json").unlink()
    assert runs.differences(*pair) == ["there is no summary.json"]
