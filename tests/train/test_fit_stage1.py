"""Fitting a Stage-1 model: what is learned, what leaks, and which tables are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hydrogel_gym import load_polymers
from hydrogel_gym.errors import UsageError
from hydrogel_gym.models import outcome_table
from hydrogel_gym.models.ensemble import load_stage1
from hydrogel_gym.models.polymer_embedding import polymer_embedding
from hydrogel_gym.models.quality import quality
from hydrogel_gym.train import fit_stage1

ROWS = 24 * 12 * 10
SMALL = ["--num-epochs", "2", "--num-members", "3", "--batch-size", "128", "--trunk-dim", "32"]


@pytest.fixture(scope="session")
def embedding_file(tmp_path_factory) -> Path:
    """A vector of six numbers per polymer: a stand-in for a language model's 600."""
    path = tmp_path_factory.mktemp("embeddings") / "embeddings.csv"
    vectors = np.random.default_rng(0).normal(size=(24, 6))
    frame = pd.DataFrame(vectors, columns=[f"e{i}" for i in range(6)])
    frame.insert(0, "name", load_polymers().names)
    frame.sample(frac=1.0, random_state=0).to_csv(path, index=False)
    return path


@pytest.fixture(scope="session")
def made_up(outcome_maker) -> pd.DataFrame:
    """Outcomes of 12 patients, without noise."""
    clean = dict.fromkeys(("outlier_share", "missing_share", "noise_scale"), 0.0)
    return outcome_maker.make_outcomes(
        patients=12, rows=ROWS, seed=3, outcome_scale="source", **clean
    )


@pytest.fixture
def table(made_up):
    """A copy of a fifth of the outcomes, which a test may spoil."""
    few = made_up.groupby("patient_id", observed=True).head(48)
    few = few.sort_values("patient_id", kind="stable").reset_index(drop=True)
    return few.astype({name: object for name in ("polymer_name", "coverage", "patient_id")})


@pytest.fixture(scope="session")
def fitted(made_up, embedding_file, tmp_path_factory):
    """A run directory of a model fitted as far as a few seconds allow, and its report."""
    folder = tmp_path_factory.mktemp("stage1")
    made_up.to_parquet(folder / "outcomes.parquet")
    flags = ["--output-dir", str(folder / "run"), "--polymer-embeddings", str(embedding_file)]
    flags += ["--truth", "mechanistic", *SMALL, "--num-epochs", "25"]
    assert fit_stage1.main([str(folder / "outcomes.parquet"), *flags]) == 0
    return folder / "run", json.loads((folder / "run" / "metrics.json").read_text())


@pytest.fixture
def refuse(capsys, tmp_path):
    """Fits a table that must be refused before anything is written; returns the message."""

    def refuse(frame: pd.DataFrame, *flags: str) -> str:
        frame.to_csv(tmp_path / "outcomes.csv", index=False)
        arguments = [str(tmp_path / "outcomes.csv"), "--output-dir", str(tmp_path / "run"), *flags]
        assert fit_stage1.main(arguments) == 2
        assert not (tmp_path / "run").exists()
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        return message

    return refuse


def test_report_is_of_patients_that_the_model_has_not_seen(fitted):
    run, report = fitted
    assert (report["rows"], report["held_out_patients"]) == (ROWS, 3)
    held_out = report["held_out"]
    assert held_out["delta_ef_pct"]["r2"] > 0.4
    assert held_out["stress_reduction_pct"]["r2"] > 0.6
    assert held_out["is_optimal"]["auroc"] > 0.85
    # Without noise the ceiling is the truth itself.
    ceiling, truth = (report[name]["delta_ef_pct"] for name in ("ceiling", "against_truth"))
    assert ceiling["mae"] == pytest.approx(0.0, abs=1e-4)
    assert ceiling["r2"] == pytest.approx(1.0, abs=1e-5)
    assert truth["mae"] == pytest.approx(held_out["delta_ef_pct"]["mae"], abs=1e-3)
    # The mean is reported, and less is rewarded.
    table = outcome_table.read_table(run.parent / "outcomes.parquet")
    split = fit_stage1.split_patients(table.group, holdout_share=0.2, num_members=3, seed=1)
    table, model = table.rows(split.test), load_stage1(run / "stage1.pt")
    assert model.pessimism > 0.0
    prediction = model.predict(table.patient, table.polymer_id, table.formulation, table.coverage)
    error = (prediction.mean.delta_ef_pct - table.outcome[:, 0]).abs().mean().item()
    assert held_out["delta_ef_pct"]["mae"] == pytest.approx(error, rel=1e-4)
    history = pd.read_csv(run / "history.csv")
    assert history["best_validation_loss"].iloc[-1] <= history["validation_loss"].min() + 1e-6
    names = "stage1.pt metrics.json history.csv reliability.png predictions.png"
    assert {path.name for path in run.iterdir()} == set(names.split())


def test_only_a_whole_fit_is_not_overwritten_unasked(fitted, tmp_path, capsys):
    run, table = fitted[0], str(fitted[0].parent / "outcomes.parquet")
    before = (run / "stage1.pt").read_bytes()
    assert fit_stage1.main([table, "--output-dir", str(run)]) == 2
    assert "metrics.json exists; pass --overwrite" in capsys.readouterr().err
    assert (run / "stage1.pt").read_bytes() == before
    (tmp_path / "stage1.pt").write_bytes(b"of a fit that was killed")
    assert fit_stage1.main(["none.csv", "--output-dir", str(tmp_path)]) == 2
    assert "none.csv" in capsys.readouterr().err  # got as far as the table


def test_fitting_is_the_same_for_the_same_seed(table, embedding_file, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_stage1, "draw_quality", lambda *_: None)
    table.to_csv(tmp_path / "outcomes.csv", index=False)
    states = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        flags = ["--output-dir", str(tmp_path / name), "--seed", seed, *SMALL]
        flags += ["--polymer-embeddings", str(embedding_file), "--num-epochs", "1"]
        assert fit_stage1.main([str(tmp_path / "outcomes.csv"), *flags]) == 0
        states.append(load_stage1(tmp_path / name / "stage1.pt").state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["network.trunk.weight"], states[2]["network.trunk.weight"])


def test_no_patient_is_on_two_sides_of_a_split():
    group = np.repeat(np.arange(30), 7)[np.random.default_rng(0).permutation(210)]
    split = fit_stage1.split_patients(group, holdout_share=0.2, num_members=5, seed=1)
    test = set(group[split.test])
    assert len(test) == 6
    seen_by_someone = set()
    for train, validation in zip(split.train, split.validation, strict=True):
        fit, stop = set(group[train]), set(group[validation])
        assert fit.isdisjoint(stop | test)
        assert stop.isdisjoint(test)
        assert fit | stop | test == set(range(30))
        seen_by_someone |= stop
    assert seen_by_someone == set(range(30)) - test  # every patient stops one member


def test_a_twin_is_no_other_patient_and_wrong_rows_do_not_move_the_scaling(table, tmp_path):
    table.to_parquet(tmp_path / "clean.parquet")
    rows = table["patient_id"] == table["patient_id"].iloc[0]
    table.loc[table.index[rows][::2], "patient_id"] = "twin"
    table.loc[:1, "delta_ef_pct"] = [99.0, 97.5]
    table.to_parquet(tmp_path / "wrong.parquet")
    clean, wrong = (
        outcome_table.read_table(tmp_path / f"{name}.parquet") for name in ("clean", "wrong")
    )
    assert len(np.unique(wrong.group)) == len(np.unique(clean.group)) == 12
    clean, wrong = clean.scaling(), wrong.scaling()
    torch.testing.assert_close(clean.outcome_std, wrong.outcome_std, rtol=0.02, atol=0.0)
    torch.testing.assert_close(clean.outcome_mean, wrong.outcome_mean, rtol=0.05, atol=0.01)


def test_a_missing_outcome_is_not_learned_from_and_a_wrong_one_no_more_than_a_noisy_one():
    prediction = torch.randn(2, 5, 6, requires_grad=True)
    target = torch.rand(2, 5, 6).round()
    complete = fit_stage1.task_losses(prediction, target)
    target[0, 1, 3] = torch.nan
    losses = fit_stage1.task_losses(prediction, target)
    assert losses.isfinite().all()
    assert torch.equal(losses[1], complete[1])
    losses.sum().backward()
    assert prediction.grad[0, 1, 3] == 0.0
    assert (prediction.grad != 0.0).sum() == prediction.numel() - 1
    target = torch.zeros(1, 2, 6)
    target[0, :, 0] = torch.tensor([1.0, 50.0])
    prediction = torch.zeros(1, 2, 6, requires_grad=True)
    fit_stage1.task_losses(prediction, target)[0, 0].backward()
    assert prediction.grad[0, 0, 0] == prediction.grad[0, 1, 0] != 0.0


def test_learned_weights_settle_at_the_inverse_of_the_loss():
    losses = torch.tensor([[0.5, 0.02, 1.0, 0.1, 0.2, 3.0]])
    log_variance = torch.zeros(1, 6, requires_grad=True)
    optimizer = torch.optim.Adam([log_variance], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        fit_stage1.weighted(losses, log_variance).backward()
        optimizer.step()
    torch.testing.assert_close(log_variance.exp(), 2.0 * losses, rtol=1e-2, atol=1e-3)


def test_calibration_error_of_a_calibrated_prediction_is_small():
    pick = np.random.default_rng(0)
    probability = pick.uniform(size=20_000).astype(np.float32)
    observed = np.zeros((20_000, 6), np.float32)
    observed[:, 2] = pick.uniform(size=20_000) < probability
    predicted = np.zeros((20_000, 6), np.float32)
    for share, error in ((1.0, 0.0), (0.5, 0.25)):
        predicted[:, 2] = share * probability
        figures = quality(predicted, observed)["is_optimal"]
        assert figures["calibration_error"] == pytest.approx(error, abs=0.02)
        assert figures["auroc"] == pytest.approx(5 / 6, abs=0.01)


def test_embedding_tells_polymers_apart_and_that_of_a_file_is_taken_by_name(
    embedding_file, tmp_path
):
    shuffled, _ = polymer_embedding(embedding_file)
    frame = pd.read_csv(embedding_file).set_index("name").loc[list(load_polymers().names)]
    np.save(tmp_path / "e.npy", frame.to_numpy())
    ordered, _ = polymer_embedding(tmp_path / "e.npy")
    np.testing.assert_allclose(shuffled, ordered, rtol=1e-5)
    pytest.importorskip("rdkit")
    embedding, _ = polymer_embedding(None)
    assert np.isfinite(embedding).all()
    assert len(np.unique(embedding.round(4), axis=0)) == 24
    assert embedding[0] @ embedding[1] > embedding[0] @ embedding[10]  # GelMA, GelMA; PEGDA


def test_embedding_file_that_lacks_something_is_refused(embedding_file, tmp_path):
    whole, path = pd.read_csv(embedding_file), tmp_path / "spoilt.csv"
    for spoilt, message in (
        (whole.iloc[:-1], "no row for "),
        (pd.concat([whole, whole.iloc[:1]]), "two rows for "),
        (whole.assign(e0=np.nan), "is not finite"),
        (whole.drop(columns="name"), "missing columns: name"),
    ):
        spoilt.to_csv(path, index=False)
        with pytest.raises(UsageError, match=rf"--polymer-embeddings {path}: .*{message}"):
            polymer_embedding(path)


def put(column: str, value, rows=slice(0, 1)):
    """A change of a table: the same value in some rows of a column."""

    def change(frame: pd.DataFrame) -> pd.DataFrame:
        frame[column] = frame[column].astype(object)
        frame.loc[frame.index[rows], column] = value
        return frame

    return change


def times(column: str, factor: float):
    return lambda frame: frame.assign(**{column: factor * frame[column]})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (put("polymer_name", "GelMA_rG0"), r"'GelMA_rG0' is unknown; nearest: GelMA_rGO"),
        (
            times("youngs_modulus_kpa", 1000.0),
            r"5 to 30 .*of 576; is it in another unit\? 0\.001",
        ),
        (times("lvef_pct", 0.01), r"lvef_pct: 0\.\d+; allowed: 15 to 55 .*\? 100 times the values"),
        (put("toxicity_risk", 1.5), r"row 1, toxicity_risk: 1\.5; allowed: 0 to 1"),
        (put("is_optimal", 0.5), r"row 1, is_optimal: 0\.5; allowed: 0, 1 or empty"),
        (put("thickness_mm", np.nan), r"row 1, thickness_mm: empty; only outcomes may be"),
        (put("edv_ml", "large"), r"row 1, edv_ml: 'large'; expected a number"),
        (put("fibrosis_risk", 0.1, slice(None)), r"fibrosis_risk is 0\.1 in every row; there is"),
        (put("delta_ef_pct", np.nan, slice(None)), r"delta_ef_pct is empty in every row"),
        (
            put("fibrosis_risk", np.nan, slice(48, None)),
            r"fibrosis_risk is empty for all patients",
        ),
        (lambda f: f.drop(columns="gls_pct"), r"missing columns: gls_pct; columns found: pat"),
        (lambda f: f.iloc[:0], r"no rows, only a header"),
        (put("gls_pct", -5.0), r"patient '.*' has 2 different sets of features; expected one"),
        (lambda f: f[: 4 * 48], r"the table has 4 patients; needed: 10, so that some can be held"),
    ],
)
def test_table_that_cannot_be_fitted_is_refused_before_anything_is_done(
    refuse, table, embedding_file, spoil, message
):
    assert re.search(message, refuse(spoil(table), "--polymer-embeddings", str(embedding_file)))


def test_flag_out_of_range_is_refused(refuse, table):
    for flags, message in (
        ("--num-members 0", "--num-members is 0; allowed: 1 or more"),
        ("--holdout-share 1.0", "--holdout-share is 1.0; allowed: above 0, below 1"),
        ("--pessimism -1", "--pessimism is -1.0; allowed: a finite number, at least 0"),
        ("--truth mechanical", "--truth: reward_model is 'mechanical'"),
        ("--polymer-embeddings no.csv", "--polymer-embeddings no.csv: no such file"),
    ):
        assert message in refuse(table, *flags.split())
