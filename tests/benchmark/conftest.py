"""Scripts of `benchmark/` are imported as they import each other: from that folder."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmark"))


class Agent:
    """A policy that always takes polymer 4, and scatters formulations when it samples."""

    def design(self, obs, generator=None):
        size = (len(obs), 4)
        share = torch.rand(size, generator=generator) if generator else torch.full(size, 0.5)
        low, high = torch.tensor([[5.0, 7.0, 0.0, 1.0], [30.0, 180.0, 1.0, 5.0]])
        four = torch.full(size[:1], 4)
        design = {"polymer_id": four, "formulation": low.lerp(high, share), "coverage": four - 1}
        return design, torch.zeros(len(obs))


@pytest.fixture
def agent():
    return Agent()
