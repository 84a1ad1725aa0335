"""Scripts of `benchmark/` are imported as they import each other: from that folder."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmark"))


@pytest.fixture
def agent(ppo):
    torch.manual_seed(0)
    sizes = dict(obs_dim=13, num_polymers=24, num_coverages=4, hidden_dim=256, state_std=False)
    box = dict(formulation_low=[5.0, 7.0, 0.0, 1.0], formulation_high=[30.0, 180.0, 1.0, 5.0])
    return ppo.Agent(**sizes, **box, policy="factored")
