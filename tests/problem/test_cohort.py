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
IDENTITIES = {
    "lvef_pct": "from 100 (edv_ml - esv_ml) / edv_ml",
    "bz_stress_kpa": "from stress_concentration * healthy_stress_kpa",
}


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


def test_number_is_read_exactly_as_float_reads_it(table, path):
    text = "-11.123456789012345678"
    with_cell(table, "gls_pct", text).to_csv(path, index=False)
    read = load_cohort(str(path)).features[BAD_ROW, FEATURE_COLUMNS.index("gls_pct")].item()
    assert read == float(text)


def test_table_with_bom_and_crlf_is_read(shipped, table, path):
    path.write_bytes(table.to_csv(index=False, lineterminator="\r\n").encode("utf-8-sig"))
    assert torch.equal(load_cohort(path).features, shipped.features[:NUM_ROWS])


def test_parquet_may_hold_ids_as_index_and_a_subset_of_rows(shipped, table, tmp_path):
    for name, frame in {"index": table.set_index(ID_COLUMN), "plain": table}.items():
        folder = tmp_path / f"{name}=1"
        folder.mkdir()
        frame[BAD_ROW:].to_parquet(folder / "mine.parquet")
        cohort = load_cohort(folder / "mine.parquet")
        assert cohort.name == str(folder / "mine.parquet")
        assert cohort.patient_ids == shipped.patient_ids[BAD_ROW:NUM_ROWS]
        assert torch.equal(cohort.features, shipped.features[BAD_ROW:NUM_ROWS])
        assert cohort.extra.columns.empty


def test_extra_columns_are_kept_aside_untouched(table, path):
    extra = {"site": ["007", "", "NA", "b", "c"], "edv_index": ["1.50"] * NUM_ROWS}
    table.insert(3, "site", extra["site"])
    table.assign(edv_index="1.50").to_csv(path, index=False)
    assert load_cohort(path).extra.to_dict("list") == extra


def test_permuted_table_gives_the_permuted_cohort(shipped, table, path):
    rows = [3, 0, 4, 2, 1]
    table.loc[rows, table.columns[::-1]].to_csv(path, index=False)
    cohort = load_cohort(path)
    assert cohort.patient_ids == tuple(table[ID_COLUMN][rows])
    assert torch.equal(cohort.features, shipped.features[rows])


NO_NUMBERS = ("abc", "36,7", "", " ", "nan", "NA", "inf", "-inf", "1e999")


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
        (ID_COLUMN, "", "a name that is not blank"),
        (ID_COLUMN, "  ", "a name that is not blank"),
    ],
)
def test_bad_cell_is_rejected_with_file_row_patient_and_what_is_allowed(
    table, path, column, cell, allowed
):
    patient = cell if column == ID_COLUMN else "P0002"
    expected = f"{path}, row 3 (patient {patient!r}), {column}: {cell!r}; allowed: {allowed}"
    assert error_of(path, with_cell(table, column, cell)) == expected


def test_parquet_null_is_rejected_as_a_bad_cell_is(table, tmp_path):
    path = tmp_path / "mine.parquet"
    with_cell(table, "edv_ml", None).astype({"edv_ml": "Float64"}).to_parquet(path)
    start = f"{path}, row 3 (patient 'P0002'), edv_ml: "
    assert error_of(path).startswith(start)
    assert error_of(path).endswith("; allowed: a number from 90 to 400")


@pytest.mark.parametrize("column", IDENTITIES)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_identity_may_be_off_by_its_tolerance_and_no_more(table, path, column, sign):
    row = table.loc[BAD_ROW]

    def off_by(share: float) -> pd.DataFrame:
        if column == "lvef_pct":
            lvef = 100.0 * (row["edv_ml"] - row["esv_ml"]) / row["edv_ml"]
            return with_cell(table, column, lvef + sign * share * LVEF_TOLERANCE_PP)
        stress = row["stress_concentration"] * row["healthy_stress_kpa"]
        return with_cell(table, column, stress / (1.0 - sign * share * BZ_STRESS_TOLERANCE_FRAC))

    rounded, wrong = off_by(0.95), off_by(1.05)
    rounded.to_csv(path, index=False)
    read = load_cohort(path).features[BAD_ROW, FEATURE_COLUMNS.index(column)].item()
    assert read == rounded.loc[BAD_ROW, column]
    message = error_of(path, wrong)
    assert f"row 3 (patient 'P0002'), {column}: '{wrong.loc[BAD_ROW, column]}'" in message
    assert message.endswith(IDENTITIES[column])


def test_scar_and_border_zone_beyond_their_common_limit_are_rejected(table, path):
    bad = with_cell(with_cell(table, "scar_fraction_pct", 44.0), "bz_fraction_pct", 22.5)
    message = error_of(path, bad)
    assert "row 3 (patient 'P0002'), scar_fraction_pct + bz_fraction_pct: '66.5'" in message
    assert message.endswith("a number from 0 to 65")


def test_error_names_the_first_row_with_the_fault_and_counts_the_others(table, path):
    one = with_cell(table, "edv_ml", "big", row=3)
    assert "row 4" in error_of(path, one)
    assert "other rows" not in error_of(path, one)
    two = error_of(path, with_cell(one, "edv_ml", 1.0))
    assert "row 3" in two
    assert two.endswith("other rows with this fault: 1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.drop(columns=["edv_ml", ID_COLUMN]),
            "missing columns: patient_id, edv_ml; columns found: lvef_pct, ",
        ),
        (lambda t: pd.concat([t, t["edv_ml"]], axis=1), "columns that occur twice: edv_ml"),
        (lambda t: t[:0], "no rows, only a header"),
    ],
    ids=["missing", "twice", "header alone"],
)
def test_table_without_the_columns_or_rows_wanted_is_rejected(table, path, change, message):
    assert error_of(path, change(table)).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"", "cannot be read: "),
        ("ragged.csv", b"patient_id,edv_ml\nP0,1,2,3\n", "row 1: '2' is in column 3"),
        ("binary.csv", b"\xff\xfe\x00\x01", "cannot be read: "),
        ("text.parquet", b"patient_id\n", "cannot be read: "),
        ("no_file.csv", None, "cannot be read: "),
        ("no_file.parquet", None, "cannot be read: "),
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
