from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hydrogel_gym.problem.cohort import FEATURE_COLUMNS, load_cohort
from hydrogel_gym.problem.fields import PATIENT_FIELDS

PATIENTS = Path(__file__).parents[2] / "patients"
FILES = ("cohort.csv", "cohort_holdout.csv", "README.md")


@pytest.fixture(scope="module")
def generate(load_checkout_script):
    return load_checkout_script("patients/generate.py")


@pytest.fixture(scope="module", params=["train", "holdout"])
def patients(request):
    """A shipped file, whose ranges and identities are checked where it is loaded."""
    table = pd.read_csv(PATIENTS / ("cohort.csv" if request.param == "train" else FILES[1]))
    assert list(table.columns) == ["patient_id", *FEATURE_COLUMNS]
    assert np.array_equal(load_cohort(request.param).features.numpy(), table[FEATURE_COLUMNS])
    return table


def test_derived_columns_are_what_the_printed_ones_give_and_no_other_is_a_copy(patients):
    # Six significant digits: half a unit of the sixth is at most 5e-6 of the value.
    esv = patients["edv_ml"] * (1.0 - patients["lvef_pct"] / 100.0)
    bz_stress = patients["stress_concentration"] * patients["healthy_stress_kpa"]
    np.testing.assert_allclose(patients["esv_ml"], esv, rtol=5.0001e-6)
    np.testing.assert_allclose(patients["bz_stress_kpa"], bz_stress, rtol=5.0001e-6)
    free = patients[FEATURE_COLUMNS].drop(columns=["esv_ml", "bz_stress_kpa"])
    # Of the correlation matrix, so that units do not count; a linear copy would give 0.
    assert np.linalg.eigvalsh(free.corr().to_numpy()).min() > 0.05


def test_means_and_correlations_are_those_of_the_recipe_and_of_the_literature(patients):
    means = [36.9, -11.1, 207.0, 133.0, 20.4, 13.5, 34.7, 18.3, 1.87, 0.53, 6.5]
    assert patients[FEATURE_COLUMNS].mean().tolist() == pytest.approx(means, rel=0.1)
    for first, second, *expected in (  # of the recipe, then published
        ("scar_fraction_pct", "lvef_pct", -0.64, -0.66),  # [PMID18760132]
        ("scar_fraction_pct", "edv_ml", 0.48, 0.42),  # [Wu2008]
        ("scar_fraction_pct", "esv_ml", 0.59),  # [Wu2008] 0.69, of indexed volumes
        ("gls_pct", "lvef_pct", -0.65, -0.69),  # [Mistry2011]
        ("gls_pct", "scar_fraction_pct", 0.41, 0.43),  # [Mistry2011]
        ("edv_ml", "lvef_pct", -0.55),
    ):
        r = patients[first].corr(patients[second])
        assert [r] * len(expected) == pytest.approx(expected, abs=0.08), (first, second)
    lvef, scar = patients["lvef_pct"], patients["scar_fraction_pct"]
    found = [
        patients["edv_ml"][lvef < 40.0].mean(),  # [Sunnybrook]
        lvef[scar > scar.quantile(2 / 3)].mean(),  # [Wu2008]
        (patients["wall_thickness_mm"] <= 5.5).mean(),  # [Shah2013]
    ]
    assert found == pytest.approx([245.0, 32.0, 0.19], rel=0.1)


def test_draw_has_the_latent_mass_acceptance_and_wall_of_the_recipe(generate):
    draw = generate.draw_cohort(generate.TRAIN)
    mass_g = draw.mass_g[draw.patients["lvef_pct"] < 40.0]
    assert mass_g.mean() == pytest.approx(201.0, rel=0.1)  # [Sunnybrook]
    assert draw.mass_g.min() > generate.MIN_MASS_G
    assert draw.acceptance == pytest.approx(0.85, abs=0.02)
    # Radius 30 mm, wall 10 mm: volumes of the two spheres by hand, mL.
    cavity, outer = 4.0 / 3.0 * np.pi * 3.0**3, 4.0 / 3.0 * np.pi * 4.0**3
    assert generate.shell_wall_mm(cavity, outer - cavity) == pytest.approx(10.0)


def test_patients_do_not_depend_on_the_block_size(generate, monkeypatch):
    whole = generate.draw_cohort(generate.HOLDOUT)
    monkeypatch.setattr(generate, "BLOCK_ROWS", 100)
    blocks = generate.draw_cohort(generate.HOLDOUT)
    pd.testing.assert_frame_equal(blocks.patients, whole.patients, check_exact=True)
    assert blocks.acceptance == whole.acceptance


def test_generate_rebuilds_every_file_byte_for_byte_and_check_names_another(
    generate, tmp_path, capsys
):
    assert generate.main(["--output-dir", str(tmp_path)]) == 0
    assert sorted(os.listdir(tmp_path)) == sorted(FILES)
    assert generate.main(["--check"]) == 0
    assert capsys.readouterr() == ("", "")
    for file in FILES:
        built = (PATIENTS / file).read_bytes()
        assert (tmp_path / file).read_bytes() == built
        for content in (built.replace(b"36.7", b"36.8"), None):
            (tmp_path / file).unlink()
            if content is not None:
                (tmp_path / file).write_bytes(content)
            assert generate.main(["--check", "--output-dir", str(tmp_path)]) == 1
            assert capsys.readouterr().err == f"not what generate.py writes: {tmp_path / file}\n"
        (tmp_path / file).write_bytes(built)
    train, holdout = (pd.read_csv(tmp_path / file) for file in FILES[:2])
    assert set(train["patient_id"]).isdisjoint(holdout["patient_id"])
    assert len(train.merge(holdout, on=FEATURE_COLUMNS)) == 0


def test_report_is_the_table_of_the_data_card_and_every_column_has_its_range(generate, capsys):
    assert generate.main(["--report"]) == 0
    table = capsys.readouterr().out
    card = (PATIENTS / "README.md").read_text("utf-8")
    assert generate.BLOCK_BEGIN + table + generate.BLOCK_END in card
    assert set(generate.PUBLISHED) <= set(generate.statistics(generate.draw_cohort(generate.TRAIN)))
    for field in PATIENT_FIELDS:
        (row,) = (line for line in card.splitlines() if line.startswith(f"| `{field.name}`"))
        assert f"{field.low:g} to {field.high:g}" in row
    with pytest.raises(ValueError, match=r"README\.md lacks the line"):
        generate.with_table("# Data card\n", "| table |\n")
