from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydrogel_gym.problem.cohort import (
    BZ_STRESS_TOLERANCE_FRAC,
    FEATURE_COLUMNS,
    ID_COLUMN,
    LVEF_TOLERANCE_PP,
    MAX_SCAR_PLUS_BZ_PCT,
    Cohort,
    CohortError,
    load_cohort,
)
from hydrogel_gym.problem.fields import PATIENT_FIELDS

NUM_ROWS = 5
BAD_ROW = 2  # counted from zero; the message counts from one


@pytest.fixture(scope="module")
def shipped() -> Cohort:
    return load_cohort()


@pytest.fixture
def table(shipped: Cohort) -> pd.DataFrame:
    """First rows of the shipped cohort."""
    table = pd.DataFrame(shipped.features[:NUM_ROWS].numpy(), columns=FEATURE_COLUMNS)
    table.insert(0, ID_COLUMN, shipped.patient_ids[:NUM_ROWS])
    return table


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mine.csv"


def with_cell(table: pd.DataFrame, column: str, cell: object, row: int = BAD_ROW) -> pd.DataFrame:
    changed = table.astype(object)
    changed.loc[row, column] = cell
    return changed


def error_of(path: Path, table: pd.DataFrame | None = None) -> str:
    if table is not None:
        table.to_csv(path, index=False)
    with pytest.raises(CohortError) as caught:
        load_cohort(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("spec", "size", "first", "last", "name"),
    [
        (None, 2000, "P0000", "P1999", "shipped train"),
        ("train", 2000, "P0000", "P1999", "shipped train"),
        ("holdout", 500, "H0000", "H0499", "shipped holdout"),
    ],
)
def test_shipped_cohort_has_its_size_ids_and_name(
    spec: str | None, size: int, first: str, last: str, name: str
) -> None:
    cohort = load_cohort(spec)
    assert len(cohort) == len(set(cohort.patient_ids)) == size
    assert (cohort.patient_ids[0], cohort.patient_ids[-1], cohort.name) == (first, last, name)
    assert cohort.features.shape == (size, len(PATIENT_FIELDS))
    assert cohort.features.dtype == torch.float64
    assert cohort.features.device.type == "cpu"


def test_number_is_read_exactly_as_float_reads_it(table: pd.DataFrame, path: Path) -> None:
    text = "-11.123456789012345678"
    with_cell(table, "gls_pct", text).to_csv(path, index=False)
    read = load_cohort(str(path)).features[BAD_ROW, FEATURE_COLUMNS.index("gls_pct")].item()
    assert read == float(text)


def test_table_with_bom_and_crlf_is_read(shipped: Cohort, table: pd.DataFrame, path: Path) -> None:
    path.write_bytes(table.to_csv(index=False, lineterminator="\r\n").encode("utf-8-sig"))
    assert torch.equal(load_cohort(path).features, shipped.features[:NUM_ROWS])


def test_parquet_gives_the_cohort_that_csv_gives(table: pd.DataFrame, tmp_path: Path) -> None:
    table.to_csv(tmp_path / "mine.csv", index=False)
    table.to_parquet(tmp_path / "mine.parquet")
    from_csv, from_parquet = (load_cohort(tmp_path / f"mine.{s}") for s in ("csv", "parquet"))
    assert from_parquet.patient_ids == from_csv.patient_ids
    assert torch.equal(from_parquet.features, from_csv.features)
    assert from_parquet.name == str(tmp_path / "mine.parquet")


def test_parquet_may_hold_ids_as_index_and_a_subset_of_rows(
    table: pd.DataFrame, tmp_path: Path
) -> None:
    for name, frame in {"index": table.set_index(ID_COLUMN), "plain": table}.items():
        folder = tmp_path / f"{name}=1"
        folder.mkdir()
        frame[BAD_ROW:].to_parquet(folder / "mine.parquet")
        cohort = load_cohort(folder / "mine.parquet")
        assert cohort.patient_ids == tuple(table[ID_COLUMN][BAD_ROW:])
        assert cohort.extra.columns.empty


def test_parquet_null_is_rejected_with_row_and_column(table: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "mine.parquet"
    with_cell(table, "edv_ml", None).astype({"edv_ml": "Float64"}).to_parquet(path)
    message = error_of(path)
    for part in (str(path), "row 3", "P0002", "edv_ml", "from 90 to 400"):
        assert part in message


def test_extra_columns_are_kept_aside_untouched(table: pd.DataFrame, path: Path) -> None:
    table.insert(3, "site", ["007", "", "NA", "b", "c"])
    table["edv_index"] = "1.50"
    table.to_csv(path, index=False)
    extra = load_cohort(path).extra
    assert extra.to_dict("list") == {
        "site": ["007", "", "NA", "b", "c"],
        "edv_index": ["1.50"] * NUM_ROWS,
    }


# The table is never written to, so that one fixture serves every example.
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    columns=st.permutations([ID_COLUMN, *FEATURE_COLUMNS]),
    rows=st.permutations(range(NUM_ROWS)),
)
def test_permuted_table_gives_the_permuted_cohort(
    shipped: Cohort, table: pd.DataFrame, path: Path, columns: list[str], rows: list[int]
) -> None:
    table.loc[rows, columns].to_csv(path, index=False)
    cohort = load_cohort(path)
    assert cohort.patient_ids == tuple(table[ID_COLUMN][rows])
    assert torch.equal(cohort.features, shipped.features[rows])


@pytest.mark.parametrize("cell", ["abc", "36,7", "", " ", "nan", "NA", "inf", "-inf", "1e999"])
def test_cell_that_is_no_finite_number_is_rejected(
    table: pd.DataFrame, path: Path, cell: str
) -> None:
    message = error_of(path, with_cell(table, "lvef_pct", cell))
    for part in (str(path), "row 3", "P0002", "lvef_pct", repr(cell), "from 15 to 55"):
        assert part in message


@pytest.mark.parametrize("field", PATIENT_FIELDS, ids=lambda field: field.name)
@pytest.mark.parametrize("end", ["below", "above"])
def test_value_out_of_range_is_rejected(
    table: pd.DataFrame, path: Path, field: tuple, end: str
) -> None:
    cell = str(field.low - 0.01 if end == "below" else field.high + 0.01)
    message = error_of(path, with_cell(table, field.name, cell))
    parts = (str(path), "row 3", "P0002", field.name, cell, f"{field.low:g} to {field.high:g}")
    for part in parts:
        assert part in message


def broken_identity(table: pd.DataFrame, column: str, share: float) -> pd.DataFrame:
    """Table whose bad row is off by `share` of the tolerance."""
    row = table.loc[BAD_ROW]
    if column == "lvef_pct":
        lvef = 100.0 * (row["edv_ml"] - row["esv_ml"]) / row["edv_ml"]
        return with_cell(table, column, lvef + share * LVEF_TOLERANCE_PP)
    stress = row["stress_concentration"] * row["healthy_stress_kpa"]
    return with_cell(table, column, stress / (1.0 - share * BZ_STRESS_TOLERANCE_FRAC))


IDENTITIES = {
    "lvef_pct": "100 (edv_ml - esv_ml) / edv_ml",
    "bz_stress_kpa": "stress_concentration * healthy_stress_kpa",
}


@pytest.mark.parametrize("column", IDENTITIES)
@pytest.mark.parametrize("share", [-1.05, 1.05])
def test_identity_off_by_more_than_its_tolerance_is_rejected(
    table: pd.DataFrame, path: Path, column: str, share: float
) -> None:
    bad = broken_identity(table, column, share)
    message = error_of(path, bad)
    value = str(bad.loc[BAD_ROW, column])
    for part in (str(path), "row 3", "P0002", column, value, IDENTITIES[column]):
        assert part in message


@pytest.mark.parametrize("column", IDENTITIES)
@pytest.mark.parametrize("share", [-0.95, 0.95])
def test_identity_off_by_rounding_is_accepted(
    table: pd.DataFrame, path: Path, column: str, share: float
) -> None:
    rounded = broken_identity(table, column, share)
    rounded.to_csv(path, index=False)
    read = load_cohort(path).features[BAD_ROW, FEATURE_COLUMNS.index(column)].item()
    assert read == rounded.loc[BAD_ROW, column]


def test_scar_and_border_zone_beyond_their_common_limit_are_rejected(
    table: pd.DataFrame, path: Path
) -> None:
    bad = with_cell(with_cell(table, "scar_fraction_pct", 44.0), "bz_fraction_pct", 22.5)
    message = error_of(path, bad)
    columns = "scar_fraction_pct + bz_fraction_pct"
    for part in (str(path), "row 3", "P0002", columns, "66.5", f"to {MAX_SCAR_PLUS_BZ_PCT:g}"):
        assert part in message


@pytest.mark.parametrize(
    ("cell", "allowed"),
    [("P0000", "each name once"), ("", "not blank"), ("  ", "not blank")],
    ids=["twice", "empty", "spaces"],
)
def test_id_that_names_no_single_patient_is_rejected(
    table: pd.DataFrame, path: Path, cell: str, allowed: str
) -> None:
    message = error_of(path, with_cell(table, ID_COLUMN, cell))
    for part in (str(path), "row 3", ID_COLUMN, repr(cell), allowed):
        assert part in message


def test_error_counts_the_other_rows_with_the_fault(table: pd.DataFrame, path: Path) -> None:
    one = error_of(path, with_cell(table, "edv_ml", "big", row=3))
    two = error_of(path, with_cell(with_cell(table, "edv_ml", "big", row=3), "edv_ml", 1.0))
    assert "row 4" in one
    assert "other rows" not in one
    assert "row 3" in two
    assert two.endswith("other rows with this fault: 1")


def test_missing_columns_are_all_named(table: pd.DataFrame, path: Path) -> None:
    message = error_of(path, table.drop(columns=["edv_ml", ID_COLUMN]))
    assert f"{path}: missing columns: patient_id, edv_ml; columns found: lvef_pct" in message


def test_repeated_column_is_named(table: pd.DataFrame, path: Path) -> None:
    message = error_of(path, pd.concat([table, table["edv_ml"]], axis=1))
    assert message == f"{path}: columns that occur twice: edv_ml"


def test_header_alone_is_rejected(table: pd.DataFrame, path: Path) -> None:
    assert error_of(path, table[:0]) == f"{path}: no patient, only a header"


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".csv", b""),
        (".csv", b"patient_id,edv_ml\nP0,1,2,3\n"),
        (".csv", b"\xff\xfe\x00\x01"),
        (".parquet", b"patient_id\n"),
        (".csv", None),
        (".parquet", None),
    ],
    ids=["empty", "ragged", "binary", "not-parquet", "no-csv", "no-parquet"],
)
def test_unreadable_file_is_rejected_by_name(
    tmp_path: Path, suffix: str, content: bytes | None
) -> None:
    path = tmp_path / f"mine{suffix}"
    if content is not None:
        path.write_bytes(content)
    assert error_of(path).startswith(f"{path}: cannot be read: ")


@pytest.mark.parametrize("name", ["mine.xlsx", "trian"])
def test_unknown_suffix_is_rejected_with_what_is_allowed(tmp_path: Path, name: str) -> None:
    message = error_of(tmp_path / name)
    assert message.startswith(f"{tmp_path / name}: suffix")
    assert message.endswith("allowed: .csv, .parquet, or a shipped cohort: train, holdout")


def test_index_finds_a_patient_and_names_the_nearest_of_an_unknown() -> None:
    cohort = load_cohort("holdout")
    assert cohort.index("H0007") == 7
    with pytest.raises(
        ValueError, match=r"^shipped holdout has no patient 'P0007'; nearest: H0007"
    ):
        cohort.index("P0007")


def test_cohort_survives_pickling() -> None:
    cohort = load_cohort("holdout")
    copy: Cohort = pickle.loads(pickle.dumps(cohort))
    assert copy.index("H0003") == 3
    assert torch.equal(copy.features, cohort.features)


def test_large_table_is_read_without_a_python_loop_over_its_cells(
    table: pd.DataFrame, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydrogel_gym.problem.cohort._number", pytest.fail)
    many = pd.concat([table] * 400, ignore_index=True)
    many[ID_COLUMN] = np.arange(len(many))
    many.to_csv(path, index=False)
    assert len(load_cohort(path)) == 400 * NUM_ROWS
