from __future__ import annotations

import runpy
import sys
from importlib.resources import files

import pandas as pd
import pytest

from hydrogel_gym.oracle import __main__ as command_line
from hydrogel_gym.oracle import best_designs


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_table_of_a_users_cohort_is_written(tmp_path, short_search, capsys, suffix):
    cohort, output = tmp_path / "mine.csv", tmp_path / f"best{suffix}"
    lines = (files("hydrogel_gym.patients") / "cohort.csv").read_text().splitlines()
    cohort.write_text("\n".join(lines[:4]) + "\n")
    flags = ["--cohort", str(cohort), "--output", str(output), "--seed", "3"]
    assert command_line.main(flags) == 0
    table = pd.read_csv(output) if suffix == ".csv" else pd.read_parquet(output)
    best = best_designs(cohort, seed=3)
    assert table["reward"].to_numpy() == pytest.approx(best.score.numpy(), abs=1e-4)
    share = 100 * (best.seed_gap <= 0.02).float().mean()
    assert f"two searches agree within 0.02 for {share:.1f} %" in capsys.readouterr().out


def test_module_runs_as_a_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["oracle", "--help"])
    monkeypatch.delitem(sys.modules, "hydrogel_gym.oracle.__main__")
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_module("hydrogel_gym.oracle", run_name="__main__")
    assert capsys.readouterr().out.startswith("usage: python -m hydrogel_gym.oracle")


def test_bad_command_line_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for *flags, message in (
        ("--output", "x.txt", "--output is 'x.txt'; allowed: a .csv or .parquet file"),
        ("--output", "no/x.csv", "in a folder that does not exist"),
        ("--cohort", "absent.csv", "absent.csv"),
        ("--reward-model", "nonsense", "'nonsense'"),
        ("--seed", "-1", "--seed is -1; allowed: 0 or more"),
        ("--device", "nonsense", "nonsense"),
    ):
        assert command_line.main(["--output", "x.csv", *flags]) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
