"""Designs that would break a safety limit are moved to its safe side; no others are touched."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hydrogel_gym import Outcomes, RewardConfig
from hydrogel_gym.runs.safeguard import ROOM, on_safe_side


def model(patient, polymer_id, formulation, coverage):
    """Gain and toxicity rise with stiffness (5 to 50 kPa); toxicity is 0.3 at 23 kPa for 30 %."""
    stiffness, zero = formulation[:, 0], 0.0 * patient[:, 0]
    toxicity = 0.3 + 0.01 * (stiffness - 23.0) + 0.001 * (patient[:, 0] - 30.0)
    return Outcomes(0.1 * stiffness + zero, zero, zero, toxicity, zero + 1.0, zero)


@pytest.fixture
def problem(three_patients):
    patients = three_patients.features.float()  # of 30, 40 and 25 %
    config = RewardConfig(toxicity_limit=0.3, toxicity_penalty=5.0)
    params = SimpleNamespace(patients=patients, reward_config=config)
    return SimpleNamespace(reward_model=model, params=params)


def designed(stiffness):
    formulation = torch.tensor([[x, 40.0, 0.2, 2.0] for x in stiffness])
    index = torch.tensor([0, 1, 2])
    return {"polymer_id": index, "formulation": formulation, "coverage": index}


def test_design_slightly_over_a_limit_keeps_a_little_room_and_others_stay_to_the_bit(problem):
    before = designed([24.0, 21.0, 33.5])  # toxicity 0.31, 0.29, 0.4
    after = on_safe_side(before, problem)
    assert after["formulation"][0, 0].item() == pytest.approx(23.0 - ROOM / 0.01, abs=1e-3)
    assert torch.equal(after["formulation"][1:], before["formulation"][1:])
    assert torch.equal(after["formulation"][:, 1:], before["formulation"][:, 1:])


def test_design_stays_where_the_safe_side_earns_less(problem):
    problem.params.reward_config = RewardConfig(toxicity_limit=0.3, toxicity_penalty=0.01)
    before = designed([24.0, 21.0, 23.5])
    assert torch.equal(on_safe_side(before, problem)["formulation"], before["formulation"])
