import json
import random

import pandas as pd
import pytest
import torch
from robustness import faults, inflict, trials


@pytest.fixture
def pair(tmp_path):
    """Two finished runs that differ in their times alone."""
    for seconds, name in enumerate(("undisturbed", "continued")):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        for file in (*trials.FINISHED_FILES, "checkpoints/checkpoint-000003.pt"):
            (tmp_path / name / file).touch()
        finish(tmp_path / name, seconds, [(k, 0.5, seconds) for k in (1, 2, 3)])
    return tmp_path / "undisturbed", tmp_path / "continued"


def finish(run_dir, seconds, rows, weight=-0.0, entropy=0.1):
    weights = {"out": torch.tensor([1.0, weight]), "obs_mean": torch.zeros(2)}
    torch.save({"policy_state_dict": weights}, run_dir / "stage2_policy.pt")
    columns = ["iteration", "mean_reward", "wall_seconds"]
    pd.DataFrame(rows, columns=columns).to_csv(run_dir / "metrics.csv", index=False)
    summary = {"entropy": entropy, "wall_seconds": seconds, "resumed_at_iteration": seconds or None}
    (run_dir / "summary.json").write_text(json.dumps(summary))


def test_runs_are_the_same_whose_times_alone_differ_and_whatever_else_differs_is_named(pair):
    assert trials.differences(*pair) == []
    for numbers in ([1, 3], [1, 2], [1, 2, 2, 3], [1, 3, 2]):
        finish(pair[1], 7, [(number, 0.5, 7) for number in numbers])
        assert "iterations in metrics.csv" in "".join(trials.differences(*pair))
    finish(pair[1], 1, [(1, 0.5, 1), (2, 0.5000000000000001, 1), (3, 0.5, 1)], 0.0, 0.2)
    (pair[1] / "checkpoints" / ".checkpoint-000002.pt.abcdefgh").touch()
    assert trials.differences(*pair) == [
        "checkpoints/.checkpoint-000002.pt.abcdefgh was left behind",
        "3 figures differ: weight out, mean_reward of iteration 2, entropy of the summary",
    ]
    (pair[1] / "summary.json").unlink()
    assert trials.differences(*pair) == ["there is no summary.json"]


def test_damage_cuts_a_file_off_or_flips_one_bit_at_its_ends_and_in_between():
    whole, rng = bytes(range(100)), random.Random(0)
    for fault in (inflict.CUT, inflict.FLIPPED):
        places = [inflict.place_of(fault, len(whole), number, rng) for number in range(20)]
        assert {0, 99} < set(places) <= set(range(100))
    assert inflict.damaged(whole, inflict.CUT, 7) == whole[:7]
    flipped = inflict.damaged(whole, inflict.FLIPPED, 7)
    assert [(a ^ b).bit_count() for a, b in zip(whole, flipped, strict=True) if a != b] == [1]


def test_a_fault_that_cannot_be_inflicted_or_is_not_survived_is_told(tmp_path):
    ground = inflict.Ground(tmp_path, random.Random(0))

    def impossible(trial, ground, number):
        ground.run_dir.mkdir()
        raise trials.FaultError("no run to kill")

    failed = faults.attempt(impossible, ground, 0)
    assert (failed.same, failed.problems) == (False, ["no run to kill"])
    assert not ground.run_dir.exists()
    (row,) = faults.rows_of([trials.Trial("impossible", saw="nothing", same=True), failed])
    assert row == ["impossible", "2", "1 nothing; 1 ; **1 not as expected**", "1 of 2"]
