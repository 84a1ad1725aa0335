from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

from hydrogel_gym.envs.spaces import (
    action_space,
    episode_fields,
    observation_space,
    split_observation,
)
from hydrogel_gym.problem.fields import (
    COVERAGE_FRACTIONS,
    COVERAGES,
    OUTCOME_FIELDS,
    PATIENT_FIELDS,
    Outcomes,
)
from hydrogel_gym.problem.polymers import NUM_POLYMERS


def test_fields_keep_the_order_of_the_source():
    assert ", ".join(item.name for item in (*PATIENT_FIELDS, *episode_fields(1, 1.0))) == (
        "lvef_pct, gls_pct, edv_ml, esv_ml, scar_fraction_pct, bz_fraction_pct, bz_stress_kpa, "
        "healthy_stress_kpa, stress_concentration, transmurality, wall_thickness_mm, "
        "current_best_score, iteration"
    )
    assert Outcomes._fields == tuple(item.name for item in OUTCOME_FIELDS)
    assert len(COVERAGE_FRACTIONS) == len(COVERAGES)
    assert list(COVERAGE_FRACTIONS) == sorted(COVERAGE_FRACTIONS)


@pytest.mark.parametrize("explored", [0, NUM_POLYMERS], ids=["plain", "explored"])
def test_observation_has_the_bounds_of_the_fields_and_the_dict_groups_them(explored):
    kwargs = {"horizon": 5, "max_score": 40.0, "observe_explored": explored > 0}
    box, groups = observation_space("box", **kwargs), observation_space("dict", **kwargs)
    fields = (*PATIENT_FIELDS, *episode_fields(5, 40.0))
    low, high = ([getattr(item, bound) for item in fields] for bound in ("low", "high"))
    assert high[11:] == [40.0, 5.0]
    assert box == spaces.Box(np.float32([*low, *[0] * explored]), np.float32(high + [1] * explored))
    sizes = {"patient_features": 6, "tissue_features": 5, "current_best_score": 1, "iteration": 1}
    sizes |= {"explored_polymers": explored} if explored else {}
    assert {name: space.shape[0] for name, space in groups.items()} == sizes
    lows, highs = (split_observation(torch.from_numpy(bound)) for bound in (box.low, box.high))
    assert list(lows) == list(highs) == list(sizes)
    for name, space in groups.items():
        assert space == spaces.Box(lows[name].numpy(), highs[name].numpy())


def test_action_is_polymer_formulation_coverage_in_physical_units_or_flat():
    heads = {
        "polymer_id": spaces.Discrete(24),
        "formulation": spaces.Box(np.float32([5, 7, 0, 1]), np.float32([30, 180, 1, 5])),
        "coverage": spaces.Discrete(4),
    }
    unit = heads | {"formulation": spaces.Box(-1.0, 1.0, (4,))}
    assert action_space("dict") == spaces.Dict(heads)
    assert action_space("tuple") == spaces.Tuple(tuple(heads.values()))
    assert action_space("dict", rescaled=True) == spaces.Dict(unit)
    assert action_space("tuple", rescaled=True) == spaces.Tuple(tuple(unit.values()))
    assert action_space("box") == spaces.Box(-1.0, 1.0, (32,))
    assert action_space("multidiscrete") == spaces.MultiDiscrete([24, 11, 11, 11, 11, 4])
