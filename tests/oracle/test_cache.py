"""The same question is searched once, and a stale or damaged file never believed."""

from __future__ import annotations

import dataclasses
import shutil
from importlib.resources import files
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from hydrogel_gym import RewardConfig, oracle
from hydrogel_gym.oracle import best_designs, cached_best_designs

pytestmark = pytest.mark.usefixtures("short_search")


@pytest.fixture
def arguments(three_patients, toy_model, tmp_path):
    return dict(cohort=three_patients, reward_model=toy_model, cache_dir=tmp_path / "cache")


@pytest.fixture
def searched(monkeypatch):
    """Seeds of the searches that were run."""
    seeds = []

    def search(patients, model, config, seed, original=oracle.search.search):
        seeds.append(seed)
        return original(patients, model, config, seed)

    monkeypatch.setattr(oracle.best, "search", search)
    return seeds


def test_result_is_searched_for_once_and_then_read(arguments, searched):
    assert cached_best_designs(**arguments) is None
    assert not arguments["cache_dir"].exists()
    first = best_designs(**arguments)
    for again in (best_designs(**arguments), cached_best_designs(**arguments)):
        assert all(map(torch.equal, again.design, first.design))
        assert all(map(torch.equal, again.outcomes, first.outcomes))
        assert torch.equal(again.score, first.score)
        assert torch.equal(again.seed_gap, first.seed_gap)
    assert searched == [0, 1]
    assert cached_best_designs(**arguments, seed=1) is None
    (path,) = arguments["cache_dir"].iterdir()
    assert "score" not in pq.read_schema(path).names  # it is computed again from the design


def test_cache_is_passed_over_when_anything_it_depends_on_changes(
    arguments, searched, three_patients, toy_model
):
    model = torch.nn.Linear(1, 1)
    model.forward = toy_model
    arguments["reward_model"] = model

    def other_outcomes(*design):
        return toy_model(*design)._replace(delta_ef_pct=design[2][..., 3])

    features = three_patients.features.clone()
    features[2, 3] += 1e-6
    for number, change in enumerate(
        (
            lambda: {},
            lambda: {"cohort": dataclasses.replace(three_patients, features=features)},
            lambda: {"reward_config": RewardConfig(novelty_bonus=0.2)},
            lambda: {"seed": 1},
            lambda: torch.nn.init.constant_(model.weight, 3.0) is None or {},
            lambda: setattr(model, "forward", other_outcomes) or {},
        ),
        start=1,
    ):
        best_designs(**(arguments | change()))
        assert len(searched) == 2 * number
        assert len(list(arguments["cache_dir"].iterdir())) == number


def test_key_of_the_cache_changes_with_each_source_it_depends_on(
    tmp_path, three_patients, toy_model, monkeypatch
):
    here, package = Path(str(files("hydrogel_gym"))), tmp_path / "hydrogel_gym"
    shutil.copytree(here, package, ignore=shutil.ignore_patterns("__pycache__"))
    sources = [package / Path(str(path)).relative_to(here) for path in oracle.cache.sources()]
    monkeypatch.setattr(oracle.cache, "files", lambda name: package)

    def key():
        features = three_patients.features.float()
        arguments = (tmp_path, three_patients, features, toy_model, RewardConfig(), 0)
        return oracle.cache.cache_entry(*arguments)

    keys = [key()]
    assert key() == keys[0]
    assert len(sources) > 5
    for path in [*sources, package / "polymers.csv"]:
        path.write_bytes(path.read_bytes() + b"\n")
        assert key() not in keys, path
        keys.append(key())


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, table: path.write_bytes(path.read_bytes()[:1000]),
        lambda path, table: path.write_text("not a table"),
        lambda path, table: pq.write_table(table.slice(1), path),
        lambda path, table: pq.write_table(table.replace_schema_metadata({"key": "other"}), path),
        lambda path, table: pq.write_table(table.drop_columns(["coverage"]), path),
    ],
    ids=["cut short", "text", "other rows", "other key", "column"],
)
def test_damaged_cache_is_replaced(arguments, searched, damage):
    first = best_designs(**arguments)
    (path,) = arguments["cache_dir"].iterdir()
    whole = path.read_bytes()
    damage(path, pq.read_table(path))
    again = best_designs(**arguments)
    assert len(searched) == 4
    assert torch.equal(again.score, first.score)
    assert list(arguments["cache_dir"].iterdir()) == [path]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("during", ["hydrogel_gym.oracle.best.search", "os.fsync"])
def test_interrupted_search_or_write_leaves_no_file(arguments, monkeypatch, tmp_path, during):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(during, interrupted)
    with pytest.raises(KeyboardInterrupt):
        best_designs(**arguments)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
