from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from hydrogel_gym.problem.cohort import FEATURE_COLUMNS, MAX_SCAR_PLUS_BZ_PCT, load_cohort
from hydrogel_gym.problem.fields import PATIENT_FIELDS

PATIENTS = Path(__file__).parents[2] / "patients"
FILES = ("cohort.csv", "cohort_holdout.csv", "README.md")


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", PATIENTS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=FILES[:2])
def patients(request: pytest.FixtureRequest) -> pd.DataFrame:
    return pd.read_csv(PATIENTS / request.param)


def test_shipped_files_are_those_that_load_cohort_reads() -> None:
    for spec, file in {"train": "cohort.csv", "holdout": "cohort_holdout.csv"}.items():
        table = pd.read_csv(PATIENTS / file)
        assert list(table.columns) == ["patient_id", *FEATURE_COLUMNS]
        assert np.array_equal(load_cohort(spec).features.numpy(), table[FEATURE_COLUMNS])


def test_derived_columns_are_what_the_printed_ones_give(patients: pd.DataFrame) -> None:
    # Six significant digits: half a unit of the sixth is at most 5e-6 of the value.
    esv = patients["edv_ml"] * (1.0 - patients["lvef_pct"] / 100.0)
    bz_stress = patients["stress_concentration"] * patients["healthy_stress_kpa"]
    np.testing.assert_allclose(patients["esv_ml"], esv, rtol=5.0001e-6)
    np.testing.assert_allclose(patients["bz_stress_kpa"], bz_stress, rtol=5.0001e-6)


@pytest.mark.parametrize("field", PATIENT_FIELDS, ids=lambda field: field.name)
def test_column_stays_in_its_range(patients: pd.DataFrame, field: tuple) -> None:
    assert patients[field.name].between(field.low, field.high).all()


def test_ventricle_shrinks_in_systole_and_keeps_remote_muscle(patients: pd.DataFrame) -> None:
    assert (patients["edv_ml"] > patients["esv_ml"]).all()
    lesion_pct = patients["scar_fraction_pct"] + patients["bz_fraction_pct"]
    assert lesion_pct.max() <= MAX_SCAR_PLUS_BZ_PCT


def test_no_column_repeats_another(patients: pd.DataFrame) -> None:
    r = patients[FEATURE_COLUMNS].corr().abs()
    for first, second in itertools.combinations(FEATURE_COLUMNS, 2):
        if (first, second) != ("edv_ml", "esv_ml"):
            assert r.loc[first, second] < 0.98


def test_covariance_has_full_rank_without_the_derived_columns(patients: pd.DataFrame) -> None:
    free = patients[FEATURE_COLUMNS].drop(columns=["esv_ml", "bz_stress_kpa"])
    # Of the correlation matrix, so that units do not count; a linear copy would give 0.
    assert np.linalg.eigvalsh(free.corr().to_numpy()).min() > 0.05


@pytest.mark.parametrize(
    ("column", "expected"),
    {
        "lvef_pct": 36.9,
        "gls_pct": -11.1,
        "edv_ml": 207.0,
        "esv_ml": 133.0,
        "scar_fraction_pct": 20.4,
        "bz_fraction_pct": 13.5,
        "bz_stress_kpa": 34.7,
        "healthy_stress_kpa": 18.3,
        "stress_concentration": 1.87,
        "transmurality": 0.53,
        "wall_thickness_mm": 6.5,
    }.items(),
)
def test_mean_is_that_of_the_recipe(patients: pd.DataFrame, column: str, expected: float) -> None:
    assert patients[column].mean() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("first", "second", "recipe", "published"),
    [
        ("scar_fraction_pct", "lvef_pct", -0.64, -0.66),  # [PMID18760132]
        ("scar_fraction_pct", "edv_ml", 0.48, 0.42),  # [Wu2008]
        ("scar_fraction_pct", "esv_ml", 0.59, None),  # [Wu2008] 0.69, of indexed volumes
        ("gls_pct", "lvef_pct", -0.65, -0.69),  # [Mistry2011]
        ("gls_pct", "scar_fraction_pct", 0.41, 0.43),  # [Mistry2011]
        ("edv_ml", "lvef_pct", -0.55, None),
    ],
)
def test_correlation_is_that_of_the_recipe_and_of_the_literature(
    patients: pd.DataFrame, first: str, second: str, recipe: float, published: float | None
) -> None:
    r = patients[first].corr(patients[second])
    assert r == pytest.approx(recipe, abs=0.08)
    if published is not None:
        assert r == pytest.approx(published, abs=0.08)


def test_subgroups_have_published_means(patients: pd.DataFrame) -> None:
    lvef, scar = patients["lvef_pct"], patients["scar_fraction_pct"]
    assert patients["edv_ml"][lvef < 40.0].mean() == pytest.approx(245.0, rel=0.1)  # [Sunnybrook]
    assert lvef[scar > scar.quantile(2 / 3)].mean() == pytest.approx(32.0, rel=0.1)  # [Wu2008]
    assert (patients["wall_thickness_mm"] <= 5.5).mean() == pytest.approx(
        0.19, rel=0.1
    )  # [Shah2013]


def test_latent_mass_and_acceptance_are_those_of_the_recipe(generate: ModuleType) -> None:
    draw = generate.draw_cohort(generate.TRAIN)
    mass_g = draw.mass_g[draw.patients["lvef_pct"] < 40.0]
    assert mass_g.mean() == pytest.approx(201.0, rel=0.1)  # [Sunnybrook]
    assert draw.mass_g.min() > generate.MIN_MASS_G
    assert draw.acceptance == pytest.approx(0.85, abs=0.02)


def test_shell_wall_holds_the_muscle(generate: ModuleType) -> None:
    # Radius 30 mm, wall 10 mm: volumes of the two spheres by hand, mL.
    cavity, outer = 4.0 / 3.0 * np.pi * 3.0**3, 4.0 / 3.0 * np.pi * 4.0**3
    assert generate.shell_wall_mm(cavity, outer - cavity) == pytest.approx(10.0)


def test_no_patient_is_in_both_cohorts() -> None:
    train, holdout = (pd.read_csv(PATIENTS / file) for file in FILES[:2])
    assert set(train["patient_id"]).isdisjoint(holdout["patient_id"])
    assert len(train.merge(holdout, on=FEATURE_COLUMNS)) == 0


def test_patients_do_not_depend_on_the_block_size(
    generate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generate.draw_cohort(generate.HOLDOUT)
    monkeypatch.setattr(generate, "BLOCK_ROWS", 100)
    blocks = generate.draw_cohort(generate.HOLDOUT)
    pd.testing.assert_frame_equal(blocks.patients, whole.patients, check_exact=True)
    assert blocks.acceptance == whole.acceptance


def test_generate_rebuilds_every_file_byte_for_byte(generate: ModuleType, tmp_path: Path) -> None:
    assert generate.main(["--output-dir", str(tmp_path)]) == 0
    for file in FILES:
        assert (tmp_path / file).read_bytes() == (PATIENTS / file).read_bytes()
    assert sorted(os.listdir(tmp_path)) == sorted(FILES)


def test_check_accepts_the_shipped_files(
    generate: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--check"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("fault", ["changed", "gone"])
def test_check_names_a_file_that_is_not_the_built_one(
    generate: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    fault: str,
) -> None:
    for name in FILES:
        shutil.copy(PATIENTS / name, tmp_path)
    tampered = tmp_path / file
    if fault == "gone":
        tampered.unlink()
    else:
        tampered.write_bytes(tampered.read_bytes().replace(b"36.7", b"36.8"))
    assert generate.main(["--check", "--output-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"not what generate.py writes: {tampered}\n"


def test_report_is_the_table_of_the_data_card(
    generate: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--report"]) == 0
    table = capsys.readouterr().out
    card = (PATIENTS / "README.md").read_text("utf-8")
    assert generate.BLOCK_BEGIN + table + generate.BLOCK_END in card
    assert set(generate.PUBLISHED) <= set(generate.statistics(generate.draw_cohort(generate.TRAIN)))


def test_card_without_its_markers_is_refused(generate: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"README\.md lacks the line"):
        generate.with_table("# Data card\n", "| table |\n")


def test_card_lists_every_column_with_its_range() -> None:
    card = (PATIENTS / "README.md").read_text("utf-8")
    for field in PATIENT_FIELDS:
        (row,) = (line for line in card.splitlines() if line.startswith(f"| `{field.name}`"))
        assert f"{field.low:g} to {field.high:g}" in row


def test_interrupted_write_leaves_the_old_file(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cohort.csv"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        generate.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
