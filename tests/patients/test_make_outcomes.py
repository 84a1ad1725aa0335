"""The made-up table of Stage-1 outcomes: its plan, its noise, its faults and its files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from hydrogel_gym import load_cohort
from hydrogel_gym.problem.cohort import FEATURE_COLUMNS
from hydrogel_gym.problem.fields import COVERAGES, FORMULATION_FIELDS
from hydrogel_gym.problem.polymers import NUM_POLYMERS, load_polymers

PATIENTS = Path(__file__).parents[2] / "patients"
PAIR = ["patient_id", "polymer_name"]
SMALL = {"patients": 4, "rows": 4 * NUM_POLYMERS * 40 + 10}
FLAGS = [str(part) for name, value in SMALL.items() for part in (f"--{name}", value)]
CLEAN = {"outlier_share": 0.0, "missing_share": 0.0}


@pytest.fixture(scope="module")
def script(outcome_maker):
    return outcome_maker


@pytest.fixture(scope="module")
def table(script):
    return script.make_outcomes(**SMALL)


@pytest.fixture(scope="module")
def residuals(script):
    """Noise of a clean table in units of its stated deviation, beside the noiseless outcomes."""
    clean = script.make_outcomes(patients=4, rows=40_000, **CLEAN)
    truth = script.noiseless(clean)
    feasibility = truth["feasibility"]
    sd = {name: noise.sd(truth[name], feasibility) for name, noise in script.NOISE.items()}
    return pd.DataFrame({name: (clean[name] - truth[name]) / sd[name] for name in sd}), truth


@pytest.fixture
def command(script, capsys):
    """Runs the command line in process: exit status, standard output, standard error."""

    def run(*flags):
        status = script.main([str(flag) for flag in flags])
        return status, *capsys.readouterr()

    return run


def test_columns_are_patient_then_design_then_outcomes(table, script):
    outcomes = "delta_ef_pct stress_reduction_pct is_optimal toxicity_risk structural_integrity"
    assert list(table.columns) == [
        "patient_id",
        *FEATURE_COLUMNS,
        "polymer_name",
        *(field.name for field in FORMULATION_FIELDS),
        "coverage",
        *f"{outcomes} fibrosis_risk".split(),
    ]
    texts = table.columns[table.dtypes == "category"]
    assert list(texts) == ["patient_id", "polymer_name", "coverage"]
    assert (table.drop(columns=texts).dtypes == np.float32).all()
    cohort = load_cohort()
    once = table.drop_duplicates(["patient_id", *FEATURE_COLUMNS])
    rows = [cohort.index(patient_id) for patient_id in once["patient_id"]]
    assert len(once) == 4
    np.testing.assert_array_equal(once[FEATURE_COLUMNS], cohort.features.float()[rows])


def test_pair_fills_every_range_and_coverage_evenly_by_a_hypercube_of_its_own(table):
    sizes = table.groupby(PAIR, observed=True).size()
    assert sizes.value_counts().to_dict() == {40: 4 * NUM_POLYMERS - 10, 41: 10}
    assert set(table["polymer_name"]) == set(load_polymers().names)
    for _, group in table.groupby(PAIR, observed=True):
        for field in FORMULATION_FIELDS:
            share = (group[field.name].to_numpy(np.float64) - field.low) / (field.high - field.low)
            assert sorted((share * len(group)).astype(int)) == list(range(len(group)))
        counts = group["coverage"].value_counts()
        assert set(counts.index) == set(COVERAGES)
        assert np.ptp(counts) <= 2
    assert not table.duplicated([field.name for field in FORMULATION_FIELDS]).any()


def test_chosen_patients_are_near_to_all_and_reach_both_tails_of_every_feature(script):
    features = load_cohort().features.numpy()
    z = (features - features.mean(0)) / features.std(0)

    def distance(rows):
        return np.linalg.norm(z[:, None] - z[rows], axis=-1).min(axis=1).mean()

    rng = np.random.default_rng(0)
    random = [distance(rng.choice(len(z), 60, replace=False)) for _ in range(4)]
    rows = script.choose_patients(features, 60, rng)
    assert distance(rows) < 0.95 * min(random)
    assert ((features[rows] <= np.quantile(features, 0.1, axis=0)).sum(axis=0) >= 2).all()
    assert ((features[rows] >= np.quantile(features, 0.9, axis=0)).sum(axis=0) >= 2).all()
    for count in (1, 2, 200):
        chosen = script.choose_patients(features[:200], count, np.random.default_rng(0))
        assert np.array_equal(chosen, np.unique(chosen))
        assert len(chosen) == count


def test_same_arguments_give_the_same_table_and_another_seed_another(script, table):
    pd.testing.assert_frame_equal(script.make_outcomes(**SMALL), table, check_exact=True)
    other = script.make_outcomes(**SMALL, seed=2)
    assert not np.isin(other["thickness_mm"], table["thickness_mm"]).all()


@pytest.mark.parametrize("outcome_scale", ["source", "literature"])
def test_noise_scale_multiplies_the_noise_of_the_outcomes_of_the_model(
    script, table, outcome_scale
):
    scaled = {"outcome_scale": outcome_scale}
    clean, once, twice = (
        script.make_outcomes(**SMALL, **CLEAN, **scaled, noise_scale=n) for n in (0.0, 1.0, 2.0)
    )
    designs = list(table.columns[:18])
    pd.testing.assert_frame_equal(clean[designs], table[designs], check_exact=True)
    truth = script.noiseless(clean, outcome_scale)
    for name in script.NOISE:
        np.testing.assert_allclose(clean[name], truth[name], rtol=1e-6)
    noise = [frame["delta_ef_pct"] - truth["delta_ef_pct"] for frame in (once, twice)]
    np.testing.assert_allclose(noise[1], 2.0 * noise[0], atol=1e-5)
    ceiling = script.noise_ceiling(clean, outcome_scale)["delta_ef_pct"]
    assert (ceiling["mae"], ceiling["r2"]) == pytest.approx((0.0, 1.0), abs=1e-6)
    wild = script.make_outcomes(patients=1, rows=2_400, noise_scale=50.0, outlier_share=0.5)
    for name in script.NOISE:
        assert wild[name].dropna().between(*script.LIMITS[name]).all()


def test_noise_is_as_stated_and_independent_of_the_other_outcomes(residuals, script):
    z, truth = residuals
    for name in ("delta_ef_pct", "stress_reduction_pct"):
        # Of n normals the deviation varies by 1 / sqrt(2 n); 5,000 in each of eight parts: 1 %.
        for by in (truth[name].abs(), truth["feasibility"]):
            for _, part in z[name].groupby(pd.qcut(by, 8), observed=True):
                assert part.std() == pytest.approx(1.0, abs=0.04)
                assert part.mean() == pytest.approx(0.0, abs=0.06)
        noise = script.NOISE[name]
        assert noise.sd(np.array(-10.0), np.array(1.0)) == noise.floor + 10.0 * noise.per_size
        assert noise.sd(np.array(0.0), np.array(0.0)) == noise.floor + noise.per_infeasibility
    for name in ("toxicity_risk", "structural_integrity", "fibrosis_risk"):
        inside = truth[name].between(0.1, 0.8)  # away from the limits
        assert inside.sum() > 4_000
        assert z[name][inside].std() == pytest.approx(1.0, abs=0.04)
    assert abs(z.corr().to_numpy() - np.eye(5)).max() < 0.03


def test_outliers_and_gaps_come_in_the_stated_share(script):
    settings = {"patients": 2, "rows": 24_000}
    clean = script.make_outcomes(**settings, **CLEAN)
    faulty = script.make_outcomes(**settings, outlier_share=0.1, missing_share=0.0)
    names = list(script.NOISE)
    differs = clean[names].to_numpy() != faulty[names].to_numpy()
    assert differs.sum(axis=1).max() == 1
    # 2,400 +- 46 rows are expected, and a fifth of them, 480 +- 22, for each outcome.
    assert differs.any(axis=1).mean() == pytest.approx(0.1, abs=0.008)
    assert differs.mean(axis=0) == pytest.approx(0.02, abs=0.004)
    for i, name in enumerate(names):
        low, high = script.LIMITS[name]
        before, after = (f[name].to_numpy(np.float64)[differs[:, i]] for f in (clean, faulty))
        tripled = np.isclose(after, np.clip(3.0 * before, low, high), atol=1e-5)
        mirrored = np.isclose(after, low + high - before, atol=1e-5)
        assert (tripled | mirrored).all()
        assert mirrored.mean() == pytest.approx(0.5, abs=0.12)
    gappy = script.make_outcomes(**settings, missing_share=0.05)
    shares = gappy[names].isna().mean()
    assert shares.to_numpy() == pytest.approx(0.05, abs=0.008)  # +- 0.0014 is one deviation
    assert gappy.drop(columns=script.OUTCOME_COLUMNS).notna().all(axis=None)


def test_label_is_of_the_outcomes_in_the_table(table, script):
    goals = table[["delta_ef_pct", "stress_reduction_pct"]].to_numpy()
    label, unknown = table["is_optimal"].to_numpy(), np.isnan(goals).any(axis=1)
    assert unknown.any()
    assert np.array_equal(np.isnan(label), unknown)
    expected = (goals >= [3.0, 15.0]).all(axis=1)
    assert np.array_equal(label[~unknown], expected[~unknown].astype(np.float32))
    assert 0.1 < expected.mean() < 0.5
    edge = pd.DataFrame({"delta_ef_pct": [3.0, 2.99, 3.0], "stress_reduction_pct": [15, 15, 14.99]})
    assert script.is_optimal(edge).tolist() == [1.0, 0.0, 0.0]


def test_noise_ceiling_is_by_hand_and_nothing_where_nothing_is_known(script):
    clean = script.make_outcomes(patients=1, rows=24, noise_scale=0.0, **CLEAN)
    clean["delta_ef_pct"] += np.float32(2.0) * np.tile([1, -1], 12).astype(np.float32)
    clean.loc[0, "toxicity_risk"] = np.nan
    ceiling = script.noise_ceiling(clean)
    variance = clean["delta_ef_pct"].astype(float).var(ddof=0)
    expected = {"mae": 2.0, "rmse": 2.0, "r2": 1.0 - 4.0 / variance}
    assert {name: ceiling["delta_ef_pct"][name] for name in expected} == pytest.approx(expected)
    assert ceiling["toxicity_risk"]["mae"] == pytest.approx(0.0, abs=1e-7)
    noisy = script.noise_ceiling(script.make_outcomes(patients=8, rows=8 * NUM_POLYMERS * 30))
    assert noisy["delta_ef_pct"]["mae"] < 0.6
    assert noisy["delta_ef_pct"]["r2"] > 0.93
    assert noisy["is_optimal"]["auroc"] > 0.98
    assert noisy["is_optimal"]["f1"] > 0.88
    empty = script.make_outcomes(patients=1, rows=24, missing_share=1.0)
    figures = [value for of in script.noise_ceiling(empty).values() for value in of.values()]
    assert np.isnan(figures).all()


def test_parquet_gives_the_table_back_and_csv_the_same_numbers(command, script, table, tmp_path):
    for suffix, read in {".parquet": pd.read_parquet, ".csv": pd.read_csv}.items():
        path = tmp_path / f"outcomes{suffix}"
        status, out, err = command("--output", path, *FLAGS)
        assert (status, err) == (0, "")
        assert out.startswith("3,850 synthetic rows of 4 patients and 24 polymers: ")
        assert all(name in out for name in (*script.NOISE, "AUROC", "R2"))
        found = read(path).astype(table.dtypes.replace("category", "str").to_dict())
        expected = table.astype(found.dtypes.to_dict())
        pd.testing.assert_frame_equal(found, expected, check_exact=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outcomes.csv", "outcomes.parquet"]
    arrow = pq.read_table(tmp_path / "outcomes.parquet")
    assert json.loads(arrow.schema.metadata[b"hydrogel_gym"]) == {
        **script.make_outcomes.__kwdefaults__,
        **SMALL,
        "made_by": "patients/make_outcomes.py",
        "synthetic": True,
        "truth": "mechanistic",
    }
    assert all(arrow[name].null_count > 0 for name in script.OUTCOME_COLUMNS)


def test_argument_out_of_range_or_failed_write_is_one_line_and_writes_nothing(
    command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for flags, expected in (
        (["--rows", 1439], "--rows is 1439; allowed: 1440 or more, one per patient and polymer"),
        (["--patients", 2001], "--patients is 2001; allowed: 1 to 2000, the cohort"),
        (["--seed", -1], "--seed is -1; allowed: 0 or more"),
        (["--outlier-share", 1.1], "--outlier-share is 1.1; allowed: 0 to 1"),
        (["--missing-share", "nan"], "--missing-share is nan; allowed: 0 to 1"),
        (["--noise-scale", -1], "--noise-scale is -1.0; allowed: a finite number"),
        (["--outcome-scale", "mine"], "--outcome-scale is mine; allowed: source, literature"),
        (["--output", "x.txt"], "--output is x.txt; allowed: a name in .csv or .parquet"),
        (["--output", "no/x.csv"], "--output is no/x.csv; allowed: a file in a folder that exists"),
    ):
        status, out, err = command("--output", "outcomes.csv", *flags)
        assert (status, out) == (2, "")
        assert err.startswith(f"error: {expected}")
        assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("hydrogel_gym.files.os.fsync", full)
    failed = command("--output", "outcomes.csv", "--patients", 1, "--rows", 24)
    assert failed == (1, "", "error: disk full\n")
    assert list(tmp_path.iterdir()) == []


def test_data_card_describes_every_column_and_its_noise(script):
    card = (PATIENTS / "README.md").read_text("utf-8")
    section = card.partition("## Made-up outcomes\n")[2].partition("\n## ")[0]
    described = {line.split("`")[1]: line for line in section.splitlines() if line[:3] == "| `"}
    wanted = [*script.COLUMNS[12:18], *script.OUTCOME_COLUMNS]
    assert set(wanted) <= set(described)
    rows = [line for line in section.splitlines() if " noise of SD " in line]
    for (name, noise), row in zip(script.NOISE.items(), rows, strict=True):
        stated = row.partition(" noise of SD ")[2].replace("\\|x\\|", "").replace("(1 - F)", "")
        assert row.startswith(f"| `{name}`")
        assert tuple(float(part) for part in stated.partition("|")[0].split("+")) == noise
