from __future__ import annotations

import pickle
from pathlib import Path

import pandas as pd
import pytest
import torch

from hydrogel_gym.problem.cohort import (
    BZ_STRESS_TOLERANCE_FRAC,
    FEATURE_COLUMNS,
    ID_COLUMN,
    LVEF_TOLERANCE_PP,
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


@pytest.mark.parametrize(("spec", "size"), [(None, 2000), ("train", 2000), ("holdout", 500)])
def test_shipped_cohort_has_its_size_ids_and_name(spec, size):
    cohort, letter = load_cohort(spec), "H" if spec == "holdout" else "P"
    assert len(cohort) == len(set(cohort.patient_ids)) == size
    assert cohort.patient_ids[:: size - 1] == (f"{letter}0000", f"{letter}{size - 1:04}")
    assert cohort.name == f"shipped {spec or 'train'}"
    assert cohort.features.shape == (size, len(PATIENT_FIELDS))
    assert (cohort.features.dtype, cohort.features.device.type) == (torch.float64, "cpu")


def test_rows_columns_and_numbers_are_read_as_written_whatever_their_order(shipped, table, path):
    rows, column = [3, 0, 4, 2, 1], FEATURE_COLUMNS.index("gls_pct")
    extra = {"site": ["007", "", "NA", "b", "c"], "edv_index": ["1.50"] * NUM_ROWS}
    text = "-11.123456789012345678"
    shuffled = with_cell(table, "gls_pct", text, row=0).loc[rows, table.columns[::-1]]
    shuffled.insert(3, "site", extra["site"])
    shuffled = shuffled.assign(edv_index="1.50")
    path.write_bytes(shuffled.to_csv(index=False, lineterminator="\r\n").encode("utf-8-sig"))
    cohort = load_cohort(str(path))
    assert cohort.name == str(path)
    assert cohort.patient_ids == tuple(table[ID_COLUMN][rows])
    expected = shipped.features[rows]
    expected[1, column] = float(text)
    assert torch.equal(cohort.features, expected)
    assert cohort.extra.to_dict("list") == extra
    table[BAD_ROW:].set_index(ID_COLUMN).to_parquet(path.with_suffix(".parquet"))
    subset = load_cohort(path.with_suffix(".parquet"))
    assert subset.patient_ids == shipped.patient_ids[BAD_ROW:NUM_ROWS]
    assert torch.equal(subset.features, shipped.features[BAD_ROW:NUM_ROWS])
    assert subset.extra.columns.empty


NO_NUMBERS = ("abc", "36,7", " ", "nan", "-inf", "1e999")


@pytest.mark.parametrize(
    ("column", "cell", "allowed"),
    [
        *(("lvef_pct", cell, "a number from 15 to 55") for cell in NO_NUMBERS),
        *(
            (field.name, str(value), f"a number from {field.low:g} to {field.high:g}")
            for field in PATIENT_FIELDS
            for value in (field.low - 0.01, field.high + 0.01)
        ),
        (ID_COLUMN, "P0000", "each name once"),
        (ID_COLUMN, "  ", "a name that is not blank"),
    ],
)
def test_bad_cell_is_rejected_with_file_row_patient_and_what_is_allowed(
    table, path, column, cell, allowed
):
    patient = cell if column == ID_COLUMN else "P0002"
    expected = f"{path}, row 3 (patient {patient!r}), {column}: {cell!r}; allowed: {allowed}"
    bad = with_cell(table, column, cell)
    assert error_of(path, bad) == expected
    if column == "lvef_pct":
        assert error_of(path, with_cell(bad, column, cell, row=4)).startswith(expected)
        assert error_of(path).endswith("; other rows with this fault: 1")


def test_null_of_parquet_and_scar_beyond_its_common_limit_are_rejected(table, path):
    message = error_of(path, table.assign(scar_fraction_pct=44.0, bz_fraction_pct=22.5))
    assert "row 1 (patient 'P0000'), scar_fraction_pct + bz_fraction_pct: '66.5'" in message
    path = path.with_suffix(".parquet")
    with_cell(table, "edv_ml", None).astype({"edv_ml": "Float64"}).to_parquet(path)
    assert error_of(path).startswith(f"{path}, row 3 (patient 'P0002'), edv_ml: ")
    assert error_of(path).endswith("; allowed: a number from 90 to 400")


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_identity_may_be_off_by_its_tolerance_and_no_more(table, path, sign):
    row = table.loc[BAD_ROW]
    lvef = 100.0 * (row["edv_ml"] - row["esv_ml"]) / row["edv_ml"]
    stress = row["stress_concentration"] * row["healthy_stress_kpa"]
    lvef_off, stress_off = sign * LVEF_TOLERANCE_PP, sign * BZ_STRESS_TOLERANCE_FRAC
    for column, (rounded, wrong), identity in (
        (
            "lvef_pct",
            [lvef + share * lvef_off for share in (0.95, 1.05)],
            "from 100 (edv_ml - esv_ml) / edv_ml",
        ),
        (
            "bz_stress_kpa",
            [stress / (1.0 - share * stress_off) for share in (0.95, 1.05)],
            "from stress_concentration * healthy_stress_kpa",
        ),
    ):
        with_cell(table, column, rounded).to_csv(path, index=False)
        read = load_cohort(path).features[BAD_ROW, FEATURE_COLUMNS.index(column)].item()
        assert read == rounded
        message = error_of(path, with_cell(table, column, wrong))
        assert f"row 3 (patient 'P0002'), {column}: '{wrong}'" in message
        assert message.endswith(identity)


def test_table_without_the_columns_or_rows_wanted_is_rejected(table, path):
    missing = "missing columns: patient_id, edv_ml; columns found: lvef_pct, "
    short = table.drop(columns=["edv_ml", ID_COLUMN])
    assert error_of(path, short).startswith(f"{path}: {missing}")
    assert error_of(path, table[:0]).startswith(f"{path}: no rows, only a header")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"", "cannot be read: "),
        ("binary.csv", b"\xff\xfe\x00\x01", "cannot be read: "),
        ("text.parquet", b"patient_id\n", "cannot be read: "),
        ("no_file.csv", None, "cannot be read: "),
        ("mine.xlsx", None, "suffix '.xlsx'; allowed: .csv, .parquet, or a shipped cohort: train"),
        ("trian", None, "suffix ''; allowed: .csv, .parquet, or a shipped cohort: train, holdout"),
    ],
)
def test_unreadable_file_is_rejected_by_name(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert error_of(path).startswith(f"{path}: {message}")


def test_index_finds_a_patient_also_of_a_pickled_cohort_and_names_the_nearest_of_an_unknown():
    cohort = load_cohort("holdout")
    for same in (cohort, pickle.loads(pickle.dumps(cohort))):
        assert same.index("H0007") == 7
        assert torch.equal(same.features, cohort.features)
        with pytest.raises(
            ValueError, match=r"^shipped holdout has no patient 'P0007'; nearest: H0007"
        ):
            same.index("P0007")
