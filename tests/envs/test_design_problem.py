from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from hydrogel_gym import HydrogelVectorEnv
from hydrogel_gym.envs.design_problem import DesignProblem
from hydrogel_gym.problem import dynamics

ACTION = {
    "polymer_id": np.array([3, 6, 9]),
    "formulation": np.float32([[10, 40, 0.5, 2], [20, 90, 0.25, 3], [25, 60, 0.0, 5]]),
    "coverage": np.array([0, 3, 1]),
}


@pytest.fixture(scope="module")
def make_problem(three_patients, toy_model):
    def make(**changes) -> DesignProblem:
        kwargs = {"cohort": three_patients, "reward_model": toy_model} | changes
        return HydrogelVectorEnv(3, **kwargs).problem

    return make


def test_unvalidated_problem_looks_at_shapes_but_at_no_value(make_problem):
    problem = make_problem(validate_actions=False)
    assert problem.design(ACTION | {"coverage": [99] * 3}, (3,)).coverage.tolist() == [99] * 3
    assert problem.patient_indices([7, 8, 9], (3,)).tolist() == [7, 8, 9]
    with pytest.raises(ValueError, match=r"coverage has shape \(2,\); expected \(3,\) or \(3, 1\)"):
        problem.design(ACTION | {"coverage": [0, 0]}, (3,))


@pytest.mark.parametrize(
    "patients",
    [
        ["cy", "ann", "bo"],
        ("cy", 0, np.int64(1)),
        np.array([2, 0, 1], np.uint8),
        np.array(["cy", "ann", "bo"]),
        torch.tensor([2, 0, 1]),
        torch.tensor([[2], [0], [1]], dtype=torch.int32),
        *("cy", 2, np.array("cy"), torch.tensor(2), ["cy"]),
    ],
    ids=lambda value: f"{type(value).__name__} {value}",
)
def test_patients_are_found_by_id_or_index(patients, make_problem):
    batch_shape = (3,) if np.ravel(patients).size == 3 else ()
    index = make_problem().patient_indices(patients, batch_shape)
    assert index.tolist() == ([2, 0, 1] if batch_shape else [2])
    if isinstance(patients, torch.Tensor):
        assert index.data_ptr() != patients.data_ptr()


@pytest.mark.parametrize(
    ("patients", "batch_shape", "message"),
    [
        (["ann", "bo", "dan"], (3,), "three patients has no patient 'dan'; nearest: "),
        (-1, (), "env 0: patient_id is -1; allowed: whole numbers 0 to 2"),
        (1.0, (), "patient_id has dtype torch.float64; expected an integer dtype"),
        (True, (), "patient_id has dtype torch.bool; expected an integer dtype"),
        ([1, 2], (), "patient_id has shape (2,); expected () or (1,)"),
        ("ann", (3,), "patient_id has shape (); expected (3,) or (3, 1)"),
    ],
)
def test_bad_patient_is_refused_with_its_reason(patients, batch_shape, message, make_problem):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_problem().patient_indices(patients, batch_shape)


def test_outcome_that_is_not_finite_is_refused_with_patient_and_design(make_problem, toy_model):
    def broken_model(patient, *design):
        outcomes = toy_model(patient, *design)
        is_bo = patient[..., 0] == 40.0
        return outcomes._replace(delta_ef_pct=outcomes.delta_ef_pct.where(~is_bo, torch.nan))

    problem = make_problem(reward_model=broken_model)
    state = dynamics.initial(torch.arange(3), problem.params)
    design = problem.design(ACTION, (3,))
    message = (
        r"env 1: the reward model returned {'delta_ef_pct': nan, .*'fibrosis_risk': 0.25} for "
        r"patient bo and the design polymer_id=6, formulation=\[20.0, 90.0, 0.25, 3.0\], coverage=3"
    )
    with pytest.raises(ValueError, match=message):
        problem.transition(state, design)
    skipped = problem.transition(state, design, skip=torch.tensor([False, True, False]))
    assert skipped.outcomes.delta_ef_pct[[0, 2]].tolist() == [3.0, 9.0]
