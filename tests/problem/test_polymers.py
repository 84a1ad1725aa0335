from __future__ import annotations

import dataclasses
from importlib.resources import files
from pathlib import Path

import pandas as pd
import pytest
import torch

from hydrogel_gym.problem.polymers import NUM_POLYMERS, PolymerTable, load_polymers

WINDOWS = ("youngs_modulus_kpa", "half_life_days", "conductivity_s_per_m")
INDICES = (
    "bioactivity",
    "base_toxicity",
    "filler_toxicity",
    "filler_mid_dose_s_per_m",
    "foreign_body_tendency",
    "cohesion",
)
TEXTS = ("names", "categories", "smiles", "sources", "confidences")


@pytest.fixture(scope="module")
def table() -> PolymerTable:
    return load_polymers()


@pytest.fixture
def frame() -> pd.DataFrame:
    """The packaged file as text, to be spoilt."""
    with (files("hydrogel_gym") / "polymers.csv").open() as file:
        return pd.read_csv(file, dtype=str, keep_default_na=False)


def written(frame: pd.DataFrame, folder: Path) -> Path:
    path = folder / "mine.csv"
    frame.to_csv(path, index=False)
    return path


def test_packaged_table_has_one_row_per_polymer_of_the_action_space(table):
    assert len(table) == NUM_POLYMERS
    assert all(len(getattr(table, name)) == NUM_POLYMERS for name in TEXTS)


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_are_float64_pairs_in_ascending_order(table, name):
    window = getattr(table, name)
    assert window.shape == (NUM_POLYMERS, 2)
    assert window.dtype == torch.float64
    assert (window[:, 0] <= window[:, 1]).all()


@pytest.mark.parametrize("name", INDICES)
def test_indices_are_one_finite_float64_per_polymer(table, name):
    index = getattr(table, name)
    assert index.shape == (NUM_POLYMERS,)
    assert index.dtype == torch.float64
    assert index.isfinite().all()
    assert (index >= 0).all()


def test_conductive_gel_row_is_read_column_by_column(table):
    row = table.index("GelMA_rGO")
    assert row == 6
    assert table.categories[row] == "conductive_hydrogel"
    assert table.youngs_modulus_kpa[row].tolist() == [10.0, 80.0]
    assert table.half_life_days[row].tolist() == [30.0, 120.0]
    assert table.conductivity_s_per_m[row].tolist() == [0.05, 0.5]
    values = [getattr(table, name)[row].item() for name in INDICES]
    assert values == [0.38, 0.05, 0.22, 0.35, 0.4, 0.96]


def test_blank_mid_dose_of_unfilled_polymers_becomes_one(table):
    unfilled = table.filler_toxicity == 0
    assert unfilled.sum() == 19
    assert (table.filler_mid_dose_s_per_m[unfilled] == 1.0).all()


def test_only_polymers_with_a_filler_conduct(table):
    assert torch.equal(table.conductivity_s_per_m[:, 1] > 0, table.filler_toxicity > 0)


def test_every_polymer_says_where_windows_and_indices_come_from(table):
    assert all(text.startswith("Windows: HYDRA-BERT") for text in table.sources)
    assert all("Indices: ranks; " in text for text in table.sources)
    assert all(text.startswith("windows D; indices D;") for text in table.confidences)


def test_table_cannot_be_reassigned(table):
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.names = ()


def test_unknown_name_is_refused_with_the_known_ones(table):
    with pytest.raises(ValueError, match=r"polymer is 'Jelly'; allowed: GelMA_3pct, GelMA_5pct"):
        table.index("Jelly")


def test_columns_are_found_by_name_whatever_their_order(table, frame, tmp_path):
    shuffled = frame[frame.columns[::-1]].assign(supplier="none")
    other = load_polymers(written(shuffled, tmp_path))
    assert all(getattr(other, name) == getattr(table, name) for name in TEXTS)
    assert all(
        torch.equal(getattr(other, name), getattr(table, name)) for name in (*WINDOWS, *INDICES)
    )


def test_missing_column_is_named_with_the_file(frame, tmp_path):
    path = written(frame.drop(columns="cohesion"), tmp_path)
    with pytest.raises(ValueError, match=r"mine\.csv: columns \['cohesion'\] are missing"):
        load_polymers(path)


def test_missing_row_is_reported_with_the_count_expected(frame, tmp_path):
    path = written(frame[:-1], tmp_path)
    with pytest.raises(ValueError, match=r"mine\.csv: 23 rows; expected 24"):
        load_polymers(path)


def test_file_without_a_header_is_refused(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("")
    with pytest.raises(ValueError, match=r"columns \['polymer_id', .* are missing"):
        load_polymers(path)


@pytest.mark.parametrize(
    ("row", "column", "value", "allowed"),
    [
        (3, "polymer_id", "4", "the row number, 3"),
        (5, "name", "GelMA_3pct", "a name that no other row has"),
        (7, "source", "", "a text that is not empty"),
        (2, "cohesion", "nan", "a finite number, at least 0"),
        (2, "bioactivity", "high", "a finite number, at least 0"),
        (9, "base_toxicity", "-0.1", "a finite number, at least 0"),
        (4, "youngs_modulus_max_kpa", "2", "at least youngs_modulus_min_kpa, 3"),
        (4, "half_life_min_days", "0", "a number above 0"),
        (6, "filler_mid_dose_s_per_m", "", "a finite number, at least 0"),
        (6, "filler_mid_dose_s_per_m", "0", "a number above 0"),
    ],
    ids=lambda value: str(value).replace(" ", "_") or "blank",
)
def test_bad_cell_is_reported_with_file_row_column_and_value(
    frame, tmp_path, row, column, value, allowed
):
    frame.loc[row, column] = value
    path = written(frame, tmp_path)
    message = f"mine.csv, row {row}, column {column}: value {value!r}; allowed: {allowed}"
    with pytest.raises(ValueError, match="mine") as error:
        load_polymers(path)
    assert str(error.value).endswith(message)
