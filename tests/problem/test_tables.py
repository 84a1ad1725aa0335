"""Tables as people bring them: what is read as what, and what is refused."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hydrogel_gym import CohortError, load_cohort
from hydrogel_gym.errors import UsageError
from hydrogel_gym.models.outcome_table import read_table

SHIPPED = pd.read_csv(files("hydrogel_gym.patients") / "cohort.csv", dtype=str).head(8)
OUTCOMES = ["delta_ef_pct", "stress_reduction_pct", "is_optimal"]
OUTCOMES += ["toxicity_risk", "structural_integrity", "fibrosis_risk"]


@pytest.fixture(scope="module")
def outcomes() -> pd.DataFrame:
    """Forty rows on eight patients, in their units."""
    rng, rows = np.random.default_rng(0), 40
    table = pd.concat([SHIPPED] * 5, ignore_index=True)
    for column in table.columns.drop("patient_id"):
        table[column] = table[column].astype(float)
    table["polymer_name"] = "GelMA_10pct"
    table["coverage"] = "scar_bz50"
    bounds = {"youngs_modulus_kpa": (10, 30), "half_life_days": (20, 90)}
    bounds |= {"conductivity_s_per_m": (0.2, 0.9), "thickness_mm": (1, 5)}
    for name, (low, high) in bounds.items():
        table[name] = rng.uniform(low, high, rows)
    table["delta_ef_pct"] = rng.uniform(0, 9, rows)
    table["stress_reduction_pct"] = rng.uniform(5, 35, rows)
    reaches = (table["delta_ef_pct"] >= 3) & (table["stress_reduction_pct"] >= 15)
    table["is_optimal"] = reaches.astype(int)
    for name in OUTCOMES[3:]:
        table[name] = rng.uniform(0.05, 0.3, rows)
    return table


def written(frame: pd.DataFrame, path: Path) -> Path:
    if path.suffix.lower() == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False)
    return path


def cohort_ids(path: Path) -> tuple[str, ...]:
    return load_cohort(path).patient_ids


@pytest.mark.parametrize("name", ["table.csv", "TABLE.CSV", "table.parquet", "table.Parquet"])
def test_identifiers_are_text_in_cohorts_and_outcome_tables(name, tmp_path, outcomes):
    ids = ["7", "007", "NA", "12", "0012", "nan", "None", "1e3"]
    path = written(SHIPPED.assign(patient_id=ids), tmp_path / name)
    assert cohort_ids(path) == tuple(ids)
    path = written(outcomes.assign(patient_id=ids * 5), tmp_path / name)
    assert len(np.unique(read_table(path).group)) == 8


def test_parquet_with_the_identifier_as_its_index_is_read(tmp_path, outcomes):
    SHIPPED.set_index("patient_id").to_parquet(tmp_path / "cohort.parquet")
    assert cohort_ids(tmp_path / "cohort.parquet") == tuple(SHIPPED["patient_id"])
    outcomes.set_index("patient_id").to_parquet(tmp_path / "outcomes.parquet")
    assert len(read_table(tmp_path / "outcomes.parquet").group) == 40


def test_names_that_look_the_same_are_the_same(tmp_path):
    ids = SHIPPED["patient_id"].to_list()
    path = written(SHIPPED.assign(patient_id=[ids[0] + " ", *ids[1:]]), tmp_path / "c.csv")
    assert cohort_ids(path) == tuple(ids)
    for first, second in (("P0000", "P0000 "), ("M\u00fcller", "Mu\u0308ller")):
        path = written(SHIPPED.assign(patient_id=[first, second, *ids[2:]]), tmp_path / "c.csv")
        with pytest.raises(CohortError, match="each name once"):
            load_cohort(path)


@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
def test_a_column_that_occurs_twice_is_refused(name, tmp_path, outcomes):
    for read, frame, column in (
        (load_cohort, SHIPPED, "lvef_pct"),
        (read_table, outcomes, "toxicity_risk"),
    ):
        names = [*frame.columns, column]
        columns = [pa.array(frame[c].to_list()) for c in names]
        path = tmp_path / name
        if name.endswith("csv"):
            frame[names].to_csv(path, index=False, header=names)
        else:
            pq.write_table(pa.Table.from_arrays(columns, names=names), path)
        with pytest.raises((CohortError, UsageError), match=f"occur twice: {column}"):
            read(path)


def lines_of(frame: pd.DataFrame) -> list[str]:
    return frame.to_csv(index=False).splitlines()


def test_empty_columns_at_the_end_are_left_out(tmp_path, outcomes):
    for read, frame in ((cohort_ids, SHIPPED), (lambda p: read_table(p).group, outcomes)):
        header, *rows = lines_of(frame)
        for text in (
            [header + ",,", *(r + ",," for r in rows)],
            [header, *(r + "," for r in rows)],
        ):
            (tmp_path / "t.csv").write_text("\n".join(text))
            assert len(read(tmp_path / "t.csv")) == len(frame)


def test_a_cell_beyond_the_header_is_refused(tmp_path, outcomes):
    for read, frame in ((load_cohort, SHIPPED), (read_table, outcomes)):
        header, *rows = lines_of(frame)
        (tmp_path / "t.csv").write_text("\n".join([header, rows[0], rows[1] + ",7", *rows[2:]]))
        with pytest.raises((CohortError, UsageError), match=r"row 2: '7' is in column \d+, for"):
            read(tmp_path / "t.csv")


@pytest.mark.parametrize(("sep", "name"), [(";", "semicolon"), ("\t", "tab")])
def test_another_separator_is_named(sep, name, tmp_path, outcomes):
    for read, frame in ((load_cohort, SHIPPED), (read_table, outcomes)):
        frame.to_csv(tmp_path / "t.csv", sep=sep, decimal=",", index=False)
        with pytest.raises((CohortError, UsageError), match=f"separated by a {name}"):
            read(tmp_path / "t.csv")


def test_metadata_that_pandas_cannot_use_is_one_line(tmp_path):
    table = pa.Table.from_pandas(SHIPPED).replace_schema_metadata({b"pandas": b"{}"})
    pq.write_table(table, tmp_path / "c.parquet")
    with pytest.raises(CohortError, match=r"c\.parquet: cannot be read: KeyError") as caught:
        load_cohort(tmp_path / "c.parquet")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [True, "4_0.4889", "forty"])
def test_what_only_looks_like_a_number_is_refused(value, tmp_path, outcomes):
    column = "transmurality" if value is True else "lvef_pct"
    suffix = "parquet" if value is True else "csv"
    for read, frame in ((load_cohort, SHIPPED), (read_table, outcomes)):
        path = written(frame.assign(**{column: value}), tmp_path / f"t.{suffix}")
        with pytest.raises((CohortError, UsageError), match=f"{column}: '{value}'"):
            read(path)


def test_labels_may_be_truth_values_and_cells_of_outcomes_missing(tmp_path, outcomes):
    labels = outcomes["is_optimal"].astype(bool)
    known = [x if i % 3 else None for i, x in enumerate(outcomes["toxicity_risk"])]
    frame = outcomes.assign(is_optimal=labels, toxicity_risk=known)
    for name in ("t.csv", "t.parquet"):
        outcome = read_table(written(frame, tmp_path / name)).outcome
        assert outcome[:, 2].tolist() == outcomes["is_optimal"].to_list()
        assert outcome[:, 3].isnan().sum() == 14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"lvef_pct": 50.0}, r"lvef_pct: 50; allowed: .* from 100 \(edv_ml - esv_ml\)"),
        (lambda t: {"delta_ef_pct": t.delta_ef_pct / 100}, "delta_ef_pct: all values lie in -1 to"),
        (
            lambda t: {"stress_reduction_pct": t.stress_reduction_pct / 100},
            "stress_reduction_pct: all values lie in -1 to 1; .* 100 times the values would fit",
        ),
        (
            lambda t: {"delta_ef_pct": t.delta_ef_pct.where(t.index % 10 > 0, -99)},
            "row 1, delta_ef_pct: -99, in 4 rows .* leave such cells empty",
        ),
        (lambda t: {"is_optimal": 1 - t.is_optimal}, "is_optimal is 1 with delta_ef_pct"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(change, message, tmp_path, outcomes):
    path = written(outcomes.assign(**change(outcomes)), tmp_path / "t.csv")
    with pytest.raises(UsageError, match=message):
        read_table(path)


def test_values_far_from_others_are_no_mark_for_missing_where_they_are_usual(tmp_path, outcomes):
    frame = outcomes.assign(
        stress_reduction_pct=outcomes.stress_reduction_pct.where(outcomes.is_optimal == 1, 0.0),
        structural_integrity=outcomes.structural_integrity.where(outcomes.index % 2 == 0, 1.0),
    )
    assert len(read_table(written(frame, tmp_path / "t.csv")).group) == 40


@pytest.mark.parametrize(
    ("column", "factor", "hint"),
    [
        ("toxicity_risk", 100.0, r"0.01 times the values would fit \(%\)$"),
        ("conductivity_s_per_m", 10.0, r"0.1 times the values would fit \(mS/cm\)$"),
        ("youngs_modulus_kpa", 1000.0, r"0.001 times the values would fit \(Pa\)$"),
        ("half_life_days", 24.0, r"0.0416667 times the values would fit \(hours\)$"),
        ("thickness_mm", 0.1, r"10 times the values would fit \(cm\)$"),
        ("youngs_modulus_kpa", 3.0, None),
        ("conductivity_s_per_m", 1.4, None),
    ],
)
def test_a_unit_is_named_only_if_all_values_then_fit(column, factor, hint, tmp_path, outcomes):
    path = written(outcomes.assign(**{column: outcomes[column] * factor}), tmp_path / "t.csv")
    with pytest.raises(UsageError, match=rf"{column}: .*allowed") as caught:
        read_table(path)
    text = str(caught.value)
    assert re.search(rf"\? {hint}", text) if hint else "would fit" not in text
