"""The report shows what a run directory contains, and what it lacks; it runs nobody's script."""

from __future__ import annotations

import base64
import json
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from hydrogel_gym import Outcomes, RewardConfig, compute_reward, load_reward_model
from hydrogel_gym.problem.fields import COVERAGES, FORMULATION_FIELDS
from hydrogel_gym.problem.polymers import NUM_POLYMERS
from hydrogel_gym.report.analysis import SLICE_POINTS, design_patients, slices_of
from hydrogel_gym.report.comparison import Group, comparison_page, overlay
from hydrogel_gym.report.page import about, run_page
from hydrogel_gym.report.patient_view import patient_columns, patient_data
from hydrogel_gym.report.plots import BLUE, log_regret, new_figure, tertile_map
from hydrogel_gym.report.reading import SavedRun
from hydrogel_gym.report.reading import read_run as read_run_with
from hydrogel_gym.report.sections import beside_the_source, safety_section
from hydrogel_gym.runs.checkpoints import seal, unseal
from hydrogel_gym.train import ppo_hybrid, report

HOSTILE = "</script><script>alert(1)</script>"
FETCHING = {"src", "href", "data", "srcset", "poster"}


def read_run(path):
    return read_run_with(path, ppo_hybrid.Agent)


@pytest.fixture(scope="module")
def trained(small_run, tmp_path_factory):
    """A finished run on forty patients, without an oracle."""
    folder = tmp_path_factory.mktemp("runs")
    args = small_run(folder / "tiny")
    ppo_hybrid.train(args)
    return args.output_dir


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the run to do harm to."""
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.fixture(scope="module")
def run(trained):
    return read_run(trained)


@pytest.fixture(scope="module")
def patients(run):
    return design_patients(run)


@pytest.fixture(scope="module")
def html(trained):
    return run_page(read_run(trained)).decode()


@pytest.fixture
def content(monkeypatch):
    """What a page would show, without filling the template."""

    def of(path):
        with monkeypatch.context() as patch:
            patch.setattr("hydrogel_gym.report.page.render", lambda **content: content)
            return run_page(read_run(path))

    return of


class Tags(HTMLParser):
    """Start tags of a page, with the style and script texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.found)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_page_has_a_section_for_everything_that_a_finished_run_shows(trained, content):
    shown = content(trained)
    assert [section.title for section in shown["sections"]] == [
        "What was run",
        "Learning",
        "Reward terms over time",
        "Polymer selection",
        "Formulations",
        "Safety margins",
    ]
    names = [plot.name for section in shown["sections"] for plot in section.plots]
    assert len(names) == len(set(names)) == 15
    assert len(shown["patients"].cohort) == 40


def test_run_without_an_oracle_lacks_what_it_would_show_and_says_so(trained, content):
    gaps = content(trained)["gaps"]
    assert len(gaps) == 3
    assert gaps[0].startswith("Fraction of the oracle: not recorded")
    assert gaps[1].startswith("Regret: not recorded")
    assert "regret by patient is left out" in gaps[2]


def test_page_fetches_nothing(html):
    loading = [
        value
        for tag, attributes in Tags(html).found
        for name, value in attributes.items()
        if name in FETCHING and tag != "a" and value != "data:,"
    ]
    assert loading == []
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_page_can_be_read_aloud_and_on_a_phone(html):
    tags = Tags(html)
    attributes = {tag: attrs for tag, attrs in tags.found if tag in ("html", "svg")}
    assert attributes["html"]["lang"] == "en"
    assert attributes["svg"]["role"] == "img"
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "<title>Run tiny – hydrogel_gym</title>" in html
    # No level of heading is skipped.
    levels = [int(tag[1]) for tag, _ in tags.found if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert max(np.diff(levels)) == 1
    plots = [attrs for _, attrs in tags.found if "data-plot" in attrs]
    assert all(attrs["aria-label"] and attrs["role"] == "img" for attrs in plots)


def test_every_plot_names_its_axes_and_has_its_place(trained, content, html):
    for section in content(trained)["sections"]:
        for plot in section.plots:
            assert f'data-plot="{plot.name}"' in html
            assert plot.figure.layout.xaxis.title.text
            is_of_polymers = section.name == "polymers"
            assert is_of_polymers or plot.figure.layout.yaxis.title.text


def test_hostile_names_are_text(trained, copy, content, tmp_path, html):
    config = json.loads((copy / "config.json").read_text())
    table = pd.read_csv(config["cohort"])
    table.loc[3, "patient_id"] = HOSTILE
    table.to_csv(tmp_path / "mine.csv", index=False)
    shutil.rmtree(copy / "checkpoints")  # they would show that the patients are others
    edit_json(copy / "config.json", cohort=str(tmp_path / "mine.csv"), env_id="HydrogelDesign-v0")
    hostile = copy.rename(tmp_path / "<img src=x onerror=alert(1)>")
    page = run_page(read_run(hostile)).decode()
    assert content(hostile)["patients"].cohort.patient_ids[3] == HOSTILE
    assert HOSTILE not in page
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert Tags(page).count("script") == Tags(html).count("script")
    assert Tags(page).count("img") == 0


def test_cohort_of_the_user_is_not_called_synthetic(run, trained):
    own, model = about([run])
    assert str(run.config["cohort"]) in own
    assert "synthetic" not in own
    assert "Nothing here is clinical advice." in model
    shipped = SavedRun(trained, config={"cohort": None, "env_id": "Mine-v0"})
    synthetic, model = about([shipped])
    assert "synthetic" in synthetic
    assert "the outcome model of Mine-v0" in model


def test_outcome_model_is_named_for_every_run_and_not_guessed(run, trained):
    mine = SavedRun(trained, config={"env_id": "Mine-v0"})
    unknown = SavedRun(trained)
    assert "is predicted by an outcome model that is not named" in about([unknown])[-1]
    both = about([run, mine])[-1]
    assert "the outcome model of Mine-v0" in both
    assert "the built-in outcome model" in both
    config = {"env_id": "HydrogelDesign-v0", "reward_model": "mine.pt"}
    fitted = SavedRun(trained, config=config)
    model = about([fitted])[-1]
    assert "the outcome model mine.pt, whose mistakes" in model
    assert "built-in" not in model


def test_ticks_of_regret_are_whole_numbers():
    figure = new_figure("x", "y")
    log_regret(figure)
    axis = figure.layout.yaxis
    assert dict(zip(axis.tickvals, axis.ticktext, strict=True))[20.0] == "20"


def test_slice_through_the_chosen_polymer_and_coverage_is_the_design_itself(patients):
    everyone = np.arange(len(patients.reward))
    along = SLICE_POINTS * len(FORMULATION_FIELDS)
    for columns in (patients.polymer_id, NUM_POLYMERS + patients.coverage):
        reward = patients.slices.reward[everyone, along + columns]
        np.testing.assert_allclose(reward, patients.reward, atol=1e-4)
        unsafe = patients.slices.is_unsafe[everyone, along + columns]
        broken = np.stack(list(patients.margins.values())) < 0
        np.testing.assert_array_equal(unsafe, broken.any(0))
    assert patients.slices.reward.shape[1] == along + NUM_POLYMERS + len(COVERAGES)


@pytest.mark.parametrize("parameter", range(len(FORMULATION_FIELDS)))
def test_slice_along_a_parameter_is_the_reward_of_designs_that_differ_in_it(patients, parameter):
    point, item = 7, FORMULATION_FIELDS[parameter]
    formulation = torch.tensor(patients.formulation)
    share = point / (SLICE_POINTS - 1)
    formulation[:, parameter] = item.low + share * (item.high - item.low)
    outcomes = load_reward_model("mechanistic")(
        patients.cohort.features.float(),
        torch.tensor(patients.polymer_id),
        formulation,
        torch.tensor(patients.coverage),
    )
    expected = compute_reward(outcomes)
    found = patients.slices.reward[:, parameter * SLICE_POINTS + point]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_slices_do_not_depend_on_how_many_patients_are_taken_at_once(patients):
    problem = SimpleNamespace(
        params=SimpleNamespace(
            patients=patients.cohort.features.float(), reward_config=RewardConfig()
        ),
        reward_model=load_reward_model("mechanistic"),
    )
    design = {
        name: torch.tensor(getattr(patients, name))
        for name in ("polymer_id", "formulation", "coverage")
    }
    slices = slices_of(problem, design, at_once=7)
    np.testing.assert_allclose(slices.reward, patients.slices.reward, atol=1e-5)
    np.testing.assert_array_equal(slices.is_unsafe, patients.slices.is_unsafe)


def test_page_carries_the_slices_to_the_hundredth(patients):
    data = patient_data(patients)
    assert data["step"] == 0.01
    shape = patients.slices.reward.shape
    rewards = np.frombuffer(base64.b64decode(data["slices"]), "<i2").reshape(shape) * data["step"]
    np.testing.assert_allclose(rewards, patients.slices.reward, atol=0.0051)
    bits = np.frombuffer(base64.b64decode(data["unsafe"]), "u1").reshape(len(rewards), -1)
    unsafe = np.unpackbits(bits, axis=1)[:, : shape[1]]
    np.testing.assert_array_equal(unsafe, patients.slices.is_unsafe)


def test_slices_of_huge_rewards_and_of_none_fit_their_sixteen_bits(patients):
    reward = patients.slices.reward * 100.0
    reward[0, 0] = np.nan
    data = patient_data(patients._replace(slices=patients.slices._replace(reward=reward)))
    read = np.frombuffer(base64.b64decode(data["slices"]), "<i2").reshape(reward.shape)
    assert read[0, 0] == -32768
    others = np.s_[1:]
    np.testing.assert_allclose(
        read[others] * data["step"], reward[others], atol=0.51 * data["step"]
    )


def test_margins_are_distances_to_the_limits_on_the_safe_side(patients):
    outcomes = {
        "toxicity_risk": np.array([0.10, 0.15, 0.25], np.float32),
        "structural_integrity": np.array([0.90, 0.80, 0.75], np.float32),
        "fibrosis_risk": np.array([0.20, 0.21, 0.0], np.float32),
    }
    margins = patients._replace(predicted=patients.predicted | outcomes).margins
    np.testing.assert_allclose(margins["toxicity"], [0.05, 0.0, -0.10], atol=1e-6)
    np.testing.assert_allclose(margins["integrity"], [0.10, 0.0, -0.05], atol=1e-6)
    np.testing.assert_allclose(margins["fibrosis"], [0.0, -0.01, 0.20], atol=1e-6)
    # At a limit, none is broken, whatever the limit is rounded to.
    assert [(m < 0).tolist() for m in margins.values()] == [
        [False, False, True],
        [False, False, True],
        [False, True, False],
    ]


def test_tertiles_count_every_patient_once():
    values = np.arange(9.0)
    polymer_id = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1])
    (heat,) = tertile_map(values, polymer_id, "axis").data
    assert heat.y == ("GelMA_3pct", "GelMA_5pct")
    np.testing.assert_allclose(heat.z, [[100, 100 / 3, 0], [0, 200 / 3, 100]])


def test_best_possible_reward_from_the_folder_of_the_oracle_gives_regret(
    run, patients, monkeypatch, content, trained
):
    folders = []

    def cached(cohort, model, config, cache_dir):
        folders.append(cache_dir)
        return SimpleNamespace(score=torch.tensor(patients.reward) + 0.5)

    monkeypatch.setattr("hydrogel_gym.report.analysis.cached_best_designs", cached)
    shown = content(trained)
    assert folders == [trained.resolve().parent / "oracle"]
    np.testing.assert_allclose(shown["patients"].regret, 0.5)
    assert shown["sections"][-1].name == "regret"
    assert "best" in patient_data(shown["patients"])["columns"]
    headings = [heading for heading, *_ in patient_columns(shown["patients"])]
    assert "regret" in headings


def test_table_beside_the_source_says_what_was_not_reached(run):
    table = beside_the_source(run)
    first = run.metrics["mean_reward"].iloc[0]
    assert table.rows[0] == ["0", "0 M", "12.4", f"{first:.1f}", "–", "–"]
    assert table.rows[1][3:] == ["not reached"] * 3
    long = SavedRun(run.path, metrics=run.metrics.assign(global_step=5e6))
    assert beside_the_source(long).rows[1][3] == f"{first:.1f}"


def test_large_cohort_is_listed_in_part_and_shown_as_a_whole(trained, content, monkeypatch):
    monkeypatch.setattr("hydrogel_gym.report.patient_view.PATIENTS_SHOWN", 8)
    shown = content(trained)
    ids = shown["patients"].cohort.patient_ids
    assert patient_data(shown["patients"])["ids"] == list(ids[::5])
    assert "Listed are 8 of the 40 patients" in shown["notes"][1]
    assert len(shown["patients"].reward) == 40


def remove(name):
    return lambda run: (run / name).unlink()


def checkpoint_of_another_architecture(run):
    (run / "stage2_policy.pt").unlink()
    path = max((run / "checkpoints").iterdir())
    content = unseal(path.read_bytes())
    path.write_bytes(seal(content | {"architecture": {"width": 16}}))


def remove_policy_and_checkpoints(run):
    (run / "stage2_policy.pt").unlink()
    shutil.rmtree(run / "checkpoints")


def without_summary(run):
    (run / "summary.json").unlink()
    (run / "checkpoints" / "checkpoint-000006.pt").write_bytes(b"cut off")


def cut_metrics(run):
    text = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(text[:-3])


def damage_metrics(run):
    lines = (run / "metrics.csv").read_text().splitlines()
    lines[3] = lines[3].replace(",", ",oops", 1)
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")


def blank_iteration(run):
    lines = (run / "metrics.csv").read_text().splitlines()
    lines[2] = lines[2][lines[2].index(",") :]
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")


def repeat_metrics(run):
    header, *lines = (run / "metrics.csv").read_text().splitlines()
    (run / "metrics.csv").write_text("\n".join([header, *lines, *lines]) + "\n")


def useless_summary(run):
    useless = {"mean_reward": "much", "iterations": "6", "polymer_share": {"HA_ECM": "all"}}
    edit_json(run / "summary.json", **useless, versions=3)


def useless_config(run):
    edit_json(run / "config.json", num_iterations="six", horizon=[1], env_id=7)


def go_on(run):
    """As a run that was interrupted after two iterations and is being continued."""
    edit_json(run / "summary.json", iterations=2, interrupted=True)


def other_patients(run):
    config = json.loads((run / "config.json").read_text())
    edit_json(run / "config.json", cohort=config["holdout_cohort"])


def same_patients_other_outcomes(run):
    other_patients(run)
    shutil.rmtree(run / "checkpoints")


@pytest.mark.parametrize(
    ("harm", "sentence", "shows_patients"),
    [
        (remove("summary.json"), "still running, or was killed after 6 of 6 iterations", True),
        (without_summary, "policy at iteration 4 (checkpoints/checkpoint-000004.pt)", True),
        (go_on, "summary.json is of iteration 2, and the run went on", True),
        (
            lambda run: edit_json(run / "summary.json", interrupted=True),
            "The run was interrupted after 6 of 6 iterations.",
            True,
        ),
        (
            lambda run: (run / "summary.json").write_text("{"),
            "summary.json cannot be read",
            True,
        ),
        (remove("metrics.csv"), "metrics.csv is missing", True),
        (lambda run: (run / "metrics.csv").write_text(""), "it is empty", True),
        (lambda run: (run / "metrics.csv").write_bytes(b"\xff\0"), "cannot be read", True),
        (lambda run: (run / "metrics.csv").write_text("a,b\n1,2\n"), "lacks the columns", True),
        (cut_metrics, "metrics.csv is cut off or damaged after row 5.", True),
        (damage_metrics, "metrics.csv is cut off or damaged after row 2.", True),
        (blank_iteration, "metrics.csv is cut off or damaged after row 1.", True),
        (repeat_metrics, "metrics.csv is cut off or damaged after row 6.", True),
        (
            useless_summary,
            "summary.json has no usable value of mean_reward, polymer_share, iterations, versions.",
            True,
        ),
        (
            useless_config,
            "config.json has no usable value of env_id, horizon, num_iterations.",
            True,
        ),
        (remove("stage2_policy.pt"), "The designs are those of the policy at iteration 6", True),
        (checkpoint_of_another_architecture, "The checkpoint is of another version: ", False),
        (remove_policy_and_checkpoints, "There is no checkpoint either", False),
        (
            remove("config.json"),
            "The configuration shown is the one kept in stage2_policy.pt",
            True,
        ),
        (
            lambda run: edit_json(run / "config.json", cohort="/gone/mine.csv"),
            "Nothing is shown of patients: /gone/mine.csv: cannot be read",
            False,
        ),
        (other_patients, "contains other patients than the run was trained on", False),
        (same_patients_other_outcomes, "patients, outcome model or package are others", False),
        (
            lambda run: edit_json(run / "config.json", env_id="Mine-v0"),
            "Nothing is shown of patients: Mine-v0 cannot evaluate them",
            False,
        ),
    ],
    ids=lambda value: None if isinstance(value, bool) else getattr(value, "__name__", None),
)
def test_harmed_run_directory_gives_a_partial_report_that_says_so(
    copy, content, harm, sentence, shows_patients
):
    harm(copy)
    shown = content(copy)
    assert [gap for gap in shown["gaps"] if sentence in gap], shown["gaps"]
    assert (shown["patients"] is not None) == shows_patients
    assert shown["sections"]


def test_page_lists_in_one_box_what_is_missing(copy):
    remove_policy_and_checkpoints(copy)
    (copy / "metrics.csv").unlink()
    page = run_page(read_run(copy)).decode()
    box = page[page.index("This report is partial:") : page.index('<div class="about">')]
    assert box.count("<li>") == 3
    assert "metrics.csv is missing, so that there are no learning curves." in box
    assert 'id="patient-data"' not in page


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
    assert report.main(["."]) == 0
    assert (copy / "report.html").read_bytes() == b"one"
    assert report.main([".", "../other"]) == 0
    assert (tmp_path / "comparison.html").read_bytes() == b"several"
    assert report.main([".", "--output", "mine.html"]) == 0
    assert (copy / "mine.html").exists()
    assert "written to" in capsys.readouterr().out


@pytest.fixture
def several(trained, tmp_path):
    """Three runs that differ by the seed, and one of another width."""
    runs = []
    for seed, reward in ((1, 20.0), (2, 23.0), (3, 21.5), (1, 10.0)):
        path = shutil.copytree(trained, tmp_path / f"run-{len(runs)}")
        width = 16 if len(runs) < 3 else 32
        edit_json(path / "config.json", seed=seed, output_dir=str(path), hidden_dim=width)
        edit_json(path / "summary.json", mean_reward=reward)
        runs.append(path)
    return runs


def compared(paths, monkeypatch):
    monkeypatch.setattr("hydrogel_gym.report.comparison.render", lambda **content: content)
    return comparison_page([read_run(path) for path in paths])


def test_comparison_tabulates_mean_and_deviation_over_the_seeds_of_a_group(several, monkeypatch):
    shown = compared(several, monkeypatch)
    figures, runs, differing = shown["sections"][0].tables
    assert figures.header == ["figure", "hidden_dim 16 (n = 3)", "hidden_dim 32 (n = 1)"]
    deviation = np.std([20.0, 23.0, 21.5], ddof=1)
    name = "mean reward, sampled designs, training patients"
    assert figures.rows[0] == [name, f"21.50 ± {deviation:.2f}", "10.00"]
    assert [row[0] for row in runs.rows] == [path.name for path in several]
    assert differing.rows == [["hidden_dim", "16", "32"]]
    assert shown["patients"] is None
    assert "single run" in shown["about"][-1]


def test_comparison_marks_unfinished_runs_and_leaves_them_out_of_the_figures(several, monkeypatch):
    (several[1] / "summary.json").unlink()
    edit_json(several[2] / "summary.json", interrupted=True)
    shown = compared(several, monkeypatch)
    figures, runs, _ = shown["sections"][0].tables
    assert figures.header[1] == "hidden_dim 16 (n = 1)"
    assert figures.rows[0][1] == "20.00"
    assert [row[3] for row in runs.rows] == ["finished", "unfinished", "unfinished", "finished"]
    assert "Unfinished, in the curves only: run-1, run-2." in shown["sections"][0].texts
    assert any(gap.startswith("run-1: summary.json is missing") for gap in shown["gaps"])
    assert not any("designs are those" in gap for gap in shown["gaps"])  # none is shown


def test_comparison_draws_every_run_thin_and_the_mean_thick(several, monkeypatch):
    metrics = pd.read_csv(several[1] / "metrics.csv")
    metrics["mean_reward"] += 3.0
    metrics.iloc[:4].to_csv(several[1] / "metrics.csv", index=False)
    shown = compared(several[:2], monkeypatch)
    figure = shown["sections"][1].plots[0].figure
    one, other, mean, source = figure.data
    assert (one.line.width, other.line.width, mean.line.width) == (1, 1, 3)
    np.testing.assert_allclose(mean.y, np.array(one.y)[:4] + 1.5)  # as far as both got
    assert len(mean.y) == len(other.y) == 4
    assert source.line.dash == "dot"


def test_group_has_one_colour_in_curves_and_bars(several, monkeypatch):
    for path in several[:3]:
        (path / "summary.json").unlink()
    shown = compared(several, monkeypatch)
    _, curves, polymers = shown["sections"]
    drawn = {trace.name: trace.line.color for trace in curves.plots[0].figure.data}
    bar, source = polymers.plots[0].figure.data
    assert bar.name == "hidden_dim 32"
    assert bar.marker.color == drawn["hidden_dim 32"]
    assert source.marker.color not in drawn.values()


def test_runs_and_groups_of_one_name_are_told_apart(several, monkeypatch, tmp_path):
    paths = [tmp_path / name / "run" for name in ("one", "two")]
    for width, old, new in zip((16, 32), several, paths, strict=False):
        new.parent.mkdir()
        old.rename(new)
        edit_json(new / "config.json", a=width, b=width, c=width, d=width)
    shown = compared(paths, monkeypatch)
    figures, runs, *_ = shown["sections"][0].tables
    assert [row[0] for row in runs.rows] == [str(path) for path in paths]
    assert figures.header[1:] == [f"{path} (n = 1)" for path in paths]
    assert len(shown["sections"][2].plots[0].figure.data) == 3


def test_groups_that_differ_in_many_settings_go_by_their_presets(several, monkeypatch):
    edit_json(several[3] / "config.json", preset="full", gamma=0.9, num_steps=7, ent_coef=0.5)
    shown = compared(several, monkeypatch)
    presets = [f"preset {json.loads((several[0] / 'config.json').read_text())['preset']} (n = 3)"]
    assert shown["sections"][0].tables[0].header[1:] == [*presets, "preset full (n = 1)"]


def test_runs_of_another_version_or_of_another_tracker_are_in_the_group_of_today(
    several, monkeypatch
):
    removed = dict(evaluate=None, reward_precision="fp32", true_reward_model=None)
    edit_json(several[0] / "config.json", **removed, wandb_project="mine", wandb_entity="me")
    shown = compared(several[:3], monkeypatch)
    assert shown["sections"][0].tables[0].header[1:] == ["run-0 and 2 more (n = 3)"]


def test_run_with_a_setting_that_is_gone_is_a_group_of_its_own(several, monkeypatch):
    edit_json(several[0] / "config.json", reward_precision="bf16")
    figures, _, differing = compared(several[:3], monkeypatch)["sections"][0].tables
    assert figures.header[1] == "reward_precision bf16 (n = 1)"
    assert differing.rows == [["reward_precision", "bf16", "None"]]


@pytest.mark.parametrize("name", ["cohort", "holdout_cohort", "reward_model"])
def test_runs_of_other_patients_or_of_another_outcome_model_are_other_groups(
    several, monkeypatch, name
):
    edit_json(several[1] / "config.json", **{name: "mine"})
    figures, _, differing = compared(several[:2], monkeypatch)["sections"][0].tables
    assert [column.endswith("(n = 1)") for column in figures.header[1:]] == [True, True]
    assert [row[0] for row in differing.rows] == [name]


def test_names_in_legends_are_no_markup(trained):
    run = read_run(trained)
    figure = overlay([Group("<b>x</b>", [run], BLUE)], "mean_reward", "y")
    assert figure.data[0].name == "&lt;b&gt;x&lt;/b&gt;"


def test_comparison_page_is_whole(several):
    page = comparison_page([read_run(path) for path in several]).decode()
    assert "Comparison of 4 runs" in page
    assert "21.50 ± 1.50" in page
    assert len(page) < 6e6
    assert Tags(page).count("table") == 3


def test_policy_of_float64_designs_in_float64(small_run, tmp_path):
    args = small_run(tmp_path / "exact", precision="fp64", num_iterations=1)
    ppo_hybrid.train(args)
    patients = design_patients(read_run(args.output_dir))
    assert {values.dtype for values in patients.predicted.values()} == {np.dtype("float64")}


def test_settings_of_another_version_are_shown_and_else_ignored(copy, content):
    edit_json(copy / "config.json", reward_precision="fp32", evaluate=None)
    shown = content(copy)
    settings = next(t for t in shown["sections"][0].tables if t.title == "Settings")
    assert ["reward_precision", "fp32"] in settings.rows
    assert len(shown["patients"].reward) == 40


def test_report_reads_a_model_of_the_user_by_the_id_of_the_environment(
    small_run, tmp_path, register_design
):
    def risky(patient, polymer_id, formulation, coverage):
        gain = formulation[..., 3] + 0.0 * (polymer_id + coverage + patient[..., 0])
        one = torch.ones_like(gain)
        return Outcomes(gain, 0 * one, 0 * one, one, one, 0 * one)

    env_id = register_design("Risky-v0", risky)
    args = small_run(tmp_path / "mine", env_id=env_id, num_iterations=1)
    ppo_hybrid.train(args)
    run = read_run(args.output_dir)
    patients = design_patients(run)
    assert patients.slices.is_unsafe.all()
    np.testing.assert_allclose(patients.margins["toxicity"], -0.85, atol=1e-6)
    text = safety_section(patients).texts[0]
    assert text == "100.00 % of the designs break a safety limit."
