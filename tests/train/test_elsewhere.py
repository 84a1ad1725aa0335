"""What becomes of a policy when the files that it was trained on are elsewhere, or others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from hydrogel_gym.designs import load_designs
from hydrogel_gym.models.ensemble import save_stage1
from hydrogel_gym.train import (
    evaluate,
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
def test_designs_are_for_the_patients_of_training_unless_others_are_named(
    main, flags, own, capsys, tmp_path
):
    words = ["--policy", str(own), "--patient", "P0000", *flags]
    assert main(words) == 0
    assert "note" not in capsys.readouterr().err
    shutil.copy("c.csv", tmp_path / "A" / "c.csv")
    assert main(words) == 2
    assert "patients changed since the policy was trained" in capsys.readouterr().err
    assert main([*words, "--cohort", "c.csv", "--output-dir", "others"]) == 0
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
            (evaluate.main, [str(run), "--no-oracle"]),
        ):
            patient = ["--patient", "P0001"] if "--policy" in flags else []
            assert main([*flags, *patient]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert "pass --reward-model" in error
            assert main([*flags, *patient, "--reward-model", moved]) == 0
            capsys.readouterr()
    finally:
        hidden.rename(model)


def test_figures_of_other_patients_or_models_lie_beside_each_other(own, tmp_path, make_stage1):
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
