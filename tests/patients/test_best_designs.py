"""The shipped best designs: how they are rebuilt and checked, and whether they are the best."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hydrogel_gym import Cohort, load_cohort
from hydrogel_gym.oracle import cached_best_designs
from hydrogel_gym.oracle.best import search_designs
from hydrogel_gym.oracle.cache import SHIPPED_DESIGNS


@pytest.fixture
def maker(load_checkout_script, monkeypatch):
    """The script, which finds what is shipped instead of searching."""
    script = load_checkout_script("patients/make_best_designs.py")
    monkeypatch.setattr(script, "search_designs", lambda cohort, **_: cached_best_designs(cohort))
    return script


def test_files_are_rewritten_byte_for_byte(maker, monkeypatch, tmp_path, capsys):
    shipped, folder = maker.FOLDER, tmp_path
    monkeypatch.setattr(maker, "FOLDER", folder)
    assert maker.main([]) == 0
    for name in SHIPPED_DESIGNS.values():
        assert (folder / name).read_bytes() == (shipped / name).read_bytes()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 250_000
    assert maker.main(["--check"]) == 0
    assert capsys.readouterr().out.count("byte for byte") == len(SHIPPED_DESIGNS)


@pytest.mark.parametrize(
    ("less", "code", "message"),
    [
        (1e-4, 0, "best_designs.csv: other digits; the rewards of 100.0% of patients agree"),
        (1.0, 1, "best_designs.csv: the design of P0001 earns 28.4750, one found now 27.4750"),
    ],
)
def test_check_compares_rewards_where_digits_differ(
    maker, monkeypatch, capsys, less, code, message
):
    def search(cohort, **_):
        best = cached_best_designs(cohort)
        score = best.score.clone()
        score[1] -= less
        return dataclasses.replace(best, score=score)

    monkeypatch.setattr(maker, "search_designs", search)
    assert maker.main(["--check"]) == code
    assert message in "".join(capsys.readouterr())


def test_check_names_a_file_that_is_of_other_code(maker, monkeypatch, capsys):
    monkeypatch.setattr(maker, "cached_best_designs", lambda cohort: None)
    assert maker.main(["--check"]) == 1
    assert "best_designs.csv is not of this code and cohort, or damaged" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("cohort", SHIPPED_DESIGNS)
def test_shipped_designs_are_as_good_as_those_of_a_new_search(cohort):
    whole, shipped = load_cohort(cohort), cached_best_designs(cohort)
    rows = torch.arange(7, len(whole), len(whole) // 50)
    ids = tuple(whole.patient_ids[row] for row in rows)
    some = Cohort(ids, whole.features[rows], whole.extra.iloc[rows], "some")
    found = search_designs(some, seed=3)
    error_bar = (shipped.seed_gap[rows] + found.seed_gap).clamp_min(0.02)
    assert (shipped.score[rows] >= found.score - error_bar).all()
