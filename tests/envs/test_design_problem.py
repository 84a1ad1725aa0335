from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from hydrogel_gym.envs.design_problem import DesignProblem
from hydrogel_gym.problem import dynamics
from hydrogel_gym.problem.fields import Design

NAN, INF = float("nan"), float("inf")
BATCH_SHAPES = pytest.mark.parametrize("batch_shape", [(), (3,)], ids=["single", "batch"])
HYBRID, FLAT = ("dict", "tuple"), ("box", "multidiscrete")
# Three good actions in each format.
GOOD = {
    "dict": {
        "polymer_id": np.array([3, 6, 9]),
        "formulation": np.float32([[10, 40, 0.5, 2], [20, 90, 0.25, 3], [25, 60, 0.0, 5]]),
        "coverage": np.array([0, 3, 1]),
    },
    "box": np.linspace(-1, 1, 96, dtype=np.float32).reshape(3, 32),
    "multidiscrete": np.array([[3, 0, 5, 10, 1, 0], [6, 1, 2, 3, 4, 3], [9, 9, 9, 9, 9, 1]]),
}
GOOD["tuple"] = tuple(GOOD["dict"].values())


@pytest.fixture(scope="module")
def make_problem(three_patients, toy_model):
    def make(action_format: str = "dict", **changes) -> DesignProblem:
        defaults = {
            "device": "cpu",
            "horizon": 1,
            "cohort": three_patients,
            "reward_model": toy_model,
            "reward_config": None,
            "action_format": action_format,
            "obs_format": "box",
            "observe_explored": False,
            "reward_mode": "score",
            "patient_assignment": "fixed",
            "validate": True,
        }
        return DesignProblem(**defaults | changes)

    return make


def each(function, value):
    """Apply a function to every array of a nest of dicts, tuples and lists."""
    if isinstance(value, dict):
        return {key: each(function, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(each(function, item) for item in value)
    return function(value)


def to_torch(value):
    return each(lambda x: torch.from_numpy(np.array(x)), value)


def of_shape(action, batch_shape: tuple[int, ...]):
    """All three actions, or the middle one without its batch dimension."""
    return action if batch_shape else each(lambda x: x[1], action)


def put(array: np.ndarray, *column_and_value) -> np.ndarray:
    """A copy of an array with a value in its middle row, or in one column of that."""
    *column, value = column_and_value
    array = array.copy()
    array[(1, *column)] = value
    return array


def head(name: str, change):
    """Apply a change to one head of a hybrid action."""

    def spoil(action):
        if isinstance(action, dict):
            return action | {name: change(action[name])}
        heads = zip(Design._fields, action, strict=True)
        return tuple(change(x) if field == name else x for field, x in heads)

    return spoil


KEYS = "('polymer_id', 'formulation', 'coverage')"
# Formats, what is done to the good action, and the message; in it {s} is the batch shape, {s3} the
# shape with one dimension more, of size 3.
FAULTS = {
    "polymer too large": (
        HYBRID,
        head("polymer_id", lambda x: put(x, 24)),
        "env {env}: polymer_id is 24; allowed: whole numbers 0 to 23",
    ),
    "polymer negative": (
        HYBRID,
        head("polymer_id", lambda x: put(x, -1)),
        "env {env}: polymer_id is -1; allowed: whole numbers 0 to 23",
    ),
    "polymer float": (
        HYBRID,
        head("polymer_id", lambda x: x.astype(np.float32)),
        "polymer_id has dtype torch.float32; expected an integer dtype",
    ),
    "polymer text": (HYBRID, head("polymer_id", lambda x: x.astype(str)), "expected numbers"),
    "coverage too large": (
        HYBRID,
        head("coverage", lambda x: put(x, 4)),
        "env {env}: coverage is 4; allowed: whole numbers 0 to 3",
    ),
    "coverage negative": (
        HYBRID,
        head("coverage", lambda x: put(x, -2)),
        "env {env}: coverage is -2; allowed: whole numbers 0 to 3",
    ),
    "coverage bool": (
        HYBRID,
        head("coverage", lambda x: x.astype(bool)),
        "coverage has dtype torch.bool; expected an integer dtype",
    ),
    "coverage shape": (
        HYBRID,
        head("coverage", lambda x: np.stack([x, x], -1)),
        "coverage has shape {s2}; expected {s} or {s1}",
    ),
    "formulation nan": (
        HYBRID,
        head("formulation", lambda x: put(x, 1, NAN)),
        "env {env}: formulation[1] is nan; "
        "allowed: a finite number, clipped to [7, 180] (half_life_days)",
    ),
    "formulation inf": (
        HYBRID,
        head("formulation", lambda x: put(x, 3, -INF)),
        "env {env}: formulation[3] is -inf; "
        "allowed: a finite number, clipped to [1, 5] (thickness_mm)",
    ),
    "formulation shape": (
        HYBRID,
        head("formulation", lambda x: x[:, :3]),
        "formulation has shape {s3}; expected {s4}",
    ),
    "formulation complex": (
        HYBRID,
        head("formulation", lambda x: x.astype(np.complex64)),
        "formulation has dtype torch.complex64; expected a real number dtype",
    ),
    "key missing": (
        ("dict",),
        lambda action: {key: action[key] for key in ("coverage", "polymer_id")},
        f"action has the keys ('coverage', 'polymer_id'); expected {KEYS}",
    ),
    "key too many": (
        ("dict",),
        lambda action: action | {"dose": action["coverage"]},
        f"'coverage', 'dose'); expected {KEYS}",
    ),
    "tuple for dict": (
        ("dict",),
        lambda action: tuple(action.values()),
        f"action is a tuple; expected a dict of {KEYS}",
    ),
    "dict for tuple": (
        ("tuple",),
        lambda _: GOOD["dict"],
        f"action is a dict; expected a tuple of {KEYS}",
    ),
    "two of three": (
        ("tuple",),
        lambda action: action[:2],
        f"action has 2 entries; expected a tuple of {KEYS}",
    ),
    "dict for flat": (FLAT, lambda action: {"action": action}, "expected numbers"),
    "flat nan": (
        ("box",),
        lambda x: put(x, 1, NAN),
        "env {env}: action[1] is nan; allowed: a finite number, clipped to [-1, 1]",
    ),
    "flat inf": (
        ("box",),
        lambda x: put(x, 9, INF),
        "env {env}: action[9] is inf; allowed: a finite number",
    ),
    "flat shape": (("box",), lambda x: x[:, :31], "action has shape {s31}; expected {s32}"),
    "level too large": (
        ("multidiscrete",),
        lambda x: put(x, 2, 11),
        "env {env}: action[2] is 11; allowed: whole numbers 0 to 10",
    ),
    "level negative": (
        ("multidiscrete",),
        lambda x: put(x, 5, -1),
        "env {env}: action[5] is -1; allowed: whole numbers 0 to 3",
    ),
    "level float": (
        ("multidiscrete",),
        lambda x: x / 2,
        "action has dtype torch.float64; expected an integer dtype",
    ),
    "level shape": (("multidiscrete",), lambda x: x[:, :5], "action has shape {s5}; expected {s6}"),
}


@pytest.mark.parametrize(
    ("action_format", "fault"),
    [(action_format, name) for name, (formats, *_) in FAULTS.items() for action_format in formats],
)
@pytest.mark.parametrize("library", ["numpy", "torch"])
@BATCH_SHAPES
def test_bad_action_is_refused_with_field_value_and_range(
    batch_shape, library, action_format, fault, make_problem
):
    _, spoil, message = FAULTS[fault]
    action = of_shape(spoil(GOOD[action_format]), batch_shape)
    if library == "torch" and fault != "polymer text":
        action = to_torch(action)
    shapes = {f"s{size}": (*batch_shape, size) for size in range(1, 33)}
    message = message.format(env=len(batch_shape), s=batch_shape, **shapes)
    with pytest.raises(ValueError, match=re.escape(message)):
        make_problem(action_format).design(action, batch_shape)


VARIANTS = {
    "int8": lambda a: a | {"polymer_id": a["polymer_id"].astype(np.int8)},
    "uint16": lambda a: a | {"coverage": a["coverage"].astype(np.uint16)},
    "column": lambda a: a | {name: a[name][..., None] for name in ("polymer_id", "coverage")},
    "float64": lambda a: a | {"formulation": a["formulation"].astype(np.float64)},
    "torch": to_torch,
    "torch int32": lambda a: to_torch(a) | {"coverage": torch.tensor(a["coverage"]).int()},
    "read-only": lambda a: each(lambda x: np.broadcast_to(x, x.shape), a),
    "python": lambda a: each(lambda x: x.tolist(), a),
    "tuple": lambda a: tuple(a.values()),
    "list": lambda a: list(a.values()),
}


@pytest.mark.parametrize("variant", VARIANTS)
@BATCH_SHAPES
def test_action_may_come_in_any_container_library_and_integer_dtype(
    batch_shape, variant, make_problem
):
    action = VARIANTS[variant](of_shape(GOOD["dict"], batch_shape))
    problem = make_problem("tuple" if variant in ("tuple", "list") else "dict")
    design = problem.design(action, batch_shape)
    assert [value.dtype for value in design] == [torch.int64, torch.float32, torch.int64]
    rows = slice(None) if batch_shape else slice(1, 2)
    for value, expected in zip(design, GOOD["tuple"], strict=True):
        np.testing.assert_array_equal(value, expected[rows])


@pytest.mark.parametrize("action_format", GOOD)
def test_skipped_rows_are_neither_checked_nor_passed_on(action_format, make_problem):
    def spoil(x: np.ndarray) -> np.ndarray:
        return put(x, NAN if x.dtype.kind == "f" else -99)

    problem, good = make_problem(action_format), GOOD[action_format]
    design = problem.design(each(spoil, good), (3,), skip=torch.tensor([False, True, False]))
    for value, expected in zip(design, problem.design(good, (3,)), strict=True):
        assert torch.equal(value[[0, 2]], expected[[0, 2]])
        assert (value[1] == 0).all()
    with pytest.raises(ValueError, match=r"^env 1: "):
        problem.design(each(spoil, good), (3,), skip=torch.tensor([True, False, True]))


def test_unvalidated_problem_looks_at_shapes_but_at_no_value(make_problem):
    problem = make_problem(validate=False)
    assert problem.design(GOOD["dict"] | {"coverage": [99] * 3}, (3,)).coverage.tolist() == [99] * 3
    with pytest.raises(ValueError, match=r"coverage has shape \(2,\); expected \(3,\) or \(3, 1\)"):
        problem.design(GOOD["dict"] | {"coverage": [0, 0]}, (3,))


@pytest.mark.parametrize(
    ("patients", "expected"),
    [
        (["cy", "ann", "bo"], [2, 0, 1]),
        (("cy", 0, np.int64(1)), [2, 0, 1]),
        (np.array([2, 0, 1], np.uint8), [2, 0, 1]),
        (np.array(["cy", "ann", "bo"]), [2, 0, 1]),
        (torch.tensor([2, 0, 1]), [2, 0, 1]),
        (torch.tensor([[2], [0], [1]], dtype=torch.int32), [2, 0, 1]),
        ("cy", [2]),
        (2, [2]),
        (np.int64(2), [2]),
        (np.array("cy"), [2]),
        (torch.tensor(2), [2]),
        (["cy"], [2]),
    ],
    ids=lambda value: f"{type(value).__name__} {value}",
)
def test_patients_are_found_by_id_or_index(patients, expected, make_problem):
    index = make_problem().patient_indices(patients, (3,) if len(expected) == 3 else ())
    assert index.tolist() == expected
    if isinstance(patients, torch.Tensor):
        assert index.data_ptr() != patients.data_ptr()


@pytest.mark.parametrize(
    ("patients", "batch_shape", "message"),
    [
        ("dan", (), "three patients has no patient 'dan'; nearest: "),
        (3, (), "env 0: patient_id is 3; allowed: whole numbers 0 to 2"),
        (-1, (), "env 0: patient_id is -1; allowed: whole numbers 0 to 2"),
        (1.0, (), "patient_id has dtype torch.float64; expected an integer dtype"),
        (True, (), "patient_id has dtype torch.bool; expected an integer dtype"),
        ([1, 2], (), "patient_id has shape (2,); expected () or (1,)"),
        (["ann", "bo", "dan"], (3,), "three patients has no patient 'dan'"),
        ([0, 3, 1], (3,), "env 1: patient_id is 3; allowed: whole numbers 0 to 2"),
        (["ann", "bo"], (3,), "patient_id has shape (2,); expected (3,) or (3, 1)"),
        ("ann", (3,), "patient_id has shape (); expected (3,) or (3, 1)"),
    ],
)
def test_bad_patient_is_refused_with_its_reason(patients, batch_shape, message, make_problem):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_problem().patient_indices(patients, batch_shape)


def test_outcome_that_is_not_finite_is_refused_with_patient_and_design(make_problem, toy_model):
    def broken_model(patient, *design):
        outcomes = toy_model(patient, *design)
        return outcomes._replace(
            delta_ef_pct=outcomes.delta_ef_pct.where(patient[..., 0] != 40.0, NAN)
        )

    problem = make_problem(reward_model=broken_model)
    state = dynamics.initial(torch.arange(3), problem.params)
    design = problem.design(GOOD["dict"], (3,))
    with pytest.raises(ValueError, match="the reward model returned") as error:
        problem.transition(state, design)
    assert str(error.value) == (
        "env 1: the reward model returned {'delta_ef_pct': nan, 'stress_reduction_pct': 60.0, "
        "'optimal_logit': 0.0, 'toxicity_risk': 0.25, 'structural_integrity': 0.6000000238418579, "
        "'fibrosis_risk': 0.25} for patient bo and the design polymer_id=6, "
        "formulation=[20.0, 90.0, 0.25, 3.0], coverage=3; expected finite outcomes"
    )
    skipped = problem.transition(state, design, skip=torch.tensor([False, True, False]))
    assert skipped.outcomes.delta_ef_pct[[0, 2]].tolist() == [3.0, 9.0]
