"""The same question is searched once, and a stale or damaged file never believed."""

from __future__ import annotations

import dataclasses
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from hydrogel_gym import Cohort, RewardConfig, load_cohort, oracle
from hydrogel_gym.models.mechanistic import MechanisticModel, MechanisticParams
from hydrogel_gym.oracle import best_designs, cached_best_designs
from hydrogel_gym.oracle.best import key_of
from hydrogel_gym.oracle.cache import SHIPPED_DESIGNS, SOURCES, designs_file, read_designs

pytestmark = pytest.mark.usefixtures("short_search")


@pytest.fixture
def arguments(three_patients, toy_model, tmp_path):
    return dict(cohort=three_patients, reward_model=toy_model, cache_dir=tmp_path / "cache")


@pytest.fixture
def searched(monkeypatch):
    """Seeds of the searches that were run, in one thread."""
    seeds = []

    def search(patients, model, config, seed, original=oracle.search.search):
        seeds.append(seed)
        return original(patients, model, config, seed)

    monkeypatch.setattr(oracle.best, "search", search)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
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
    assert cached_best_designs(**(arguments | {"cache_dir": None})) is None


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


@pytest.fixture
def copied_package(tmp_path, monkeypatch):
    """A copy of all that a key and the shipped designs are read from, to be changed."""
    packages = {}
    for name in ("hydrogel_gym", "hydrogel_gym.patients"):
        packages[name] = tmp_path / name
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(str(files(name))), packages[name], ignore=ignored)
    monkeypatch.setattr(oracle.cache, "files", packages.get)
    return packages


def test_key_changes_with_each_source_it_depends_on_but_not_with_line_ends(copied_package):
    keys = [key_of("holdout")]
    for path in (path for package in copied_package.values() for path in package.rglob("*.*")):
        if path.suffix in (".py", ".csv"):
            path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert key_of("holdout") == keys[0]
    assert cached_best_designs("holdout") is not None
    for name in SOURCES:
        path = copied_package["hydrogel_gym"] / name
        path.write_bytes(path.read_bytes() + b"\n")
        assert (key := key_of("holdout")) not in keys, path
        keys.append(key)


@pytest.mark.parametrize("cohort", SHIPPED_DESIGNS)
def test_shipped_designs_are_of_this_code_and_cohort_and_are_not_searched(
    cohort, searched, tmp_path
):
    remedy = "the problem has changed: run python patients/make_best_designs.py"
    assert (found := cached_best_designs(cohort)) is not None, remedy
    best = best_designs(cohort, cache_dir=tmp_path / "cache")
    assert (searched, list(tmp_path.iterdir())) == ([], [])
    assert best.patient_ids == found.patient_ids == load_cohort(cohort).patient_ids
    assert (best.seed_gap <= 0.02).float().mean() >= 0.99
    # Read and written again it is the same file: its digits are float32's, all of them.
    path, key = files("hydrogel_gym.patients") / SHIPPED_DESIGNS[cohort], key_of(cohort)
    content = designs_file(key, best.patient_ids, read_designs(path, key))
    assert content.decode() == path.read_text()


def test_shipped_designs_are_passed_over_where_anything_differs(copied_package):
    shipped = load_cohort("holdout")
    hooked, blinded = MechanisticModel(), MechanisticModel()
    hooked.register_forward_hook(lambda model, given, out: out._replace(delta_ef_pct=-out[0]))
    blinded.polymer_table[3] = blinded.polymer_table[4]
    fewer = Cohort(shipped.patient_ids[1:], shipped.features[1:], shipped.extra[1:], "fewer")
    names = (*shipped.patient_ids[:-1], "other")
    assert cached_best_designs(shipped, MechanisticModel()) is not None
    for change in (
        {"cohort": fewer},
        {"cohort": dataclasses.replace(shipped, features=shipped.features.flip(0))},
        {"cohort": dataclasses.replace(shipped, patient_ids=names)},
        {"reward_config": RewardConfig(toxicity_limit=0.16)},
        {"seed": 1},
        {"reward_model": MechanisticModel(params=MechanisticParams(reference_bz_pct=13.6))},
        {"reward_model": MechanisticModel(outcome_scale="literature")},
        {"reward_model": hooked},
        {"reward_model": blinded},
        {"reward_model": type("Other", (MechanisticModel,), {})()},
    ):
        assert cached_best_designs(**({"cohort": shipped} | change)) is None, change
    equations = copied_package["hydrogel_gym"] / "models" / "mechanistic.py"
    equations.write_text(equations.read_text().replace("13.5", "13.6"))
    assert cached_best_designs(shipped) is None


def test_designs_that_no_longer_earn_what_they_did_are_not_taken(monkeypatch):
    # Such as where somebody has replaced a method of the built-in model.
    forward = MechanisticModel.forward
    monkeypatch.setattr(
        MechanisticModel,
        "forward",
        lambda *given: (out := forward(*given))._replace(delta_ef_pct=out[0] - 0.01),
    )
    assert cached_best_designs("holdout") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: lines[:3],
        lambda lines: ["not a table"],
        lambda lines: [lines[0].replace("key ", "key 0"), *lines[1:]],
        lambda lines: [*lines[:2], *reversed(lines[2:])],
        lambda lines: [lines[0], *(line.replace(",", ";") for line in lines[1:])],
        lambda lines: [*lines, lines[-1]],
        lambda lines: ["\udcff", *lines],
    ],
    ids=["cut short", "text", "other key", "other order", "separator", "more rows", "no text"],
)
def test_damaged_cache_is_replaced(arguments, searched, damage):
    first = best_designs(**arguments)
    (path,) = arguments["cache_dir"].iterdir()
    whole = path.read_bytes()
    lines = damage(whole.decode().splitlines())
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
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
