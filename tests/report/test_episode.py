"""One patient's episode as the page of an adaptive run shows it."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from hydrogel_gym import Outcomes, compute_reward, load_cohort
from hydrogel_gym.models.mechanistic import MechanisticModel
from hydrogel_gym.problem.polymers import load_polymers
from hydrogel_gym.report import episode
from hydrogel_gym.report.page import run_page
from hydrogel_gym.runs import ProblemOptions, make_envs
from hydrogel_gym.runs.devices import fast_float32
from hydrogel_gym.runs.evaluation import SEED
from hydrogel_gym.train import ppo_hybrid

CHECKS = 3


@pytest.fixture(scope="module")
def run_dir(small_run, tmp_path_factory):
    """A small run of the preset with an oracle, three checks and three patients held out."""
    folder = tmp_path_factory.mktemp("adaptive")
    settings = ppo_hybrid.PRESETS["adapt"] | dict(preset="adapt", horizon=CHECKS, num_epochs=1)
    settings |= dict(num_envs=48, num_steps=6, num_iterations=2, minibatch_size=48, oracle=True)
    three = folder / "three.csv"
    pd.read_csv(small_run(folder).holdout_cohort).head(3).to_csv(three, index=False)
    ppo_hybrid.train(small_run(folder / "run", **settings, holdout_cohort=three))
    return folder / "run"


@pytest.fixture(scope="module")
def run(run_dir, read_run):
    return read_run(run_dir)


@pytest.fixture(scope="module")
def shown(run):
    return episode.patient_episode(run)


def features(run, patient_id):
    cohort = load_cohort(run.config["holdout_cohort"])
    return cohort.features[[cohort.patient_ids.index(patient_id)]].float()


def test_outcomes_and_scores_of_the_table_are_those_of_the_model_under_the_response(run, shown):
    response = torch.from_numpy(shown.response)[None]
    columns, tried = episode.check_columns(shown), []
    for row in range(CHECKS + 1):  # the clairvoyant's is the last
        polymer_id, formulation, coverage = (
            torch.as_tensor(x[row])[None]
            for x in (shown.polymer_id, shown.formulation, shown.coverage)
        )
        patient = features(run, shown.patient_id)
        outcomes = MechanisticModel()(patient, polymer_id, formulation, coverage, response)
        is_novel = row == CHECKS or polymer_id.item() not in tried
        tried.append(polymer_id.item())
        score = compute_reward(outcomes, is_novel).item()
        for name, value in zip(Outcomes._fields, outcomes, strict=True):
            assert shown.measured[name][row] == pytest.approx(value.item(), abs=1e-4)
        assert float(columns["score"][row]) == pytest.approx(score, abs=0.0051)
        assert columns["polymer"][row] == load_polymers().names[tried[-1]]
        limits = {"toxicity": outcomes.toxicity_risk > 0.15}
        limits["integrity"] = outcomes.structural_integrity < 0.8
        limits["fibrosis"] = outcomes.fibrosis_risk > 0.2
        broken = [name for name, is_broken in limits.items() if is_broken]
        assert columns["limits broken"][row] == (", ".join(broken) or "none")
    best = [float(x) for x in columns["best so far"][:-1]]
    score = [float(x) for x in columns["score"]]
    assert best == [max(score[: check + 1]) for check in range(CHECKS)]
    regret = [float(x) for x in columns["regret"]]
    assert regret == pytest.approx([*(score[-1] - x for x in best), 0.0], abs=0.0151)


def test_who_is_shown_has_the_quantile_of_what_a_prediction_loses_and_regrets_of_the_summary(
    run, monkeypatch
):
    found = []
    for quantile in (0.0, 0.5, 1.0):
        monkeypatch.setattr(episode, "QUANTILE", quantile)
        found.append(episode.patient_episode(run))
    lost = [x.no_learning_regret for x in found]
    assert len({x.patient_id for x in found}) == 3
    assert lost == sorted(lost)
    assert lost[1] == pytest.approx(run.summary["no_learning_regret"]["median"], abs=1e-4)
    regret = np.mean([x.regret[:-1] for x in found], axis=0)
    assert regret == pytest.approx(run.summary["regret_after_checks"]["mean"], abs=1e-4)


@torch.no_grad()
def test_beliefs_are_those_of_the_policy_at_what_it_saw_before_each_check(run, shown):
    cohort, agent = load_cohort(run.config["holdout_cohort"]), run.policy.agent
    envs = make_envs(ProblemOptions.of(run.config), cohort, torch.device("cpu"))
    row = cohort.patient_ids.index(shown.patient_id)
    obs, info = envs.reset(seed=SEED)
    assert info["response"][row].tolist() == shown.response.tolist()
    columns = episode.belief_columns(shown, "expected score")
    for check in range(CHECKS):
        with fast_float32(torch.device("cpu")):  # as a report rounds
            action, entropy = agent.design(obs)
        assert shown.polymer_id[check] == action["polymer_id"][row]
        assert shown.beliefs.value[check] == pytest.approx(agent.value(obs)[row].item(), rel=1e-5)
        assert shown.beliefs.entropy[check] == pytest.approx(entropy[row].item(), rel=1e-5)
        polymer = shown.beliefs.polymer[check]
        assert polymer.sum() == pytest.approx(1.0, abs=1e-5)
        assert polymer.argmax() == shown.polymer_id[check]  # of a deterministic policy
        assert columns["3 likeliest polymers"][check].startswith(columns["polymer chosen"][check])
        assert columns["expected score"][check] == f"{shown.beliefs.value[check]:.2f}"
        assert shown.observed_response[check].tolist() == obs[row, -6:].exp().tolist()
        obs = envs.step(action)[0]
    assert len(set(shown.beliefs.value.tolist())) == CHECKS  # it saw something each time


def test_page_shows_regret_after_checks_and_one_episode_and_says_who_is_left_out(
    run_dir, run, content, read_run
):
    page = content(run_dir)
    sections = {section.name: section for section in page["sections"]}
    assert page["patients"] is None
    assert page["gaps"][0].startswith("Nothing is shown of training patients: in HydrogelAdapt-v0")
    (plot,) = sections["regret-after-checks"].plots
    *curves, none = plot.figure.data
    after = run.summary["regret_after_checks"]
    assert [list(curve.y) for curve in curves] == list(after.values())
    assert list(none.y) == [run.summary["no_learning_regret"]["mean"]] * 2
    score, best, clairvoyant = sections["episode"].plots[0].figure.data
    assert list(best.y) == list(np.maximum.accumulate(score.y))
    assert clairvoyant.y[0] > max(score.y)
    *_, responses = sections["episode"].tables
    labels = [*(f"before check {k}" for k in (1, 2, 3)), "hidden"]
    assert [row[0] for row in responses.rows] == labels
    seen = episode.patient_episode(run)._replace(observed_response=None)
    hidden = episode.observed_response_table(seen)
    assert hidden.title.startswith("Hidden from the policy, and synthetic")
    assert hidden.rows[0][1:] == responses.rows[-1][1:]
    assert "expected score" in sections["episode"].tables[1].header
    assert b'data-plot="episode-polymers"' in run_page(read_run(run_dir))


@pytest.mark.parametrize(
    ("harm", "sentence", "left"),
    [
        ({"regret_after_checks": None}, "Regret after each check: not recorded", {"episode"}),
        ({"regret_after_checks": 3}, "no usable value of regret_after_checks", {"episode"}),
        (
            {"regret_after_checks": {"mean": [9.0] * CHECKS}},
            "No patient's episode is shown: regret after each check is another than in the run",
            {"regret-after-checks"},
        ),
    ],
    ids=["without an oracle", "no figures", "others"],
)
def test_what_is_not_known_of_an_adaptive_run_is_left_out_and_named(
    run_dir, content, edit_json, tmp_path, harm, sentence, left
):
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    edit_json(copy / "summary.json", **harm)
    page = content(copy)
    assert [gap for gap in page["gaps"] if sentence in gap], page["gaps"]
    names = {section.name for section in page["sections"]}
    assert names & {"episode", "regret-after-checks"} == left


def test_value_that_is_no_score_is_not_called_one(shown, run):
    config = json.loads(json.dumps(run.config)) | {"gamma": 0.99}
    section = episode.episode_section(shown, config)
    assert "value" in section.tables[1].header
    assert "rest of the episode" in section.texts[-1]


def test_table_of_the_documentation_has_a_row_for_each_check(
    run_dir, shown, monkeypatch, capsys, load_checkout_script
):
    monkeypatch.setattr(sys, "argv", ["adaptive_episode.py", str(run_dir)])
    load_checkout_script("docs/adaptive_episode.py").main()
    first, _, header, _, *rows = capsys.readouterr().out.splitlines()
    assert shown.patient_id in first
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (header, *rows)]
    regret = [row[cells[0].index("regret")] for row in cells[1:]]
    assert regret == episode.check_columns(shown)["regret"]
