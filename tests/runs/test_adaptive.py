"""Learning to check designs on patients who respond otherwise than predicted."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from hydrogel_gym import compute_reward, load_cohort
from hydrogel_gym.models.ensemble import save_stage1
from hydrogel_gym.oracle.search import search
from hydrogel_gym.runs import ADAPTIVE, ProblemOptions, evaluation, make_envs
from hydrogel_gym.runs.adaptive import figures_after_checks
from hydrogel_gym.runs.summary import print_summary
from hydrogel_gym.train import (
    evaluate,
    generate_candidates,
    ppo_hybrid,
    rank_designs,
    refine_patients,
)


@pytest.fixture(scope="module")
def adaptive_run(small_run, tmp_path_factory):
    """Arguments and summary of a small run of the preset, with two checks of each patient."""
    settings = ppo_hybrid.PRESETS["adapt"] | dict(preset="adapt", horizon=2, num_epochs=1)
    small = dict(num_envs=48, num_steps=4, num_iterations=4, minibatch_size=48)
    folder = tmp_path_factory.mktemp("adaptive")
    args = small_run(folder / "run", **(settings | small))
    return args, ppo_hybrid.train(args)


@pytest.fixture(scope="module")
def three():
    """Environments of three held-out patients, with two checks of each."""
    cohort = load_cohort("holdout")
    cohort = dataclasses.replace(
        cohort, patient_ids=cohort.patient_ids[:3], features=cohort.features[:3]
    )
    return make_envs(ProblemOptions(ADAPTIVE, horizon=2), cohort, torch.device("cpu"))


def test_regrets_are_those_of_the_best_design_so_far_and_of_the_best_predicted_one(three):
    obs, info = three.reset(seed=evaluation.SEED)
    problem, patients = three.unwrapped.problem, obs[:, :11]
    inputs = problem.reward_model, problem.params.reward_config, evaluation.SEED

    def known(patient, *design):
        response = info["response"].repeat_interleave(len(patient) // 3, 0)
        return problem.reward_model(patient, *design, response)

    predicted, best = search(patients, *inputs), search(patients, known, *inputs[1:])
    # The first patient has the clairvoyant's design first, the second then, the third never.
    tried = [torch.tensor([True, False, False]), torch.tensor([False, True, False])]
    checks = iter(tried)

    def policy(obs, generator):
        is_best = next(checks)
        pairs = zip(best, predicted, strict=True)
        heads = [torch.where(is_best.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in pairs]
        return dict(zip(best._fields, heads, strict=True)), None

    found = figures_after_checks(policy, three, horizon=2)
    none, one, two = (
        found["no_learning_regret"],
        *zip(*found["regret_after_checks"].values(), strict=True),
    )
    scores = [compute_reward(known(patients, *design)) for design in (best, predicted)]
    regret = scores[0] - scores[1]
    assert found["regret_patients"] == 3
    assert none["mean"] == pytest.approx(regret.mean().item(), abs=1e-5)
    assert none["median"] == pytest.approx(regret.median().item(), abs=1e-5)
    assert one[0] == pytest.approx(regret[1:].sum().item() / 3, abs=1e-5)
    # The second patient's had its bonus for a new polymer before.
    lost = problem.params.reward_config.novelty_bonus * (best[0][1] == predicted[0][1]).item()
    assert two[0] == pytest.approx((lost + regret[2].item()) / 3, abs=1e-5)


def test_who_is_trained_with_the_response_is_evaluated_with_samples_of_it(tmp_path):
    problem, cohort = (
        ProblemOptions(ADAPTIVE, horizon=2, observe="response"),
        load_cohort("holdout"),
    )
    place = torch.device("cpu")
    envs = make_envs(problem, cohort, place, num_envs=500)
    every = evaluation.evaluation_sets(problem, {"holdout": cohort}, place, cache_dir=tmp_path)
    evaluated = every["holdout"].envs
    (trained_on, _), (seen, info) = (each.reset(seed=0) for each in (envs, evaluated))
    hidden = info["response"].log()
    torch.testing.assert_close(trained_on[:200, 13:], hidden)  # of the same streams
    assert ((seen[:, 13:] - hidden).abs() > 0.01).float().mean() > 0.9


def test_of_each_cohort_the_first_200_patients_are_evaluated(tmp_path):
    cohorts = {name: load_cohort(name) for name in ("train", "holdout")}
    problem, place = ProblemOptions(ADAPTIVE, horizon=2), torch.device("cpu")
    sets = evaluation.evaluation_sets(problem, cohorts, place, cache_dir=tmp_path)
    for name, each in sets.items():
        obs, _ = each.envs.reset(seed=evaluation.SEED)
        assert obs[:, :11].equal(cohorts[name].features[:200].float())


def test_every_evaluation_is_of_the_same_patients_and_responses(three):
    def policy(obs, generator):
        design = {"polymer_id": torch.zeros(3, dtype=torch.int64)}
        design |= {"formulation": torch.full((3, 4), 3.0), "coverage": design["polymer_id"]}
        return design, torch.zeros(3)

    first, again = (evaluation.evaluate(policy, three, horizon=2) for _ in range(2))
    assert first == again


def test_regret_after_checks_is_in_the_summary_of_a_run_with_an_oracle(
    adaptive_run, tmp_path, monkeypatch, capsys
):
    args, summary = adaptive_run
    found = {"regret_after_checks": {"mean": [1.5, 0.5]}, "no_learning_regret": {"mean": 1.25}}
    monkeypatch.setattr("hydrogel_gym.runs.run.figures_after_checks", lambda *_: found)
    again = dataclasses.replace(args, oracle=True, num_iterations=1, output_dir=tmp_path / "run")
    written = ppo_hybrid.train(again)
    assert summary.keys() == written.keys() - found.keys()
    assert json.loads((tmp_path / "run" / "summary.json").read_text()).items() >= found.items()
    assert written["holdout_regret"] is None  # of the best predicted design, which is not the best
    print_summary(written)
    shown = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "regret_after_checks, mean  1.50 0.50" in shown
    assert "no_learning_regret, mean  1.25" in shown


def test_a_resumed_run_of_the_preset_is_the_uninterrupted_one(adaptive_run, of_runs, tmp_path):
    args, _ = adaptive_run
    resumed = of_runs.killed(args, tmp_path / "run", at=2)
    ppo_hybrid.train(resumed)
    of_runs.assert_same(resumed.output_dir, args.output_dir)


def test_a_saved_policy_repeats_the_figures_of_its_run(adaptive_run):
    args, summary = adaptive_run
    given = evaluate.Args(args.output_dir, cohort=args.cohort, oracle=False)
    name = "train_deterministic_reward"
    assert evaluate.evaluate_saved(given)[name] == pytest.approx(summary[name], abs=1e-5)


@pytest.mark.parametrize(
    "script",
    [generate_candidates, refine_patients, rank_designs],
    ids=["candidates", "refine", "rank"],
)
def test_what_designs_before_anything_is_measured_refuses_a_policy_that_waits_for_it(
    adaptive_run, tmp_path, capsys, script
):
    flags = ["--policy", str(adaptive_run[0].output_dir)]
    flags = [str(tmp_path), *flags] if script is rank_designs else flags
    assert script.main(flags) == 2
    out = capsys.readouterr().err.strip()
    assert out == (
        "error: the policy is of HydrogelAdapt-v0, which designs by what was measured before; "
        "allowed: one of HydrogelDesign-v0"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--response-sd", "3"], "response_sd is 3.0; allowed: a finite number, 0 to 1.0986"),
        (["--check-cost", "-1"], "check_cost is -1.0; allowed: a finite number, 0 or more"),
        (["--outcome-noise", "1"], "outcome_noise has 1 numbers; expected one for"),
        (["--env-id", "HydrogelDesign-v0", "--response-sd", "0.1"], "no environment of this kind"),
        (["--reward-model", "STAGE1"], "which takes no patient's response; allowed with"),
    ],
    ids=["response", "cost", "noise", "another id", "another model"],
)
def test_a_problem_that_cannot_be_had_is_one_line(make_stage1, tmp_path, capsys, flags, message):
    save_stage1(tmp_path / "stage1.pt", make_stage1(), {})
    flags = [flag.replace("STAGE1", str(tmp_path / "stage1.pt")) for flag in flags]
    flags += ["--preset", "adapt", "--compile", "off", "--output-dir", str(tmp_path / "run")]
    assert ppo_hybrid.main(flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run").exists()
