"""The grid that designs lie on, the best of many, and the files they are read back from."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet as pq

from hydrogel_gym.designs import load_designs
from hydrogel_gym.designs.grid import NUM_CELLS, NUM_LEVELS, RESOLUTION, design_keys, on_grid
from hydrogel_gym.designs.schema import (
    FORMULATION_COLUMNS,
    NUMBERS,
    RANKED_SCHEMA,
    REWARD,
    SCHEMA,
    arrow_table,
    columns_of,
    parquet,
)
from hydrogel_gym.designs.store import partition
from hydrogel_gym.designs.top import TopDesigns
from hydrogel_gym.problem.fields import FORMULATION_HIGH, FORMULATION_LOW
from hydrogel_gym.problem.polymers import load_polymers


def many(count: int, seed: int, levels: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Designs on few levels, so that many are the same; the reward follows from the design."""
    rng = np.random.default_rng(seed)
    cell = rng.integers(0, NUM_CELLS, count).astype(np.uint8)
    share = torch.from_numpy(rng.integers(0, levels, (count, 4)) / (levels - 1)).float()
    numbers = np.zeros((len(NUMBERS), count), np.float32)
    numbers[:4] = on_grid(share).T.numpy()
    # Few different rewards, so that there are ties.
    numbers[REWARD] = design_keys(cell, numbers) % 97
    return cell, numbers


def best_of_all(cell, numbers, size, *, per_cell=False) -> list[tuple[int, float]]:
    """Keys and rewards of the best, worked out one by one."""
    columns = -numbers[REWARD], design_keys(cell, numbers), cell
    kept, count = [], Counter()
    for loss, key, group in sorted(set(zip(*(c.tolist() for c in columns), strict=True))):
        group = group if per_cell else 0
        if count[group] < size:
            kept.append((key, -loss))
        count[group] += 1
    return kept


def shown(best: TopDesigns) -> list[tuple[int, float]]:
    keys = design_keys(best.cell, best.numbers).tolist()
    return list(zip(keys, best.numbers[REWARD].tolist(), strict=True))


@pytest.mark.parametrize("per_cell", [False, True])
@given(seed=st.integers(0, 2**20), size=st.integers(1, 40), batch=st.integers(1, 700))
@settings(max_examples=20, deadline=None)
def test_the_best_are_exact_whatever_the_batches(per_cell, seed, size, batch):
    cell, numbers = many(1000, seed)
    best = TopDesigns(size, per_cell=per_cell)
    for start in range(0, 1000, batch):
        rows = np.arange(start, min(start + batch, 1000))
        rows = rows[best.promising(cell[rows], numbers[REWARD, rows])]
        best.add(cell[rows], numbers[:, rows])
    assert shown(best) == best_of_all(cell, numbers, size, per_cell=per_cell)


def test_a_floor_that_is_out_of_date_and_designs_seen_twice_lose_nothing():
    cell, numbers = many(1000, seed=1)
    best = TopDesigns(10)
    early = best.promising(cell, numbers[REWARD])
    best.add(cell[:900], numbers[:, :900])
    best.add(cell[early], numbers[:, early])
    assert shown(best) == best_of_all(cell, numbers, 10)
    cell, numbers = many(50, seed=0, levels=2)
    best = TopDesigns(1000)
    for _ in range(2):
        best.add(np.tile(cell, 2), np.tile(numbers, 2))
    assert len(best.cell) == len(set(design_keys(cell, numbers)))


@given(st.lists(st.floats(0.0, 1.0, width=32), min_size=4, max_size=4))
@settings(max_examples=50, deadline=None)
def test_grid_is_within_the_box_and_within_half_a_step(shares):
    share = torch.tensor(shares)
    found = on_grid(share).numpy()
    low, high = FORMULATION_LOW, FORMULATION_HIGH
    assert (found >= low).all()
    assert (found <= high).all()
    exact = low + share.numpy().astype(np.float64) * (high - low)
    assert (np.abs(found - exact) <= 0.5 * np.array(RESOLUTION) + 1e-5 * high).all()
    decimals = [round(float(value), d) for value, d in zip(found, (2, 1, 3, 2), strict=True)]
    assert (found == np.array(decimals, np.float32)).all()


def test_both_ends_of_every_range_are_on_the_grid_and_neighbours_have_keys_of_their_own():
    ends = on_grid(torch.tensor([[0.0] * 4, [1.0] * 4])).numpy()
    assert (ends == np.stack([FORMULATION_LOW, FORMULATION_HIGH])).all()
    steps = np.array(RESOLUTION) * (np.array(NUM_LEVELS) - 1)
    assert FORMULATION_LOW + steps == pytest.approx(FORMULATION_HIGH)
    keys = set()
    for column, levels in enumerate(NUM_LEVELS):
        share = torch.zeros(levels, 4)
        share[:, column] = torch.linspace(0.0, 1.0, levels, dtype=torch.float64).float()
        for cell in (0, NUM_CELLS - 1):
            cells = np.full(levels, cell, np.uint8)
            keys |= set(design_keys(cells, on_grid(share).T.numpy()).tolist())
    # The lower end of all four is one design.
    assert len(keys) == 2 * (sum(NUM_LEVELS) - 3)
    assert max(keys) < NUM_CELLS * np.prod([float(n) for n in NUM_LEVELS])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Designs of two patients, one of whom has a name that no folder may have."""
    folder = tmp_path_factory.mktemp("designs")
    for patient_id in ("P0001", "a/b c"):
        for table, parts in (("top", ["designs"]), ("candidates", ["part-00000", "part-00001"])):
            place = partition(folder / table, patient_id)
            place.mkdir(parents=True)
            for part in parts:
                data = parquet(arrow_table(patient_id, *many(20, seed=3)))
                (place / f"{part}.parquet").write_bytes(data)
    return folder


def test_designs_are_read_back_as_they_were(folder):
    cell, numbers = many(20, seed=3)
    table = load_designs(folder, "a/b c")
    assert set(table["patient_id"]) == {"a/b c"}
    assert (table[list(NUMBERS)].to_numpy().T == numbers).all()
    assert (table["polymer_id"].to_numpy() * 4 + table["coverage"].cat.codes == cell).all()
    polymers = load_polymers().names
    assert table["polymer_name"].tolist() == [polymers[i] for i in table["polymer_id"]]
    assert len(load_designs(folder, ["P0001", "a/b c"], table="candidates")) == 80
    assert load_designs(folder)["patient_id"].unique().tolist() == ["P0001", "a/b c"]
    for arguments, message in (
        (dict(patient_id="P0002"), "no patient 'P0002'; nearest: P0001"),
        (dict(table="best"), "table is 'best'; allowed: "),
        (dict(table="diverse"), "contains no table 'diverse'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_designs(folder, **arguments)


def test_files_carry_the_version_of_their_schema_and_the_columns_of_the_source(folder):
    (file,) = partition(folder / "top", "P0001").iterdir()
    schema = pq.ParquetFile(file).schema_arrow
    assert schema.metadata[b"hydrogel_gym"] == SCHEMA.encode()
    source = (
        "patient_id polymer_id polymer_name stiffness_kPa degradation_days conductivity_S_m "
        "thickness_mm coverage predicted_delta_EF predicted_stress_reduction "
        "optimal_probability reward"
    ).split()
    assert schema.names[: len(source)] == source
    own, ranked = columns_of(SCHEMA), columns_of(RANKED_SCHEMA)
    assert schema.names == list(own) == [name for name in ranked if name in own]
    assert NUMBERS[: len(FORMULATION_COLUMNS)] == FORMULATION_COLUMNS
    assert ranked["stiffness_kPa"].description == "stiffness requested, kPa"
