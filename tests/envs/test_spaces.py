from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hydrogel_gym.envs.spaces import (
    FLAT_ACTION_DIM,
    FORMULATION_LEVELS,
    action_space,
    decode_box,
    decode_multidiscrete,
    encode_box,
    encode_multidiscrete,
    episode_fields,
    observation_space,
    split_observation,
)
from hydrogel_gym.problem.fields import (
    COVERAGE_FRACTIONS,
    COVERAGES,
    FORMULATION_FIELDS,
    FORMULATION_HIGH,
    FORMULATION_LOW,
    OUTCOME_FIELDS,
    PATIENT_FIELDS,
    Design,
    Outcomes,
)
from hydrogel_gym.problem.polymers import NUM_POLYMERS

DESIGNS = action_space("dict")


def batched(action: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(action)[None])


def first(design: Design) -> dict[str, np.ndarray]:
    """The only design of a batch, as an element of the Dict space."""
    return {head: value[0].numpy() for head, value in design._asdict().items()}


# A batch of one of anything that may be requested.
DESIGN = st.builds(
    lambda polymer_id, formulation, coverage: Design(
        torch.tensor([polymer_id]), torch.tensor([formulation]), torch.tensor([coverage])
    ),
    st.integers(0, NUM_POLYMERS - 1),
    st.tuples(*(st.floats(item.low, item.high, width=32) for item in FORMULATION_FIELDS)),
    st.integers(0, len(COVERAGES) - 1),
)


def test_observation_fields_keep_the_order_of_the_source():
    assert [item.name for item in (*PATIENT_FIELDS, *episode_fields(1, 1.0))] == [
        "lvef_pct",
        "gls_pct",
        "edv_ml",
        "esv_ml",
        "scar_fraction_pct",
        "bz_fraction_pct",
        "bz_stress_kpa",
        "healthy_stress_kpa",
        "stress_concentration",
        "transmurality",
        "wall_thickness_mm",
        "current_best_score",
        "iteration",
    ]


def test_outcome_type_has_the_fields_of_the_table():
    assert Outcomes._fields == tuple(item.name for item in OUTCOME_FIELDS)


def test_every_coverage_level_has_a_fraction_and_more_of_it_covers_more():
    assert len(COVERAGE_FRACTIONS) == len(COVERAGES)
    assert list(COVERAGE_FRACTIONS) == sorted(COVERAGE_FRACTIONS)


@pytest.mark.parametrize(
    ("observe_explored", "size"), [(False, 13), (True, 37)], ids=["plain", "explored"]
)
def test_box_observation_has_the_bounds_of_the_fields(observe_explored, size):
    space = observation_space("box", horizon=5, max_score=40.0, observe_explored=observe_explored)
    fields = (*PATIENT_FIELDS, *episode_fields(5, 40.0))
    assert (space.shape, space.dtype) == ((size,), np.float32)
    np.testing.assert_array_equal(space.low[:13], np.float32([item.low for item in fields]))
    np.testing.assert_array_equal(space.high[:13], np.float32([item.high for item in fields]))
    assert space.high[11:13].tolist() == [40.0, 5.0]
    assert (space.low[13:] == 0.0).all()
    assert (space.high[13:] == 1.0).all()


@pytest.mark.parametrize("observe_explored", [False, True], ids=["plain", "explored"])
def test_dict_observation_is_the_box_cut_into_groups(observe_explored):
    kwargs = {"horizon": 5, "max_score": 40.0, "observe_explored": observe_explored}
    box, groups = observation_space("box", **kwargs), observation_space("dict", **kwargs)
    parts = {
        bound: split_observation(torch.from_numpy(getattr(box, bound))) for bound in ("low", "high")
    }
    sizes = {
        "patient_features": 6,
        "tissue_features": 5,
        "current_best_score": 1,
        "iteration": 1,
    } | ({"explored_polymers": NUM_POLYMERS} if observe_explored else {})
    assert {name: space.shape[0] for name, space in groups.items()} == sizes
    assert list(parts["low"]) == list(sizes)
    for name, space in groups.items():
        assert space.dtype == np.float32
        np.testing.assert_array_equal(space.low, parts["low"][name])
        np.testing.assert_array_equal(space.high, parts["high"][name])


def test_hybrid_action_is_polymer_formulation_coverage_in_physical_units():
    heads = {
        "polymer_id": spaces.Discrete(24),
        "formulation": spaces.Box(np.float32([5, 7, 0, 1]), np.float32([30, 180, 1, 5])),
        "coverage": spaces.Discrete(4),
    }
    assert action_space("dict") == spaces.Dict(heads)
    assert action_space("tuple") == spaces.Tuple(tuple(heads.values()))


def test_flat_actions_have_fixed_sizes():
    assert action_space("box") == spaces.Box(-1.0, 1.0, (32,))
    assert action_space("multidiscrete") == spaces.MultiDiscrete([24, 11, 11, 11, 11, 4])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: action_space("text"), r"action_format is 'text'; allowed: \('dict', 'tuple'"),
        (
            lambda: observation_space("x", horizon=1, max_score=1.0, observe_explored=False),
            r"obs_format is 'x'; allowed: \('box', 'dict'\)",
        ),
    ],
    ids=["action", "observation"],
)
def test_unknown_format_is_refused_with_the_known_ones(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@given(st.data(), st.tuples(*[st.integers(2, 200)] * len(FORMULATION_FIELDS)))
def test_every_multidiscrete_action_is_a_design_that_encodes_back_to_it(data, num_levels):
    nvec = action_space("multidiscrete", num_levels=num_levels).nvec
    action = data.draw(st.tuples(*(st.integers(0, int(size) - 1) for size in nvec)))
    design = decode_multidiscrete(batched(action), num_levels)
    assert DESIGNS.contains(first(design))
    assert encode_multidiscrete(design, num_levels)[0].tolist() == list(action)


@given(st.sampled_from([FORMULATION_LEVELS, (2, 3, 50, 7)]), DESIGN)
def test_nearest_levels_of_a_design_are_at_most_half_a_level_away(num_levels, design):
    action = encode_multidiscrete(design, num_levels)
    assert (action[0, 0], action[0, -1]) == (design.polymer_id, design.coverage)
    distance = abs(decode_multidiscrete(action, num_levels).formulation - design.formulation)
    half = (FORMULATION_HIGH - FORMULATION_LOW) / (np.array(num_levels) - 1) / 2
    assert (distance[0].numpy() <= half * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("level", "bound"), [(0, FORMULATION_LOW), (10, FORMULATION_HIGH)], ids=["low", "high"]
)
def test_outermost_levels_and_flat_values_are_the_bounds_themselves(level, bound):
    levels = decode_multidiscrete(torch.tensor([[0, *[level] * 4, 0]]))
    np.testing.assert_array_equal(levels.formulation[0], bound)
    flat = decode_box(torch.full((1, FLAT_ACTION_DIM), level / 5.0 - 1.0))
    np.testing.assert_array_equal(flat.formulation[0], bound)


@given(arrays(np.float32, FLAT_ACTION_DIM, elements=st.floats(-1, 1, width=32)))
def test_every_flat_action_in_its_space_is_a_design(action):
    assert DESIGNS.contains(first(decode_box(batched(action))))


@given(DESIGN)
def test_every_design_can_be_written_as_a_flat_action(design):
    action = encode_box(design)
    assert action_space("box").contains(action[0].numpy())
    again = decode_box(action)
    assert torch.equal(again.polymer_id, design.polymer_id)
    assert torch.equal(again.coverage, design.coverage)
    # Two float32 roundings of a number up to 1, stretched to the width of the range.
    tolerance = 2e-7 * (FORMULATION_HIGH - FORMULATION_LOW) + 1e-6
    assert (abs(again.formulation - design.formulation)[0].numpy() <= tolerance).all()


def test_flat_formulation_beyond_its_space_is_left_beyond_its_box():
    design = decode_box(torch.full((1, FLAT_ACTION_DIM), 2.0))
    np.testing.assert_allclose(design.formulation[0], [42.5, 266.5, 1.5, 7.0])
