"""What becomes of a policy when the files that it was trained on are elsewhere, or others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from hydrogel_gym.designs import load_designs
from hydrogel_gym.train import (
    evaluate,
    fit_stage1,
    generate_candidates,
    rank_designs,
    refine_patients,
)

CANDIDATES = ["--num-candidates", "300", "--top-k", "5"]
REFINED = ["--num-iterations", "1", "--num-copies", "2", "--top-k", "5"]
DESIGNERS = pytest.mark.parametrize(
    ("main", "flags"),
    [(generate_candidates.main, CANDIDATES), (refine_patients.main, REFINED)],
    ids=["candidates", "refinement"],
)


@pytest.fixture
def own(ppo, small_run, tmp_path, monkeypatch, without_pictures):
    """A run on `c.csv` of the folder `A`; the working directory is `B`, with another `c.csv`."""
    shipped = small_run(tmp_path).cohort
    patients = pd.read_csv(shipped, dtype=str)
    for name, rows in (("A", slice(8)), ("B", slice(8, 16))):
        folder = tmp_path / name
        folder.mkdir()
        table = patients.iloc[rows].assign(patient_id=patients["patient_id"][:8].to_list())
        table.to_csv(folder / "c.csv", index=False)
    monkeypatch.chdir(tmp_path / "A")
    flags = "--preset quick --num-iterations 1 --num-envs 8 --minibatch-size 8 --no-oracle"
    flags += " --hidden-dim 16 --checkpoint-interval 0 --cohort c.csv --output-dir run"
    assert ppo.main([*flags.split(), "--holdout-cohort", str(shipped)]) == 0
    monkeypatch.chdir(tmp_path / "B")
    return tmp_path / "A" / "run"


@DESIGNERS
def test_designs_are_for_the_patients_of_training_wherever_one_is(main, flags, own, capsys):
    assert main(["--policy", str(own), "--patient", "P0000", *flags]) == 0
    assert "note" not in capsys.readouterr().err


@DESIGNERS
def test_patients_that_changed_are_refused_unless_they_are_named(
    main, flags, own, capsys, tmp_path
):
    shutil.copy("c.csv", tmp_path / "A" / "c.csv")
    words = ["--policy", str(own), "--patient", "P0000", *flags]
    assert main(words) == 2
    assert "patients changed since the policy was trained" in capsys.readouterr().err
    assert main([*words, "--cohort", "c.csv"]) == 0
    assert "note: other patients than the policy was trained on" in capsys.readouterr().err
    (tmp_path / "A" / "c.csv").unlink()
    assert main(words) == 2
    assert capsys.readouterr().err.endswith("pass --cohort to say where it is\n")


def test_model_that_moved_is_found_by_its_flag(fitted_run, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(fitted_run[0].output_dir, tmp_path / "run")
    model = Path(fitted_run[0].output_dir).parent / "stage1.pt"
    moved = str(shutil.copy(model, tmp_path / "moved.pt"))
    hidden = model.rename(model.with_name("hidden.pt"))
    monkeypatch.chdir(tmp_path)
    try:
        for main, flags in (
            (generate_candidates.main, ["--policy", str(run), *CANDIDATES]),
            (refine_patients.main, ["--policy", str(run), *REFINED]),
            (rank_designs.main, [str(run / "designs")]),
        ):
            patient = [] if main is rank_designs.main else ["--patient", "P0001"]
            assert main([*flags, *patient]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert "there is no such file; the policy was trained on it: pass --rew" in error
            assert main([*flags, *patient, "--reward-model", moved]) == 0
            capsys.readouterr()
    finally:
        hidden.rename(model)


def test_figures_of_other_patients_or_models_lie_beside_each_other(own, tmp_path, make_stage1):
    from hydrogel_gym.models.ensemble import save_stage1

    shutil.copy("c.csv", "shipped.csv")
    for folder in ("A", "B"):
        save_stage1(tmp_path / folder / "m.pt", make_stage1(ord(folder)), {})
    requests = [["--cohort", str(tmp_path / folder / "c.csv")] for folder in ("A", "B")]
    requests.append(["--cohort", "shipped.csv", "--reward-model", str(tmp_path / "A" / "m.pt")])
    requests.append(["--cohort", "shipped.csv", "--reward-model", str(tmp_path / "B" / "m.pt")])
    for words in requests:
        assert evaluate.main([str(own), "--no-oracle", *words]) == 0
    files = sorted(own.glob("evaluation-*.json"))
    assert len(files) == 4
    known = [json.loads(file.read_text())["trained_on_these_patients"] for file in files]
    assert sorted(known) == [False, False, False, True]


def test_identifiers_are_text_in_files_and_folders_whatever_they_look_like(own, capsys):
    ids = ["7", "007", "12", "0012", "_a", ".b", "M/\u00fc 1", "x" * 250]
    pd.read_csv("c.csv", dtype=str).assign(patient_id=ids).to_csv("ids.csv", index=False)
    words = ["--policy", str(own), "--cohort", "ids.csv", "--output-dir", "d", *CANDIDATES]
    assert generate_candidates.main(words) == 0
    assert generate_candidates.main(words) == 0  # goes on, where nothing is left
    designs = load_designs("d")
    assert sorted(designs["patient_id"].unique()) == sorted(ids)
    for table in ("top", "candidates"):
        read = pd.read_parquet(f"d/{table}", filters=[("patient_id", "==", "007")])
        assert read["patient_id"].unique().tolist() == ["007"]
        assert len(pd.read_parquet(f"d/{table}")["patient_id"].unique()) == len(ids)
    assert rank_designs.main(["d", "--policy", str(own), "--cohort", "ids.csv"]) == 0
    ranked = pd.read_csv("d/ranked_designs.csv", dtype={"patient_id": str})
    assert set(ranked["patient_id"]) == set(ids)


@DESIGNERS
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--seed", "-3"], "--seed is -3; allowed: 0 or more"),
        (["--top-k", "999999999999"], "--top-k is 999999999999; allowed: 1 to 1,000,000"),
        (["--output-dir", "c.csv"], "--output-dir c.csv cannot be written to: File exists"),
    ],
)
def test_requests_that_cannot_be_met_are_refused_in_one_line(
    main, flags, wrong, message, own, capsys
):
    assert main(["--policy", str(own), "--patient", "P0000", *flags, *wrong]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_loop_of_links_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    from hydrogel_gym.train import report

    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    for main in (rank_designs.main, report.main):
        assert main(["loop"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_fit_that_was_killed_can_be_run_again(tmp_path, capsys):
    (tmp_path / "stage1.pt").write_bytes(b"of a fit that was killed")
    assert fit_stage1.main(["none.csv", "--output-dir", str(tmp_path)]) == 2
    assert "none.csv" in capsys.readouterr().err  # got as far as the table
    (tmp_path / "metrics.json").write_text("{}")
    assert fit_stage1.main(["none.csv", "--output-dir", str(tmp_path)]) == 2
    assert "metrics.json exists; pass --overwrite" in capsys.readouterr().err
