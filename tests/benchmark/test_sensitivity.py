from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from hydrogel_gym import PolymerTable, load_cohort, load_polymers
from hydrogel_gym.models.mechanistic import MechanisticModel, MechanisticParams
from hydrogel_gym.problem.fields import (
    COVERAGES,
    FORMULATION_HIGH,
    FORMULATION_LOW,
    OUTCOME_FIELDS,
    PATIENT_FIELDS,
    Design,
)
from hydrogel_gym.problem.polymers import NUM_POLYMERS
from hydrogel_gym.runs.environments import make_envs
from hydrogel_gym.runs.evaluation import evaluate
from hydrogel_gym.runs.options import ProblemOptions
from hydrogel_gym.train.ppo_hybrid import Agent

with pytest.MonkeyPatch.context() as patch:
    # Where a script finds its neighbours.
    patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmark"))
    import perturbations
    import sensitivity

HOLDOUT = load_cohort("holdout")
PATIENTS = HOLDOUT.features.to(torch.float32)


@pytest.fixture(scope="module")
def agent():
    torch.manual_seed(0)
    agent = Agent(
        obs_dim=13,
        num_polymers=NUM_POLYMERS,
        num_coverages=len(COVERAGES),
        formulation_low=FORMULATION_LOW.tolist(),
        formulation_high=FORMULATION_HIGH.tolist(),
        policy="autoregressive",
        state_std=True,
        hidden_dim=16,
    )
    # Away from the near-uniform initial policy, so that patients get different designs.
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return agent


def random_designs(num: int, seed: int = 0) -> Design:
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.from_numpy(FORMULATION_LOW), torch.from_numpy(FORMULATION_HIGH)
    return Design(
        torch.randint(NUM_POLYMERS, (num,), generator=generator),
        torch.lerp(low, high, torch.rand((num, len(low)), generator=generator)),
        torch.randint(len(COVERAGES), (num,), generator=generator),
    )


def test_what_is_moved_is_every_constant_and_polymer_index_of_grade_d():
    windows_and_text = {
        *("names", "categories", "smiles", "sources", "confidences"),
        *("youngs_modulus_kpa", "half_life_days", "conductivity_s_per_m"),
    }
    indices = [f.name for f in fields(PolymerTable) if f.name not in windows_and_text]
    assert all("indices D" in confidence for confidence in load_polymers().confidences)
    assert list(perturbations.assumptions()) == [*MechanisticParams.names_graded("D"), *indices]
    assert len(set(perturbations.assumptions())) == len(perturbations.assumptions())


def test_factor_of_one_reproduces_the_shipped_model_exactly():
    design = random_designs(len(PATIENTS))
    same = perturbations.perturbed(dict.fromkeys(perturbations.assumptions(), 1.0))
    for model in (same, perturbations.perturbed({})):
        outcomes = model(PATIENTS, *design)
        for a, b in zip(outcomes, MechanisticModel()(PATIENTS, *design), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", perturbations.assumptions())
def test_moving_one_assumption_moves_no_other(name):
    shipped, moved = MechanisticModel(), perturbations.perturbed({name: 0.8})
    constants = [
        f.name
        for f in fields(MechanisticParams)
        if getattr(shipped.params, f.name) != getattr(moved.params, f.name)
    ]
    columns = (shipped.polymer_table != moved.polymer_table).any(0)
    if name in perturbations.POLYMER_INDICES:
        assert constants == []
        assert columns.sum() == 1
        ratio = (moved.polymer_table / shipped.polymer_table)[:, columns]
        assert torch.allclose(ratio[~ratio.isnan()], torch.tensor(0.8, dtype=torch.float64))
    else:
        assert constants == [name]
        assert columns.sum() == 0
        assert getattr(moved.params, name) == 0.8 * getattr(shipped.params, name)


def test_unknown_assumption_is_refused_by_name():
    with pytest.raises(ValueError, match="no assumption is called source_gain"):
        perturbations.perturbed({"source_gain": 1.2})


@pytest.mark.parametrize("name", ["bioactivity", "foreign_body_tendency", "cohesion"])
def test_index_from_zero_to_one_stays_there(name):
    moved = perturbations.perturbed({name: 100.0})
    changed = (moved.polymer_table != MechanisticModel().polymer_table).any(0)
    assert (moved.polymer_table[:, changed] == 1.0).all()


@pytest.mark.parametrize("seed", range(6))
def test_outcomes_stay_physical_at_every_corner_that_was_tried(seed):
    generator = torch.Generator().manual_seed(seed)
    names = perturbations.assumptions()
    ends = torch.randint(2, (len(names),), generator=generator).double() if seed > 1 else seed
    factors = (0.8 + 0.4 * torch.as_tensor(ends).expand(len(names))).tolist()
    model = perturbations.perturbed(dict(zip(names, factors, strict=True)))
    outcomes = model(PATIENTS, *random_designs(len(PATIENTS), seed))
    for value, item in zip(outcomes, OUTCOME_FIELDS, strict=True):
        assert value.isfinite().all(), item.name
        assert value.min() >= item.low, item.name
        assert value.max() <= item.high, item.name


def test_joint_draws_are_seeded_within_a_fifth_and_may_reorder_the_polymers():
    first, again, other = (
        perturbations.joint_factors(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert list(first) == list(perturbations.assumptions())
    for name, factor in first.items():
        values = torch.as_tensor(factor)
        assert values.shape == ((NUM_POLYMERS,) if name in perturbations.POLYMER_INDICES else ())
        assert ((values >= 0.8) & (values <= 1.2)).all()
        assert torch.equal(values, torch.as_tensor(again[name]))
        assert not torch.equal(values, torch.as_tensor(other[name]))
    bioactivity = load_polymers().bioactivity
    moved = bioactivity * first["bioactivity"]
    assert moved.argsort().tolist() != bioactivity.argsort().tolist()


def test_cases_are_the_shipped_model_both_ends_of_each_assumption_and_the_draws():
    cases = list(perturbations.cases(2))
    alone = [(name, factor) for name in perturbations.assumptions() for factor in (0.8, 1.2)]
    assert [case.kind for case in cases] == [
        "nominal",
        *["constant"] * len(alone),
        *["joint", "joint-held"] * 2,
    ]
    assert [(case.name, case.factor) for case in cases[1 : 1 + len(alone)]] == alone


def test_held_draw_differs_from_its_draw_in_what_is_held_alone():
    *_, joint, held = perturbations.cases(1)
    shipped = MechanisticParams()
    differ = [
        f.name
        for f in fields(MechanisticParams)
        if getattr(joint.model.params, f.name) != getattr(held.model.params, f.name)
    ]
    assert differ == ["integrity_cohesion_gain"]
    assert held.model.params.integrity_cohesion_gain == shipped.integrity_cohesion_gain
    assert (joint.model.polymer_table != held.model.polymer_table).any(0).sum() == 1


def test_measured_features_are_seeded_within_their_error_and_within_limits():
    truth = HOLDOUT.features
    first, again, other = (
        perturbations.measured(truth, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for column, field in enumerate(PATIENT_FIELDS):
        assert first[:, column].min() >= field.low
        assert first[:, column].max() <= field.high
        error = first[:, column] / truth[:, column] - 1.0
        assert error.abs().max() <= 0.05 + 1e-12
        assert error.min() < -0.04
        assert error.max() > 0.04
    correlation = torch.corrcoef((first / truth).T) - torch.eye(len(PATIENT_FIELDS))
    assert correlation.abs().max() < 0.2  # 500 independent draws


def test_figures_count_what_a_person_counts(three_patients, toy_model):
    formulation = torch.tensor([[10.0, 30.0, 0.2, 5.0], [10.0, 30.0, 0.1, 5.0], [10, 30, 0.1, 3.0]])
    design = Design(torch.tensor([1, 2, 3]), formulation, torch.tensor([0, 1, 1]))
    best_score = torch.tensor([4.0, 7.0])
    # Ann is over the toxicity limit, Bo over that of fibrosis, Cy under that of integrity and over
    # that of fibrosis; each first use of a polymer pays 0.1.
    scores = [3.6 - 2.0, 6.9 - 0.5, 9.9 - 1.0 - 0.5]
    result = sensitivity.figures(toy_model, three_patients.features, design, best_score)
    assert result == pytest.approx(
        {
            "mean_reward": sum(scores) / 3,
            "toxicity_breach_rate": 1 / 3,
            "integrity_breach_rate": 1 / 3,
            "fibrosis_breach_rate": 2 / 3,
            "limit_breach_rate": 1.0,
            "best_reward": 5.5,
            "regret": 5.5 - (scores[0] + scores[1]) / 2,
        },
        rel=1e-6,
    )


def test_nominal_figures_are_those_of_the_trainer(agent):
    envs = make_envs(ProblemOptions(), HOLDOUT, torch.device("cpu"))
    expected = evaluate(agent.design, envs)
    design = sensitivity.designs_of(agent, HOLDOUT.features)
    result = sensitivity.figures(MechanisticModel(), HOLDOUT.features, design)
    for name in ("mean_reward", "limit_breach_rate"):
        assert result[name] == pytest.approx(expected[name], rel=1e-6)


@pytest.fixture(scope="module")
def small_table(agent):
    """Of five patients and two assumptions, for the search is what takes the time."""
    few = ("efficacy_floor", "cohesion")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "assumptions", lambda: few)
        patch.setattr(perturbations, "assumptions", lambda: few)
        return sensitivity.measure(
            sensitivity.subset(HOLDOUT, 5),
            sensitivity.subset(HOLDOUT, 5),
            {"one": agent, "two": agent},
            num_draws=2,
            num_noise=1,
            oracle_patients=2,
        )


def test_table_has_a_row_per_case_and_set_of_designs(small_table):
    counts = small_table.groupby("kind").size().to_dict()
    assert counts == {
        "training": 2,
        "holdout": 3,
        "nominal": 3,
        "constant": 4 * 3,
        "joint": 2 * 3,
        "joint-held": 2 * 3,
        "noise": 3,
    }
    assert set(small_table["designs"]) == {"one", "two", sensitivity.ORACLE}


def test_best_designs_lose_nothing_to_themselves_and_no_design_beats_them(small_table):
    best = small_table[small_table["designs"] == sensitivity.ORACLE].set_index("kind")
    assert best.loc["holdout", "regret"] == pytest.approx(0.0, abs=1e-3)
    assert best.loc["nominal", "regret"] == pytest.approx(0.0, abs=1e-3)
    regret = small_table["regret"].dropna()
    assert (regret > -1e-3).all()
    assert small_table.loc[small_table["kind"] == "joint-held", "regret"].isna().all()


def test_change_is_from_the_nominal_reward_of_the_same_designs(small_table):
    nominal = small_table[small_table["kind"] == "nominal"].set_index("designs")["mean_reward"]
    moved = small_table[small_table["kind"].isin(["constant", "joint", "joint-held"])]
    expected = moved["mean_reward"] - moved["designs"].map(nominal)
    assert moved["change"].tolist() == pytest.approx(expected.tolist())


def test_misled_best_designs_are_compared_on_the_patients_they_are_for(small_table):
    row = small_table[
        (small_table["kind"] == "noise") & (small_table["designs"] == sensitivity.ORACLE)
    ].iloc[0]
    assert row["change"] == pytest.approx(-row["regret"], abs=1e-4)
    assert row["change"] <= 1e-4


def test_report_leads_with_the_unsafe_shares_of_the_unmoved_model(small_table):
    text = sensitivity.report(small_table, num_patients=5, num_training=5, oracle_patients=2)
    holdout = small_table[
        (small_table["kind"] == "holdout") & (small_table["designs"] == "one")
    ].iloc[0]
    lead = text.splitlines()[2]
    assert f"{100 * holdout['limit_breach_rate']:.1f} % of the policy's deterministic" in lead
    assert f"mean regret on the held-out ones is {holdout['regret']:.2f}" in lead
    assert "nan" not in text
    assert "`efficacy_floor` | 0.6 |" in text
    assert "`cohesion` | 0.86 to 0.96 |" in text
    assert "clinical facts" in text


def test_picture_is_a_png(small_table):
    assert sensitivity.draw(small_table).startswith(b"\x89PNG")


def test_missing_policy_is_one_clear_error(tmp_path, capsys):
    assert sensitivity.main(["--policy", str(tmp_path / "nowhere")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: policy ")
    assert message.endswith("nowhere/stage2_policy.pt: no such file\n")
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "allowed"),
    [
        (["--draws", "0"], "--draws is 0; allowed: 1 or more"),
        (["--oracle-patients", "501"], "--oracle-patients is 501; allowed: 1 to 500"),
        (["--output-dir", "nowhere"], "--output-dir nowhere: no such folder"),
    ],
)
def test_flag_out_of_range_is_refused(flags, allowed, capsys):
    assert sensitivity.main(["--policy", "run", *flags]) == 2
    assert capsys.readouterr().err == f"error: {allowed}\n"


def test_policy_of_longer_episodes_is_refused(monkeypatch, agent):
    saved = {"training_config": {"horizon": 3}}
    monkeypatch.setattr(sensitivity, "load_policy", lambda *_: (agent, saved))
    with pytest.raises(ValueError, match="run: trained with horizon 3; expected 1"):
        sensitivity.load_agents([Path("run")])


def test_runs_of_the_same_name_are_refused(monkeypatch, agent):
    saved = {"training_config": {"horizon": 1}}
    monkeypatch.setattr(sensitivity, "load_policy", lambda *_: (agent, saved))
    with pytest.raises(ValueError, match="two run directories are called run"):
        sensitivity.load_agents([Path("a/run"), Path("b/run")])
