"""Run directories: whom they belong to, what is cleared away, and files written whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from hydrogel_gym import errors, runs
from hydrogel_gym.runs import directory

CHECKPOINT = "checkpoints/checkpoint-000004.pt"


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


@pytest.mark.parametrize(
    ("left", "options", "refused"),
    [
        ([], {}, ""),
        (["notes.txt"], {}, ""),
        (["metrics.csv"], {}, "already contains a run (metrics.csv); choose another directory or "),
        (["metrics.csv"], dict(overwrite=True), ""),
        (["metrics.csv"], dict(resume="auto"), ""),  # killed before its first checkpoint
        (["metrics.csv", CHECKPOINT], dict(resume="auto"), ""),
        (["metrics.csv", CHECKPOINT], {}, "continue it with --resume auto, choose another"),
        (["metrics.csv", CHECKPOINT], dict(resume=f"run/{CHECKPOINT}"), ""),
        (["metrics.csv", CHECKPOINT], dict(resume="run"), ""),
        (["metrics.csv", CHECKPOINT], dict(resume="other"), "continue it with --resume auto, cho"),
        (["summary.json"], dict(resume="auto"), "already contains a run (summary.json); choose an"),
    ],
)
def test_a_run_is_replaced_or_gone_on_with_only_as_requested(
    tmp_path, monkeypatch, left, options, refused
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "run", *left)
    options = runs.RunOptions(output_dir=Path("run"), **options)
    if refused:
        with pytest.raises(errors.UsageError) as raised:
            directory.choose_output_dir(options, "quick-s1")
        assert refused in str(raised.value)
        assert str(raised.value).endswith("or pass --overwrite")
    else:
        assert directory.choose_output_dir(options, "quick-s1") == Path("run")


def test_a_directory_is_named_by_preset_and_seed_or_by_sweep_and_run(monkeypatch):
    for variable in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        monkeypatch.delenv(variable, raising=False)
    options = runs.RunOptions()
    assert directory.choose_output_dir(options, "quick-s7") == Path("runs/quick-s7")
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    assert directory.choose_output_dir(options, "quick-s7") == Path("runs/sweep-s1/r1")


UNFINISHED = {".summary.json.abcd1234", "checkpoints/.checkpoint-000006.pt.abcd1234"}
OF_A_RUN = {"metrics.csv", "stage2_policy.pt", "wandb.json"}
OLD, NEW = "checkpoints/checkpoint-000002.pt", "checkpoints/checkpoint-000006.pt"


@pytest.mark.parametrize(
    ("options", "resumed_at", "cleared"),
    [
        (dict(overwrite=True), None, OF_A_RUN | {OLD, NEW}),
        (dict(resume="auto"), None, OF_A_RUN | {OLD, NEW}),
        (dict(resume="auto"), 6, set()),
        (dict(resume=f"run/{OLD}", overwrite=True), 2, {NEW}),
        (dict(resume="other", overwrite=True), 2, OF_A_RUN | {OLD, NEW}),
    ],
    ids=["replaced", "begun anew", "gone on with", "gone back in", "replaced by a branch"],
)
def test_what_is_replaced_or_was_never_finished_is_cleared_away(
    tmp_path, monkeypatch, options, resumed_at, cleared
):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    write(run, *UNFINISHED, *OF_A_RUN, OLD, NEW, ".gitignore")
    options = runs.RunOptions(output_dir=Path("run"), **options)
    directory.prepare_output_dir(Path("run"), options, resumed_at)
    left = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert left == (OF_A_RUN | {OLD, NEW, ".gitignore"}) - cleared


def test_going_back_in_a_run_needs_another_place_or_overwrite(
    ppo, finished_run, cut, of_runs, tmp_path, capsys
):
    flags = ["--resume", str(of_runs.checkpoint(cut.output_dir, 2))]
    assert ppo.main(flags) == 2
    printed = capsys.readouterr().err
    assert "contains newer ones, up to checkpoint-000004.pt; pass --overwrite" in printed
    for more in (["--output-dir", str(tmp_path / "cut" / "branch")], ["--overwrite"]):
        assert ppo.main([*flags, *more]) == 0
    for folder in (tmp_path / "cut" / "branch", cut.output_dir):
        of_runs.assert_same(folder, finished_run[0].output_dir)


def test_one_run_at_a_time_writes_to_a_directory_and_a_dead_one_keeps_nobody_out(tmp_path):
    run = tmp_path / "runs" / "one"
    with directory.only_writer(run):
        with pytest.raises(errors.UsageError, match="another run is writing there"):
            directory.only_writer(run).__enter__()
    assert list(tmp_path.iterdir()) == []  # nothing was written
    write(run, directory.LOCK_FILE)
    with directory.only_writer(run):
        assert (run / directory.LOCK_FILE).exists()
    assert not (run / directory.LOCK_FILE).exists()
    write(tmp_path, "file")
    with pytest.raises(errors.UsageError, match="cannot be written to"):
        directory.prepare_output_dir(tmp_path / "file" / "run", runs.RunOptions(), None)
