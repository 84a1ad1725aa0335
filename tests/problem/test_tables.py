"""Tables as people bring them: what is read as what, and what is refused."""

from __future__ import annotations

import re
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hydrogel_gym import CohortError, load_cohort
from hydrogel_gym.designs import load_designs
from hydrogel_gym.designs.schema import ranked_parquet
from hydrogel_gym.designs.store import Store
from hydrogel_gym.errors import UsageError
from hydrogel_gym.models.outcome_table import read_table
from hydrogel_gym.oracle import __main__ as oracle_command

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


def as_text(frame: pd.DataFrame, path: Path, change) -> Path:
    """A table in .csv whose lines, the header first, were changed."""
    path.write_text("\n".join(change(*frame.to_csv(index=False).splitlines())))
    return path


@pytest.mark.parametrize("name", ["table.csv", "TABLE.CSV", "table.parquet", "table.Parquet"])
def test_identifiers_are_text_in_cohorts_and_outcome_tables(name, tmp_path, outcomes):
    ids = ["7", "007", "NA", "12", "0012", "nan", "None", "1e3"]
    path = written(SHIPPED.assign(patient_id=ids), tmp_path / name)
    assert cohort_ids(path) == tuple(ids)
    path = written(outcomes.assign(patient_id=ids * 5), tmp_path / name)
    assert len(np.unique(read_table(path).group)) == 8
    if name == "table.parquet":
        outcomes.set_index("patient_id").to_parquet(path)
        assert len(read_table(path).group) == 40


def test_empty_columns_at_the_end_are_left_out(tmp_path, outcomes):
    for end in (",,", ""):
        path = tmp_path / "t.csv"
        as_text(outcomes, path, lambda h, *rows, e=end: [h + e, *(r + "," + e[1:] for r in rows)])
        assert len(read_table(path).group) == len(outcomes)


def twice(frame, column, path):
    names = [*frame.columns, column]
    columns = [pa.array(frame[c].to_list()) for c in names]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_arrays(columns, names=names), path)
    else:
        frame[names].to_csv(path, index=False, header=names)


def no_metadata(frame, column, path):
    table = pa.Table.from_pandas(frame).replace_schema_metadata({b"pandas": b"{}"})
    pq.write_table(table, path)


def one_cell_more(frame, column, path):
    as_text(frame, path, lambda *rows: [*rows[:2], rows[2] + ",7"])


def separated(sep):
    return lambda frame, column, path: frame.to_csv(path, sep=sep, decimal=",", index=False)


def filled(**columns):
    return lambda frame, column, path: written(frame.assign(**columns), path)


@pytest.mark.parametrize(
    ("suffix", "make", "message"),
    [
        (".csv", twice, "occur twice: {column}$"),
        (".parquet", twice, "occur twice: {column}$"),
        (".parquet", no_metadata, "t.parquet: cannot be read: KeyError[^\n]*$"),
        (".csv", one_cell_more, r"row 2: '7' is in column \d+, for"),
        (".csv", separated(";"), "separated by a semicolon"),
        (".csv", separated("\t"), "separated by a tab"),
        (".csv", filled(lvef_pct="4_0.48"), "lvef_pct: '4_0.48'"),
        (".parquet", filled(transmurality=True), "transmurality: 'True'"),
    ],
)
def test_table_that_cannot_be_read_as_it_is_meant_is_refused(
    suffix, make, message, tmp_path, outcomes
):
    path = tmp_path / f"t{suffix}"
    for read, frame, column, error in (
        (load_cohort, SHIPPED, "lvef_pct", CohortError),
        (read_table, outcomes, "toxicity_risk", UsageError),
    ):
        make(frame, column, path)
        with pytest.raises(error, match=message.replace("{column}", column)):
            read(path)


def test_names_that_look_the_same_are_the_same(tmp_path):
    ids = SHIPPED["patient_id"].to_list()
    path = written(SHIPPED.assign(patient_id=[ids[0] + " ", *ids[1:]]), tmp_path / "c.csv")
    assert cohort_ids(path) == tuple(ids)
    for first, second in (("P0000", "P0000 "), ("M\u00fcller", "Mu\u0308ller")):
        path = written(SHIPPED.assign(patient_id=[first, second, *ids[2:]]), tmp_path / "c.csv")
        with pytest.raises(CohortError, match="each name once"):
            load_cohort(path)


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
        (
            lambda t: {"scar_fraction_pct": 44.0, "bz_fraction_pct": 24.0},
            r"scar_fraction_pct \+ bz_fraction_pct: 68; allowed: 0 to 65; rows",
        ),
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
    usual = outcomes.assign(  # values far from the others that are no mark for missing
        stress_reduction_pct=outcomes.stress_reduction_pct.where(outcomes.is_optimal == 1, 0.0),
        structural_integrity=outcomes.structural_integrity.where(outcomes.index % 2 == 0, 1.0),
    )
    assert len(read_table(written(usual, path)).group) == 40


@pytest.mark.parametrize(
    ("column", "factor", "hint"),
    [
        ("toxicity_risk", 100.0, r"0.01 times the values would fit \(%\)$"),
        ("conductivity_s_per_m", 10.0, r"0.1 times the values would fit \(mS/cm\)$"),
        ("youngs_modulus_kpa", 1000.0, r"0.001 times the values would fit \(Pa\)$"),
        ("half_life_days", 24.0, r"0.0416667 times the values would fit \(hours\)$"),
        ("thickness_mm", 0.1, r"10 times the values would fit \(cm\)$"),
        ("youngs_modulus_kpa", 3.0, None),
    ],
)
def test_a_unit_is_named_only_if_all_values_then_fit(column, factor, hint, tmp_path, outcomes):
    path = written(outcomes.assign(**{column: outcomes[column] * factor}), tmp_path / "t.csv")
    with pytest.raises(UsageError, match=rf"{column}: .*allowed") as caught:
        read_table(path)
    text = str(caught.value)
    assert re.search(rf"\? {hint}", text) if hint else "would fit" not in text


def test_what_needs_pyarrow_says_so_in_one_line_where_it_is_not_installed(
    tmp_path, monkeypatch, capsys
):
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / "mine.parquet"
    path.touch()
    missing = 'needs pyarrow, which is not installed: pip install "pyarrow>=15.0.2"'
    for what, error, use in (
        (f"{path}: a Parquet table", CohortError, lambda: load_cohort(path)),
        ("reading designs", UsageError, lambda: load_designs(tmp_path)),
        ("writing designs", UsageError, lambda: Store(tmp_path, {})),
        ("writing ranked designs", UsageError, lambda: ranked_parquet(SHIPPED)),
    ):
        with pytest.raises(error) as refused:
            use()
        assert str(refused.value) == f"{what} {missing}"
    assert oracle_command.main(["--output", str(path)]) == 2
    assert capsys.readouterr().err == f"error: --output {path} {missing}\n"
