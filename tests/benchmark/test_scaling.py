import importlib
from pathlib import Path

import pandas as pd
import pytest
import torch

BENCHMARK = Path(__file__).parents[2] / "benchmark"


@pytest.fixture
def scaling(monkeypatch):
    """The benchmark's module, which finds its neighbours as a script does."""
    monkeypatch.syspath_prepend(str(BENCHMARK))
    return importlib.import_module("scaling")


def test_difference_is_relative_to_the_first(scaling):
    a = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert scaling.relative_difference(a, a + torch.tensor([0.0, 0.5])) == pytest.approx(0.1)
    assert scaling.relative_difference(a, a) == 0.0


def curve_rows(scaling, four_ranks: float) -> list[dict]:
    rows = []
    for rate, precision, _ in scaling.CURVES:
        values = {"2 ranks": 1e-10, "4 ranks": four_ranks, "2 threads": 0.5}
        values |= {"fp64": 0.25} if precision == "fp32" else {}
        rows += [
            dict(setting=f"{precision}, learning rate {rate}", name=f"weights, {name}", value=value)
            for name, value in values.items()
        ]
    return rows


def test_curve_is_the_same_only_if_both_numbers_of_ranks_are_within_the_bar(scaling):
    same = "\n".join(scaling.curve_text(pd.DataFrame(curve_rows(scaling, 1e-10))))
    assert "| fp64, learning rate 3e-4 | 1.0e-10 | 1.0e-10 | 1e-09, met | 5.0e-01 | – |" in same
    assert "1.0e-10 | that of 2 threads | 5.0e-01 | 2.5e-01 |" in same
    other = "\n".join(scaling.curve_text(pd.DataFrame(curve_rows(scaling, 1e-6))))
    assert other.count("**not met**") == 2  # of the two in float64
    assert "1e-04, met" in other


def test_overhead_is_the_median_of_the_ratios_within_a_round(scaling):
    # The second round met a machine half as fast; a ratio of medians would be off.
    times = {"plain, nothing averaged": (10.0, 20.0, 11.0), "plain, ours": (11.0, 22.0, 13.2)}
    rows = [
        dict(setting="quick, 500 rows per rank", name=name, round=k, value=value)
        for name, values in times.items()
        for k, value in enumerate(values)
    ]
    for name, seconds in (("1 process, 1 thread", 8.0), ("2 ranks, 1 thread each", 5.0)):
        rows += [
            dict(setting=f"whole, seconds_{part}", name=name, round=0, value=seconds)
            for part in ("iteration", "rollout", "update")
        ]
    text = "\n".join(scaling.overhead_text(pd.DataFrame(rows)))
    assert "| plain, nothing averaged | 11.00 | 10.00 | – |" in text
    assert "| plain, ours | 13.20 | 11.00 | 10.0 % |" in text
    assert "| 2 ranks, 1 thread each | 5.00 [5.00, 5.00]" in text
    assert "| 1.60× |" in text


def test_a_section_leaves_the_others_as_they_are(scaling, tmp_path):
    scaling.write(tmp_path, "curve", curve_rows(scaling, 1e-10))
    first = pd.read_csv(tmp_path / "scaling.csv")
    checkpoints = []
    for preset in scaling.SHORTENED:
        figures = {"iteration": 1000.0, "bytes": 2e6, "whole": 100.0, "table, half as long": 20.0}
        checkpoints += [
            dict(setting=preset, name=name, round=0, value=value) for name, value in figures.items()
        ]
    scaling.write(tmp_path, "checkpoint", checkpoints)
    both = pd.read_csv(tmp_path / "scaling.csv")
    pd.testing.assert_frame_equal(both[both["section"] == "curve"], first)
    text = (tmp_path / "scaling.md").read_text()
    assert text.index("## The same curve") < text.index("## What a checkpoint costs")
    # 100 ms every 20 iterations of a second, and 20 ms in each.
    assert "| 2,000,000 | 100.0 [100.0, 100.0] | 1,000 | 0.50 %, met | 20.0 | 2.00 %, **not" in text
