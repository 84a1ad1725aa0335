from dataclasses import fields

import pytest
import torch
from common import first_patients
from quality import sensitivity

from hydrogel_gym import load_cohort
from hydrogel_gym.models.mechanistic import MechanisticModel, MechanisticParams
from hydrogel_gym.problem.fields import PATIENT_FIELDS, Design

HOLDOUT, SHIPPED = load_cohort("holdout"), MechanisticModel()


def moved(model):
    """Names of the constants, and numbers of the polymers' columns, that are not as shipped."""
    names = [field.name for field in fields(MechanisticParams)]
    params = [n for n in names if getattr(SHIPPED.params, n) != getattr(model.params, n)]
    return params, (SHIPPED.polymer_table != model.polymer_table).any(0).nonzero()[:, 0].tolist()


def test_moving_one_assumption_moves_no_other_and_keeps_an_index_in_its_range():
    for name in sensitivity.assumptions():
        model = sensitivity.perturbed({name: 0.8})
        params, columns = moved(model)
        if name in sensitivity.POLYMER_INDICES:
            assert (params, len(columns)) == ([], 1), name
            ratio = (model.polymer_table / SHIPPED.polymer_table)[:, columns]
            assert torch.allclose(ratio[~ratio.isnan()], torch.tensor(0.8, dtype=torch.float64))
        else:
            assert (params, columns) == ([name], []), name
            assert getattr(model.params, name) == 0.8 * getattr(SHIPPED.params, name)
    highest = sensitivity.perturbed({"cohesion": 100.0})
    assert (highest.polymer_table[:, moved(highest)[1]] == 1.0).all()


def test_cases_are_the_shipped_model_both_ends_of_an_assumption_and_seeded_draws():
    every = list(sensitivity.cases(["efficacy_floor"], 2))
    _, low, high, first, _, second, _ = every
    assert [case.kind for case in every[1:]] == [*2 * ["constant"], *2 * ["joint", "joint-held"]]
    changed = [moved(case.model) for case in every]
    assert changed[:3] == [([], []), *2 * [(["efficacy_floor"], [])]]
    for case, factor in ((low, 0.8), (high, 1.2)):
        assert case.model.params.efficacy_floor == factor * SHIPPED.params.efficacy_floor
        assert case.factor == factor
    (graded, columns), (others, fewer) = changed[3:5]
    assert set(graded) == set(MechanisticParams.names_graded("D"))
    assert set(graded) - set(others) == {"integrity_cohesion_gain"}
    assert (len(columns), len(fewer)) == (6, 5)
    again = list(sensitivity.cases([], 1))[1].model
    tables = [model.polymer_table for model in (first.model, again, second.model, SHIPPED)]
    assert [torch.equal(tables[0], other) for other in tables[1:]] == [True, False, False]
    ratios = (tables[0] / tables[-1]).nan_to_num(1.0)
    assert 0.8 - 1e-9 <= ratios.min() <= ratios.max() <= 1.2 + 1e-9


def test_measured_features_are_within_their_error_independent_and_within_limits():
    seen = sensitivity.measured(HOLDOUT.features, torch.Generator().manual_seed(0))
    error = seen / HOLDOUT.features - 1.0
    for field, x, e in zip(PATIENT_FIELDS, seen.T, error.T, strict=True):
        assert field.low <= x.min() <= x.max() <= field.high
        assert 0.04 < min(-e.min(), e.max()) <= e.abs().max() <= 0.05 + 1e-12
    correlation = torch.corrcoef(error.T) - torch.eye(len(PATIENT_FIELDS))
    assert correlation.abs().max() < 0.2  # 500 independent draws


def test_figures_count_what_a_person_counts(three_patients, toy_model):
    formulation = torch.tensor([[10.0, 30.0, 0.2, 5.0], [10.0, 30.0, 0.1, 5.0], [10, 30, 0.1, 3.0]])
    design = Design(torch.tensor([1, 2, 3]), formulation, torch.tensor([0, 1, 1]))
    # Ann is over the toxicity limit, Bo over that of fibrosis, Cy under that of integrity and over
    # that of fibrosis; each first use of a polymer pays 0.1.
    scores = [3.6 - 2.0, 6.9 - 0.5, 9.9 - 1.0 - 0.5]
    patients, best = three_patients.features, torch.tensor([4.0, 7.0])
    shares = zip(sensitivity.BREACHES, (1 / 3, 1 / 3, 2 / 3, 1.0), strict=True)
    expected = {"mean_reward": sum(scores) / 3, "best_reward": 5.5} | dict(shares)
    expected["regret"] = 5.5 - (scores[0] + scores[1]) / 2
    assert sensitivity.figures(toy_model, patients, design, best) == pytest.approx(expected)


def test_no_designs_are_ahead_of_the_best_and_changes_are_from_the_model_as_shipped(agent):
    results = sensitivity.measure(first_patients(HOLDOUT, 3), agent, [], 1, 1, 2)
    kind, is_best = results["kind"], results["designs"] == sensitivity.SHIPPED
    regret = results["regret"].dropna()
    assert (regret > -1e-3).all()
    assert regret[is_best & kind.isin(["holdout", "nominal"])].max() < 1e-3
    assert results.loc[kind == "joint-held", "regret"].isna().all()
    others, misled = results[~(is_best & (kind == "noise"))], results[is_best].iloc[-1]
    change = others["mean_reward"] - others.groupby("designs")["mean_reward"].transform("first")
    assert others["change"].tolist() == pytest.approx(change.tolist())
    assert misled["change"] == pytest.approx(-misled["regret"], abs=1e-4)
