import importlib
import math
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

BENCHMARK = Path(__file__).parents[1] / "benchmark"


@pytest.fixture
def scaling(monkeypatch):
    """The benchmark's module, which finds its neighbours as a script does."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARK))
    yield importlib.import_module("scaling")
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARK)):
            del sys.modules[name]


WORK = dict(
    parameters=100,
    multiply_adds=50,
    minibatch_rows=10,
    updates=4,
    steps=3,
    epochs=2,
    samples=20,
    bytes_gathered=8,
    tensors_gathered=2,
    fixed_bytes=1000.0,
    row_bytes=100.0,
)


def test_difference_is_relative_to_the_first(scaling):
    a = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert scaling.relative_difference(a, a + torch.tensor([0.0, 0.5])) == pytest.approx(0.1)
    assert scaling.relative_difference(a, a) == 0.0


def test_largest_difference_leaves_out_what_tells_of_time(scaling):
    a = pd.DataFrame({"mean_reward": [2.0, 4.0], "wall_seconds": [1.0, 2.0], "x": [math.nan] * 2})
    b = pd.DataFrame({"mean_reward": [2.0, 4.4], "wall_seconds": [9.0, 9.0], "x": [math.nan] * 2})
    assert scaling.largest_difference(a, b) == pytest.approx(0.1)


def test_all_reduce_of_one_rank_costs_nothing_and_of_two_is_one_size_over_the_link(scaling):
    assert scaling.reduce_us(1e6, 1) == 0.0
    # 2 (2 - 1) / 2 = 1 times 1 MB over 300 GB/s, and the latency
    assert scaling.reduce_us(1e6, 2) == pytest.approx(30.0 + 1e6 / 300e3)
    # 2 (16 - 1) / 16 MB over 25 GB/s, between two nodes
    assert scaling.reduce_us(1e6, 16) == pytest.approx(75.0 + 1.875e6 / 25e3)


def test_iteration_of_two_gpus_adds_up_by_hand(scaling):
    work = scaling.Work(**WORK)
    launches = scaling.Launches(update=6, update_kernels=10, step=4, step_kernels=2, evaluation=100)
    told = scaling.on_paper(work, launches, gpus=2, averaging=1, table_us=7.0)
    assert told["rows per rank"] == 5
    compute = 1e6 * (6 * 50 * 5 / (156e12 * 0.3) + (1000 + 500) / 2e12)
    assert told["compute"] == pytest.approx(compute)
    # 6 + 1 launches of 5 µs are longer than 10 kernels of 2 µs with so little work.
    reduce = 30.0 + 1e6 * 400 / 300e9
    assert told["update"] == pytest.approx(7 * 5.0 + reduce)
    assert told["rollout"] == pytest.approx(3 * 4 * 5.0)
    gather = 2 * 30.0 + 1e6 * 0.5 * 8 * 20 / 300e9
    shuffle = 1e6 * 2 * 20 * (1 / 2e9 + 40 / 2e12)
    assert told["serial"] == pytest.approx(100 * 5.0 + 7.0 + gather + shuffle)
    assert told["iteration"] == pytest.approx(4 * told["update"] + 60.0 + told["serial"])


def test_weak_scaling_keeps_the_rows_of_a_rank(scaling):
    work = scaling.scaled(scaling.Work(**WORK), 8)
    launches = scaling.Launches(1, 1, 1, 1, 1)
    told = scaling.on_paper(work, launches, gpus=8, averaging=0, table_us=0.0)
    assert told["rows per rank"] == WORK["minibatch_rows"]
    assert work.samples == 8 * WORK["samples"]


def test_launches_are_those_of_the_committed_report(scaling):
    counts = scaling.count_launches(evaluation=0)
    assert counts["plain"].update == counts["plain"].update_kernels > 0
    assert counts["plain"].update > counts["compiled"].update > counts["replayed"].update
    # A graph is launched at once, and holds the compiled kernels.
    assert counts["replayed"].update_kernels > counts["compiled"].update


def test_only_rounds_that_others_left_alone_are_told_where_there_are_enough(scaling):
    rows = [
        dict(name=name, value=value, others=others)
        for name in ("plain, nothing averaged", "plain, ours")
        for value, others in [(1.0, 0.0)] * scaling.LEAST_QUIET_ROUNDS + [(9.0, 1.0)]
    ]
    chosen, is_quiet = scaling.quiet_rounds(pd.DataFrame(rows))
    assert is_quiet
    assert set(chosen["value"]) == {1.0}
    chosen, is_quiet = scaling.quiet_rounds(pd.DataFrame(rows[1:]))
    assert not is_quiet
    assert len(chosen) == len(rows) - 1
