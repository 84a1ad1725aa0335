"""What is missing or damaged in a run directory is no error: the page says what it lacks."""

from __future__ import annotations

import functools
import json
import shutil

import pytest

from hydrogel_gym.report.page import run_page
from hydrogel_gym.report.reading import read_metrics
from hydrogel_gym.runs.checkpoints import seal, unseal

ROWS = "iteration,global_step,x\n1,10,0.5\n2,20,\n3,30,0.7\n"


@pytest.mark.parametrize(
    ("text", "rows", "sentence"),
    {
        "whole": (ROWS, 3, None),
        "empty": ("", 0, "it is empty"),
        "binary": ("\xff\0", 0, "cannot be read"),
        "other columns": ("a,b\n1,2\n", 0, "lacks the columns iteration and global_step"),
        "column twice": (ROWS.replace("x", "x,x", 1), 0, "two of its columns have one name"),
        "cut off": (ROWS[:-1], 2, "metrics.csv is cut off or damaged after row 2."),
        "no number": (ROWS.replace("2,20", "2,oops"), 1, "damaged after row 1."),
        "too long": (ROWS.replace("2,20", "2,20,20"), 1, "damaged after row 1."),
        "blank iteration": (ROWS.replace("1,10", ",10"), 0, "damaged after row 0."),
        "repeated": (ROWS + ROWS.partition("\n")[2], 3, "damaged after row 3."),
    }.values(),
)
def test_metrics_are_read_up_to_the_first_row_that_is_not_whole(tmp_path, text, rows, sentence):
    path, gaps = tmp_path / "metrics.csv", []
    path.write_text(text, encoding="latin-1")
    table = read_metrics(path, gaps)
    assert list(table.get("iteration", ())) == [1.0, 2.0, 3.0][:rows]
    assert gaps == [] if sentence is None else sentence in gaps[0]


def remove(*names):
    def harm(run, edit_json):
        for name in names:
            shutil.rmtree(run / name) if name == "checkpoints" else (run / name).unlink()

    return harm


def edit(file, **changes):
    return lambda run, edit_json: edit_json(run / file, **changes)


def newest_checkpoint_cut_off(run, edit_json):
    (run / "summary.json").unlink()
    (run / "checkpoints" / "checkpoint-000006.pt").write_bytes(b"cut off")


def checkpoint_of_another_architecture(run, edit_json):
    (run / "stage2_policy.pt").unlink()
    path = max((run / "checkpoints").iterdir())
    path.write_bytes(seal(unseal(path.read_bytes()) | {"architecture": {"width": 16}}))


def other_patients(run, edit_json, *, checkpoints=True):
    config = json.loads((run / "config.json").read_text())
    edit_json(run / "config.json", cohort=config["holdout_cohort"])
    if not checkpoints:
        shutil.rmtree(run / "checkpoints")


other_patients_alone = functools.partial(other_patients, checkpoints=False)


USELESS = dict(mean_reward="much", iterations="6", polymer_share={"HA_ECM": "all"}, versions=3)


@pytest.mark.parametrize(
    ("harm", "sentence", "shows_patients"),
    [
        (remove("summary.json"), "still running, or was killed after 6 of 6 iterations", True),
        (newest_checkpoint_cut_off, "iteration 4 (checkpoints/checkpoint-000004.pt)", True),
        (edit("summary.json", iterations=2), "of iteration 2, and the run went on", True),
        (edit("summary.json", interrupted=True), "was interrupted after 6 of 6 iterations.", True),
        (lambda run, _: (run / "summary.json").write_text("{"), "summary.json cannot be", True),
        (edit("summary.json", **USELESS), "reward, polymer_share, iterations, versions.", True),
        (
            edit("config.json", reward_precision="fp32", evaluate=None),
            "by patient is left out",
            True,
        ),
        (edit("config.json", horizon=[1], env_id=7), "no usable value of env_id, horizon.", True),
        (remove("config.json"), "configuration shown is the one kept in stage2_policy.pt", True),
        (remove("metrics.csv"), "metrics.csv is missing", True),
        (remove("stage2_policy.pt"), "The designs are those of the policy at iteration 6", True),
        (checkpoint_of_another_architecture, "The checkpoint is of another version: ", False),
        (remove("stage2_policy.pt", "checkpoints"), "There is no checkpoint either", False),
        (edit("config.json", cohort="/gone/mine.csv"), "/gone/mine.csv: cannot be read", False),
        (edit("config.json", env_id="Mine-v0"), "Mine-v0 cannot evaluate them", False),
        (other_patients, "contains other patients than the run was trained on", False),
        (other_patients_alone, "contains other patients than the run", False),
    ],
)
def test_harmed_run_directory_gives_a_partial_report_that_says_so(
    copy, content, edit_json, harm, sentence, shows_patients
):
    harm(copy, edit_json)
    shown = content(copy)
    assert [gap for gap in shown["gaps"] if sentence in gap], shown["gaps"]
    assert (shown["patients"] is not None) == shows_patients
    assert shown["sections"]


def test_page_lists_what_is_missing_at_its_top(copy, read_run):
    remove("stage2_policy.pt", "checkpoints", "metrics.csv")(copy, None)
    page = run_page(read_run(copy)).decode()
    box = page[page.index("This report is partial:") : page.index('<div class="about">')]
    assert box.count("<li>") == 3
    assert 'id="patient-data"' not in page
