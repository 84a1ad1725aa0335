from dataclasses import fields

import pytest
import torch
from common import first_patients
from quality import sensitivity

from hydrogel_gym import load_cohort
from hydrogel_gym.models.mechanistic import MechanisticModel, MechanisticParams
from hydrogel_gym.problem.fields import PATIENT_FIELDS, Design

HOLDOUT = load_cohort("holdout")


class Agent:
    """A policy that gives every patient of a cohort another polymer."""

    def design(self, obs):
        formulation = torch.tensor([10.0, 30.0, 0.1, 5.0]).expand(len(obs), 4)
        polymer_id = torch.arange(len(obs))
        design = Design(polymer_id, formulation, torch.ones_like(polymer_id))
        return design._asdict(), torch.zeros(len(obs))


def moved_constants(model):
    shipped = MechanisticParams()
    names = [field.name for field in fields(MechanisticParams)]
    return [name for name in names if getattr(shipped, name) != getattr(model.params, name)]


def test_moving_one_assumption_moves_no_other_and_keeps_an_index_in_its_range():
    shipped = MechanisticModel()
    for name in sensitivity.assumptions():
        moved = sensitivity.perturbed({name: 0.8})
        columns = (shipped.polymer_table != moved.polymer_table).any(0)
        if name in sensitivity.POLYMER_INDICES:
            assert (moved_constants(moved), int(columns.sum())) == ([], 1), name
            ratio = (moved.polymer_table / shipped.polymer_table)[:, columns]
            assert torch.allclose(ratio[~ratio.isnan()], torch.tensor(0.8, dtype=torch.float64))
        else:
            assert (moved_constants(moved), int(columns.sum())) == ([name], 0), name
            assert getattr(moved.params, name) == 0.8 * getattr(shipped.params, name)
    highest = sensitivity.perturbed({"cohesion": 100.0})
    changed = (highest.polymer_table != shipped.polymer_table).any(0)
    assert (highest.polymer_table[:, changed] == 1.0).all()


def test_cases_are_the_shipped_model_both_ends_of_an_assumption_and_seeded_draws():
    every = list(sensitivity.cases(["efficacy_floor"], 2))
    nominal, low, high, first, held, second, _ = every
    kinds = ["nominal", "constant", "constant", "joint", "joint-held", "joint", "joint-held"]
    assert [case.kind for case in every] == kinds
    assert moved_constants(nominal.model) == []
    assert (low.factor, high.factor) == (0.8, 1.2)
    assert low.model.params.efficacy_floor == 0.8 * nominal.model.params.efficacy_floor
    graded = set(MechanisticParams.names_graded("D"))
    assert set(moved_constants(first.model)) == graded
    assert graded - set(moved_constants(held.model)) == {"integrity_cohesion_gain"}
    assert (first.model.polymer_table != held.model.polymer_table).any(0).sum() == 1
    assert not torch.equal(first.model.polymer_table, second.model.polymer_table)
    again = list(sensitivity.cases([], 1))[1].model.polymer_table
    assert torch.equal(first.model.polymer_table, again)
    ratios = (again / nominal.model.polymer_table).nan_to_num(1.0)
    assert ratios.min() >= 0.8 - 1e-9
    assert ratios.max() <= 1.2 + 1e-9


def test_measured_features_are_within_their_error_independent_and_within_limits():
    truth = HOLDOUT.features
    seen = sensitivity.measured(truth, torch.Generator().manual_seed(0))
    for column, field in enumerate(PATIENT_FIELDS):
        assert field.low <= seen[:, column].min() <= seen[:, column].max() <= field.high
        error = seen[:, column] / truth[:, column] - 1.0
        assert error.abs().max() <= 0.05 + 1e-12
        assert error.min() < -0.04
        assert error.max() > 0.04
    correlation = torch.corrcoef((seen / truth).T) - torch.eye(len(PATIENT_FIELDS))
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


def test_no_designs_are_ahead_of_the_best_and_changes_are_from_the_model_as_shipped():
    few = first_patients(HOLDOUT, 3)
    results = sensitivity.measure(few, Agent(), [], 1, 1, 2)
    regret, is_best = results["regret"].dropna(), results["designs"] == sensitivity.SHIPPED
    assert (regret > -1e-3).all()
    assert regret[is_best & results["kind"].isin(["holdout", "nominal"])].max() < 1e-3
    assert results.loc[results["kind"] == "joint-held", "regret"].isna().all()
    usual = results[results["kind"] == "holdout"].set_index("designs")["mean_reward"]
    others = results[~(is_best & (results["kind"] == "noise"))]
    expected = others["mean_reward"] - others["designs"].map(usual)
    assert others["change"].tolist() == pytest.approx(expected.tolist())
    misled = results[is_best & (results["kind"] == "noise")].iloc[0]
    assert misled["change"] == pytest.approx(-misled["regret"], abs=1e-4)
