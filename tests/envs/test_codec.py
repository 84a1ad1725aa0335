"""Actions on their way in and back: what is read, and in which words anything else is refused."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.utils._pytree import tree_map

from hydrogel_gym.envs.codec import ActionCodec
from hydrogel_gym.envs.spaces import FLAT_ACTION_DIM, action_space
from hydrogel_gym.problem.fields import (
    COVERAGES,
    FORMULATION_FIELDS,
    FORMULATION_HIGH,
    FORMULATION_LOW,
    Design,
)
from hydrogel_gym.problem.polymers import NUM_POLYMERS

NAN, INF = float("nan"), float("inf")
HYBRID, FLAT = ("dict", "tuple"), ("box", "multidiscrete")
LEVELS = (2, 3, 50, 7)
CODECS = {
    **{name: ActionCodec(name) for name in HYBRID + FLAT},
    "levels": ActionCodec("multidiscrete", num_levels=LEVELS),
    "rescaled dict": ActionCodec("dict", rescaled=True),
    "rescaled tuple": ActionCodec("tuple", rescaled=True),
}
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
GOOD["rescaled dict"] = GOOD["dict"]


def to_torch(action):
    return tree_map(lambda x: torch.from_numpy(np.array(x)), action)


def of_shape(action, batch_shape: tuple[int, ...]):
    """All three actions, or the middle one without its batch dimension."""
    return action if batch_shape else tree_map(lambda x: x[1] if np.ndim(x) else x, action)


def put(value, *column):
    """Puts a value into the middle row of an array, or into one column of that."""

    def spoil(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[(1, *column)] = value
        return array

    return spoil


def cast(dtype):
    return lambda array: array.astype(dtype)


def first(size: int):
    return lambda array: array[:, :size]


def twice(array: np.ndarray) -> np.ndarray:
    return np.stack([array, array], -1)


def head(name: str, spoil):
    """Spoils one head of a hybrid action."""

    def spoil_head(action):
        if isinstance(action, dict):
            return action | {name: spoil(action[name])}
        heads = zip(Design._fields, action, strict=True)
        return tuple(spoil(x) if field == name else x for field, x in heads)

    return spoil_head


polymer, formulation, coverage = (functools.partial(head, name) for name in Design._fields)
DICT, TUPLE, BOX, LEVEL = ("dict",), ("tuple",), ("box",), ("multidiscrete",)
KEYS = "('polymer_id', 'formulation', 'coverage')"
CLIPPED = "allowed: a finite number, clipped to"
# Formats, what is done to three good actions, and the message, with B for the shape of the batch.
FAULTS = [
    (HYBRID, polymer(put(24)), "polymer_id is 24; allowed: whole numbers 0 to 23"),
    (HYBRID, polymer(cast(np.float32)), "polymer_id has dtype torch.float32; expected an integer"),
    (HYBRID, coverage(put(-2)), "coverage is -2; allowed: whole numbers 0 to 3"),
    (HYBRID, coverage(cast(bool)), "coverage has dtype torch.bool; expected an integer dtype"),
    (HYBRID, coverage(twice), "coverage has shape {B2}; expected {B} or {B1}"),
    (HYBRID, formulation(put(-INF, 3)), f"formulation[3] is -inf; {CLIPPED} [1, 5] (thickness_mm)"),
    (("rescaled dict",), formulation(put(NAN, 1)), f"formulation[1] is nan; {CLIPPED} [-1, 1]"),
    (HYBRID, formulation(first(3)), "formulation has shape {B3}; expected {B4}"),
    (HYBRID, formulation(cast(np.complex64)), "torch.complex64; expected a real number dtype"),
    (DICT, lambda action: action | {"dose": 1}, f"'coverage', 'dose'); expected {KEYS}"),
    (DICT, lambda _: GOOD["tuple"], f"action is a tuple; expected a dict of {KEYS}"),
    (TUPLE, lambda _: GOOD["dict"], f"action is a dict; expected a tuple of {KEYS}"),
    (TUPLE, lambda action: action[:2], f"action has 2 entries; expected a tuple of {KEYS}"),
    (BOX + LEVEL, lambda action: {"action": action}, "; expected numbers"),
    (BOX, put(NAN, 1), f"action[1] is nan; {CLIPPED} [-1, 1]"),
    (BOX, put(INF, 9), "action[9] is inf; allowed: a finite number"),
    (BOX, cast(bool), "action has dtype torch.bool; expected a real number dtype"),
    (BOX, first(31), "action has shape {B31}; expected {B32}"),
    (LEVEL, put(11, 2), "action[2] is 11; allowed: whole numbers 0 to 10"),
    (LEVEL, put(-1, 5), "action[5] is -1; allowed: whole numbers 0 to 3"),
    (LEVEL, first(5), "action has shape {B5}; expected {B6}"),
]


@pytest.mark.parametrize(
    ("action_format", "spoil", "message"),
    [(name, *fault) for formats, *fault in FAULTS for name in formats],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_action_is_refused_with_field_value_and_range(action_format, spoil, message):
    codec, bad = CODECS[action_format], spoil(GOOD[action_format])
    is_value = "; allowed: " in message  # and not a shape or a type
    for shape, action in (((), of_shape(bad, ())), ((3,), bad), ((3,), to_torch(bad))):
        shapes = {f"B{size}": (*shape, size) for size in range(1, 33)}
        expected = f"env {len(shape)}: {message}" if is_value else message.format(B=shape, **shapes)
        with pytest.raises(ValueError, match=re.escape(expected)):
            codec.check(codec.read(action, shape))
    if is_value:
        tensors = codec.read(bad, (3,))
        assert codec.allows(tensors).tolist() == [True, False, True]
        codec.check(tensors, skip=torch.tensor([False, True, False]))
        with pytest.raises(ValueError, match="^env 1: "):
            codec.check(tensors, skip=torch.tensor([True, False, True]))


@pytest.mark.parametrize("value", ["text", None, [[1, 2], [3]]])
def test_what_contains_no_numbers_is_refused(value):
    with pytest.raises(ValueError, match=r"polymer_id is .*; expected numbers"):
        CODECS["dict"].read(GOOD["dict"] | {"polymer_id": value}, (3,))


def cast_to(dtype, *names):
    return lambda a: a | {name: a[name].astype(dtype) for name in names or a}


VARIANTS = {
    "int8": cast_to(np.int8, "polymer_id"),
    "uint16": cast_to(np.uint16, "coverage"),
    "float64": cast_to(np.float64, "formulation"),
    "longdouble": cast_to(np.longdouble, "formulation"),
    "object": cast_to(object),
    "another byte order": lambda a: tree_map(lambda x: x.astype(x.dtype.newbyteorder(">")), a),
    "negative strides": lambda a: tree_map(lambda x: np.flip(np.flip(x).copy()), a),
    "read-only": lambda a: tree_map(lambda x: np.broadcast_to(x, x.shape), a),
    "column": lambda a: a | {name: a[name][..., None] for name in ("polymer_id", "coverage")},
    "torch": to_torch,
    "torch int32": lambda a: to_torch(a) | {"coverage": torch.tensor(a["coverage"]).int()},
    "with a gradient": lambda a: (
        to_torch(a) | {"formulation": torch.tensor(a["formulation"], requires_grad=True)}
    ),
    "python": lambda a: tree_map(lambda x: x.tolist(), a),
    "tuple": lambda a: tuple(a.values()),
    "list": lambda a: list(a.values()),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch_shape", [(), (3,)], ids=["single", "batch"])
def test_action_may_come_in_any_container_library_and_integer_dtype(batch_shape, variant):
    action = VARIANTS[variant](of_shape(GOOD["dict"], batch_shape))
    codec = CODECS["tuple" if variant in ("tuple", "list") else "dict"]
    design = codec.decode(codec.read(action, batch_shape))
    assert not design.formulation.requires_grad
    assert [value.dtype for value in design] == [torch.int64, torch.float32, torch.int64]
    rows = slice(None) if batch_shape else slice(1, 2)
    for value, expected in zip(design, GOOD["tuple"], strict=True):
        np.testing.assert_array_equal(value, expected[rows])


# A batch of one of anything that may be requested.
DESIGN = st.builds(
    lambda *heads: Design(*(torch.tensor([value]) for value in heads)),
    st.integers(0, NUM_POLYMERS - 1),
    st.tuples(*(st.floats(item.low, item.high, width=32) for item in FORMULATION_FIELDS)),
    st.integers(0, len(COVERAGES) - 1),
)
WIDTHS = torch.from_numpy(FORMULATION_HIGH - FORMULATION_LOW)
# Two float32 roundings of a number up to 1, stretched to the width of the range.
ROUNDING = 2e-7 * WIDTHS + 1e-6
TOLERANCES = dict.fromkeys(CODECS, ROUNDING) | {
    "multidiscrete": WIDTHS / 20 + ROUNDING,
    "levels": WIDTHS / (torch.tensor(LEVELS) - 1) / 2 + ROUNDING,
}


@settings(max_examples=40)
@given(DESIGN)
def test_every_design_survives_the_way_there_and_back_or_comes_to_the_nearest_level(design):
    for name, codec in CODECS.items():
        action = codec.encode(design)
        assert codec.space.contains(tree_map(lambda x: x[0].numpy()[()], action)), name
        again = codec.decode(codec.read(action, (1,)))
        assert (again.polymer_id, again.coverage) == (design.polymer_id, design.coverage), name
        assert ((again.formulation - design.formulation).abs() <= TOLERANCES[name]).all(), name


def heads_of(codec: ActionCodec, action) -> dict[str, np.ndarray]:
    design = codec.decode(codec.read(action, ()))
    heads = {name: value[0].numpy() for name, value in design._asdict().items()}
    assert action_space("dict").contains(heads)
    return heads


@settings(max_examples=40)
@given(st.data(), st.tuples(*[st.integers(2, 200)] * len(FORMULATION_FIELDS)))
def test_every_multidiscrete_action_is_a_design_that_encodes_back_to_it(data, num_levels):
    codec = ActionCodec("multidiscrete", num_levels=num_levels)
    sizes = (NUM_POLYMERS, *num_levels, len(COVERAGES))
    assert codec.space.nvec.tolist() == list(sizes)
    action = data.draw(st.tuples(*(st.integers(0, size - 1) for size in sizes)))
    heads = heads_of(codec, action)
    design = Design(*(torch.from_numpy(np.array(heads[name]))[None] for name in Design._fields))
    assert codec.encode(design)[0].tolist() == list(action)


@settings(max_examples=40)
@given(arrays(np.float32, FLAT_ACTION_DIM, elements=st.floats(-1, 1, width=32)))
def test_every_flat_action_in_its_space_is_the_design_of_its_largest_scores(action):
    heads = heads_of(CODECS["box"], action)
    assert (heads["polymer_id"], heads["coverage"]) == (action[4:28].argmax(), action[28:].argmax())


def test_outermost_levels_and_unit_values_are_the_bounds_themselves_and_others_beyond_them():
    beyond = [42.5, 266.5, 1.5, 7.0]  # which the environment clips
    for level, expected in ((0, FORMULATION_LOW), (10, FORMULATION_HIGH), (15, beyond)):
        unit = [level / 5.0 - 1.0] * 4
        actions = {"box": [*unit, *[0.0] * 28], "rescaled tuple": (7, unit, 2)}
        actions |= {} if level > 10 else {"multidiscrete": [0, *[level] * 4, 0]}
        for name, action in actions.items():
            design = CODECS[name].decode(CODECS[name].read(action, ()))
            np.testing.assert_array_equal(design.formulation[0], np.float32(expected), name)
