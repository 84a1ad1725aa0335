from __future__ import annotations

import re
from importlib.resources import files

import pandas as pd
import pytest
import torch

from hydrogel_gym.problem.polymers import NUM_POLYMERS, WINDOWS, PolymerTable, load_polymers

INDICES = {  # of the conductive gel that is looked at
    "bioactivity": 0.38,
    "base_toxicity": 0.05,
    "filler_toxicity": 0.22,
    "filler_mid_dose_s_per_m": 0.35,
    "foreign_body_tendency": 0.4,
    "cohesion": 0.96,
}
TEXTS = ("names", "categories", "smiles", "sources", "confidences")


@pytest.fixture(scope="module")
def table() -> PolymerTable:
    return load_polymers()


@pytest.fixture
def frame() -> pd.DataFrame:
    """The packaged file as text, to be spoilt."""
    with (files("hydrogel_gym") / "polymers.csv").open() as file:
        return pd.read_csv(file, dtype=str, keep_default_na=False)


def test_packaged_table_has_texts_windows_and_indices_of_every_polymer(table):
    assert len(table) == NUM_POLYMERS
    assert all(len(getattr(table, name)) == NUM_POLYMERS for name in TEXTS)
    shapes = {name: (NUM_POLYMERS, 2) for name in WINDOWS} | dict.fromkeys(INDICES, (NUM_POLYMERS,))
    for name, shape in shapes.items():
        value = getattr(table, name)
        assert (value.shape, value.dtype) == (shape, torch.float64)
        assert (value.isfinite() & (value >= 0)).all()
        assert name not in WINDOWS or (value[:, 0] <= value[:, 1]).all()
    assert all(text.startswith("Windows: HYDRA-BERT") for text in table.sources)
    assert all("Indices: ranks; " in text for text in table.sources)
    assert all(text.startswith("windows D; indices D;") for text in table.confidences)


def test_rows_of_gels_with_and_without_a_filler_are_read_column_by_column(table):
    row = table.index("GelMA_rGO")
    assert row == 6
    assert table.categories[row] == "conductive_hydrogel"
    assert table.youngs_modulus_kpa[row].tolist() == [10.0, 80.0]
    assert table.half_life_days[row].tolist() == [30.0, 120.0]
    assert table.conductivity_s_per_m[row].tolist() == [0.05, 0.5]
    assert {name: getattr(table, name)[row].item() for name in INDICES} == INDICES
    with pytest.raises(ValueError, match=r"polymer is 'Jelly'; allowed: GelMA_3pct, GelMA_5pct"):
        table.index("Jelly")
    unfilled = table.filler_toxicity == 0
    assert unfilled.any()
    assert torch.equal(table.conductivity_s_per_m[:, 1] > 0, ~unfilled)
    assert (table.filler_mid_dose_s_per_m[unfilled] == 1.0).all()


def test_columns_are_found_by_name_whatever_their_order(table, frame, tmp_path):
    shuffled = frame[frame.columns[::-1]].assign(supplier="none")
    shuffled.to_csv(tmp_path / "mine.csv", index=False)
    other = load_polymers(tmp_path / "mine.csv")
    assert all(getattr(other, name) == getattr(table, name) for name in TEXTS)
    numbers = (*WINDOWS, *INDICES)
    assert all(torch.equal(getattr(other, name), getattr(table, name)) for name in numbers)


def test_table_that_lacks_something_is_refused(frame, tmp_path):
    path = tmp_path / "mine.csv"
    for text, message in (
        (frame.drop(columns="cohesion").to_csv(index=False), "columns ['cohesion'] are missing"),
        (frame[:-1].to_csv(index=False), f"{NUM_POLYMERS - 1} rows; expected {NUM_POLYMERS}"),
        ("", "columns ['polymer_id', "),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {message}')}"):
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
)
def test_bad_cell_is_reported_with_file_row_column_and_value(
    frame, tmp_path, row, column, value, allowed
):
    frame.loc[row, column] = value
    path = tmp_path / "mine.csv"
    frame.to_csv(path, index=False)
    message = f"{path}, row {row}, column {column}: value {value!r}; allowed: {allowed}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_polymers(path)
