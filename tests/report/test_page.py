"""The page of one run shows what its directory contains; it runs nobody's script."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch

from hydrogel_gym.report.page import about, run_page
from hydrogel_gym.report.patient_view import patient_data
from hydrogel_gym.report.reading import SavedRun
from hydrogel_gym.report.sections import beside_the_source, divergence_plots, prediction_section
from hydrogel_gym.runs.pictures import SOURCE_MEAN_REWARD
from hydrogel_gym.train import report

HOSTILE = "</script><script>alert(1)</script>"
FETCHING = {"src", "href", "data", "srcset", "poster"}


class Tags(HTMLParser):
    """Start tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def html(trained, read_run):
    return run_page(read_run(trained)).decode()


def test_page_has_all_that_a_finished_run_shows_the_same_each_time_and_fetches_nothing(
    trained, content, read_run, html, monkeypatch
):
    assert run_page(read_run(trained)).decode() == html
    monkeypatch.setattr("hydrogel_gym.report.patient_view.PATIENTS_SHOWN", 4)  # listed, not counted
    shown = content(trained)
    assert shown["gaps"] == []
    plots = [plot for section in shown["sections"] for plot in section.plots]
    assert len(shown["sections"]) == 8
    assert len({plot.name for plot in plots}) == len(plots) == 20
    for plot in plots:
        assert f'data-plot="{plot.name}"' in html
        assert plot.figure.layout.xaxis.title.text
    ids = shown["patients"].cohort.patient_ids
    assert len(ids) == len(shown["patients"].reward) == 12
    assert patient_data(shown["patients"])["ids"] == list(ids[::3])
    assert "Listed are 4 of the 12 patients" in shown["notes"][1]
    for tag, attributes in Tags(html).found:
        for name in FETCHING & attributes.keys():
            assert tag == "a" or attributes[name] == "data:,"
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_run_without_an_oracle_lacks_what_it_would_show_and_says_so(copy, content):
    table = pd.read_csv(copy / "metrics.csv")
    table = table.drop(columns=table.filter(regex="oracle|regret"))
    table.to_csv(copy / "metrics.csv", index=False)
    fraction, regret, by_patient = content(copy)["gaps"]
    assert fraction.startswith("Fraction of the oracle: not recorded")
    assert regret.startswith("Regret: not recorded")
    assert "regret by patient is left out" in by_patient


def test_the_patients_of_largest_predicted_regret_are_listed_beside_the_true_one(
    patients, trained, read_run
):
    summary = read_run(trained).summary
    section = prediction_section(patients, summary)
    expected, bound = patients.prediction
    first = int(expected.argmax())
    patient, _, *cells = section.tables[0].rows[0]
    assert patient == patients.cohort.patient_ids[first]
    assert cells == [f"{x[first]:.3f}" for x in (expected, bound, patients.regret)]
    assert len(section.tables[0].rows) == 10
    assert f"{summary['holdout_regret_rank_correlation']:.2f}," in section.texts[1]
    curves = {curve.name: curve.y for curve in section.plots[0].figure.data}
    assert list(curves) == ["bound", "predicted", "true"]
    assert curves["predicted"][-1] == pytest.approx(expected.max())
    unknown = prediction_section(patients._replace(best=None), {})
    assert len(unknown.texts) == 1
    assert unknown.tables[0].rows[0] == [patient, _, *cells[:2], "–"]
    assert prediction_section(patients._replace(prediction=None), summary) is None


def test_divergence_is_shown_with_its_median_largest_and_bound(trained, read_run):
    run = read_run(trained)
    kl, clipped = run.metrics["approx_kl"], run.metrics["clipfrac"]
    (plot,) = divergence_plots(run)
    assert f"median {kl.median():.3f}, largest {kl.max():.3f};" in plot.caption
    assert f"median {100 * clipped.median():.0f} %" in plot.caption
    assert "about 0.02 for each of the four parameters" in plot.caption
    assert [list(curve.y) for curve in plot.figure.data] == [list(kl), list(clipped)]
    run.metrics = run.metrics.drop(columns="approx_kl")
    assert divergence_plots(run) == []


def test_hostile_names_are_text(copy, read_run, edit_json, tmp_path, html):
    config = json.loads((copy / "config.json").read_text())
    table = pd.read_csv(config["cohort"])
    table.loc[3, "patient_id"] = HOSTILE
    table.to_csv(tmp_path / "mine.csv", index=False)
    shutil.rmtree(copy / "checkpoints")  # they would show that the patients are others
    policy = torch.load(copy / "stage2_policy.pt", weights_only=True)
    del policy["origin"]  # and so would this, of which earlier versions had none
    torch.save(policy, copy / "stage2_policy.pt")
    edit_json(copy / "config.json", cohort=str(tmp_path / "mine.csv"))
    page = run_page(read_run(copy.rename(tmp_path / "<img src=x onerror=alert(1)>"))).decode()
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    tags, expected = ([tag for tag, _ in Tags(text).found] for text in (page, html))
    assert tags.count("script") == expected.count("script")
    assert tags.count("img") == 0


def test_patients_and_outcome_model_are_named_for_every_run_and_not_guessed(trained, read_run):
    run, unknown = read_run(trained), SavedRun(trained)
    mine = SavedRun(trained, config={"cohort": None, "env_id": "Mine-v0"})
    fitted = {"env_id": "HydrogelDesign-v0", "reward_model": "mine.pt"}
    own, model = about([run])
    assert str(run.config["cohort"]) in own
    assert "synthetic" not in own
    assert "Nothing here is clinical advice." in model
    assert "synthetic" in about([mine])[0]
    for runs, named in (
        ([unknown], "is predicted by an outcome model that is not named"),
        ([run, mine], "the outcome model of Mine-v0"),
        ([run, mine], "the built-in outcome model"),
        ([SavedRun(trained, config=fitted)], "the outcome model mine.pt, whose mistakes"),
    ):
        assert named in about(runs)[-1]
        assert ("built-in" in about(runs)[-1]) == (run in runs)


def test_table_beside_the_source_says_what_was_not_reached(trained, read_run):
    run = read_run(trained)
    table = beside_the_source(run)
    first = run.metrics["mean_reward"].iloc[0]
    assert table.rows[0] == ["0", "0 M", "12.4", f"{first:.1f}", "–", "–"]
    assert table.rows[1] == ["20", "4 M", f"{SOURCE_MEAN_REWARD[20]:.1f}", *["not reached"] * 3]
    long = SavedRun(run.path, metrics=run.metrics.assign(global_step=5e6))
    assert beside_the_source(long).rows[1][3] == f"{first:.1f}"


# The command line


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: [str(run / "absent")], "absent is not a directory"),
        (lambda run: [str(run.parent)], "contains nothing of a run"),
        (lambda run: [str(run), f"{run}/."], "is named twice"),
        (lambda run: [str(run), "--output", str(run / "no" / "x.html")], "cannot be written"),
        (lambda run: [str(run), "--nonsense"], "nonsense"),
        (lambda run: [], "at least one"),
    ],
    ids=["absent", "empty", "twice", "output", "flag", "none"],
)
def test_bad_command_line_is_one_line_and_writes_nothing(copy, monkeypatch, capsys, make, message):
    monkeypatch.setattr(report, "run_page", lambda run: b"")
    before = sorted(copy.rglob("*"))
    assert report.main(make(copy)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert printed.count("\n") == 1
    assert sorted(copy.rglob("*")) == before


def test_pages_are_written_into_the_run_and_beside_several(copy, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(report, "run_page", lambda run: b"one")
    monkeypatch.setattr(report, "comparison_page", lambda runs: b"several")
    shutil.copytree(copy, tmp_path / "other")
    monkeypatch.chdir(copy)
    for flags, path, page in (
        (["."], copy / "report.html", b"one"),
        ([".", "../other"], tmp_path / "comparison.html", b"several"),
        ([".", "--output", "mine.html"], copy / "mine.html", b"one"),
    ):
        assert report.main(flags) == 0
        assert path.read_bytes() == page
        assert "written to" in capsys.readouterr().out
