from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hydrogel_gym.models.mechanistic import REFERENCES, MechanisticModel, MechanisticParams
from hydrogel_gym.problem.response import (
    MAX_RESPONSE_SD,
    RESPONSE_FIELDS,
    RESPONSE_NAMES,
    draw_response,
    response_at,
    response_levels,
)
from hydrogel_gym.problem.streams import NUM_LEVELS, draw_levels

NUM = len(RESPONSE_FIELDS)


@given(
    st.floats(0.01, MAX_RESPONSE_SD),
    st.lists(st.floats(1e-9, 1 - 1e-9), min_size=NUM, max_size=NUM),
)
@settings(max_examples=30, deadline=None)
def test_factors_stay_within_their_ranges_and_rise_with_the_uniform_number(sd, uniform):
    shares = torch.tensor([uniform, [(1 + u) / 2 for u in uniform]], dtype=torch.float64)
    lower, higher = response_at(shares, sd)
    for i, item in enumerate(RESPONSE_FIELDS):
        assert item.low <= lower[i] <= higher[i] <= item.high


def test_prior_is_log_normal_about_the_prediction_while_the_ranges_are_far():
    levels = response_levels(0.1).log()
    torch.testing.assert_close(levels.mean(0), torch.zeros_like(levels[0]), atol=1e-6, rtol=0)
    # Middles of levels leave out the ends of the tails.
    torch.testing.assert_close(levels.std(0), torch.full_like(levels[0], 0.1), atol=2e-4, rtol=0)
    assert (response_levels(0.0) == 1.0).all()


def test_widest_prior_has_one_deviation_within_the_narrowest_range():
    ends = [abs(math.log(end)) for item in RESPONSE_FIELDS for end in (item.low, item.high)]
    assert min(ends) == MAX_RESPONSE_SD
    assert all(item.low < 1.0 < item.high for item in RESPONSE_FIELDS)


def test_draws_are_of_key_and_episode_alone_and_of_every_level_alike():
    levels = response_levels(0.3)
    keys, episodes = torch.arange(20_000), torch.arange(20_000) % 7
    drawn = draw_response(keys, episodes, levels)
    torch.testing.assert_close(drawn[5:6], draw_response(keys[5:6], episodes[5:6], levels))
    torch.testing.assert_close(drawn.mean(0), levels.mean(0), rtol=0.01, atol=0)
    correlation = torch.corrcoef(drawn.T) - torch.eye(NUM, dtype=torch.float64)
    assert correlation.abs().max() < 0.03
    counts = torch.bincount(draw_levels(NUM, keys, 0).flatten(), minlength=NUM_LEVELS)
    assert counts.min() > 60
    assert counts.max() < 180  # about 117 each


def test_more_draws_than_the_bits_hold_are_refused():
    with pytest.raises(ValueError, match="^num is 7; allowed: 0 to 6$"):
        draw_levels(7, torch.zeros(1, dtype=torch.int64))


def designs(num: int) -> tuple:
    generator = torch.Generator().manual_seed(0)
    patient = torch.tensor([30.0, -10, 200, 140, 20, 12, 36, 18, 2.1, 0.5, 8], dtype=torch.float64)
    share = torch.rand(num, 4, generator=generator, dtype=torch.float64)
    low, high = (torch.tensor(x, dtype=torch.float64) for x in ([5, 7, 0, 1], [30, 180, 1, 5]))
    return (
        patient.expand(num, -1),
        torch.arange(num) % 24,
        low + share * (high - low),
        (torch.arange(num) % 4),
    )


@pytest.mark.parametrize("index", range(NUM), ids=RESPONSE_NAMES)
def test_factor_scales_the_constants_that_its_field_names(index):
    item, inputs = RESPONSE_FIELDS[index], designs(96)
    response = torch.ones(96, NUM, dtype=torch.float64)
    response[:, index] = 1.7
    scale = 1 / 1.7 if item.divides else 1.7
    scaled = {name: getattr(MechanisticParams(), name) * scale for name in item.constants}
    expected = MechanisticModel(params=dataclasses.replace(MechanisticParams(), **scaled))(*inputs)
    found, plain = MechanisticModel()(*inputs, response), MechanisticModel()(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(found, plain, strict=True))
    assert set(item.constants) <= set(MechanisticParams.names_graded("D"))
    cited = {key.strip("[]") for key in item.remark.replace(",", " ").split() if key[0] == "["}
    assert {key.rstrip("];:") for key in cited} <= set(REFERENCES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_factors_of_one_change_no_bit(dtype):
    patient, polymer_id, formulation, coverage = designs(96)
    inputs = patient.to(dtype), polymer_id, formulation.to(dtype), coverage
    plain = MechanisticModel()(*inputs)
    same = MechanisticModel()(*inputs, torch.ones(96, NUM, dtype=dtype))
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))


def test_sensitive_patients_fare_worse():
    inputs, model = designs(96), MechanisticModel()
    low, high = (
        model(*inputs, torch.full((96, NUM), value, dtype=torch.float64)) for value in (0.8, 1.2)
    )
    assert (high.toxicity_risk >= low.toxicity_risk).all()
    assert (high.structural_integrity <= low.structural_integrity).all()
