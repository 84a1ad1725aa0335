"""Deterministic designs that would break a safety limit, moved back to its safe side.

A policy that designs close to a limit, where many patients are served best, oversteps it for one in
some thousands whom it has not met. The reward model, which is there wherever designs are evaluated,
says so beforehand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hydrogel_gym.problem.fields import FORMULATION_HIGH, FORMULATION_LOW
from hydrogel_gym.problem.reward import compute_reward, safety_margins

# Of an index from 0 to 1: the room that is kept to a limit, and by how much a design that is moved
# may overstep it. Who oversteps it by more has not learnt the limit yet, which is to be seen.
ROOM, LARGEST_OVERSTEP = 5e-4, 0.02
PROBE = 1e-3  # step of a difference quotient, where each parameter's range is 1
LONGEST_MOVE = 0.1  # in the same unit


@torch.no_grad()
def on_safe_side(design: dict[str, Tensor], problem: Any) -> dict[str, Tensor]:
    """One step of Newton's method towards the limit that is overstepped, where it pays.

    Slopes are difference quotients, since not every reward model has gradients.

    Args:
        design: of P patients: `polymer_id`, `coverage` (P,) and `formulation` (P, D).
        problem: reward model, limits and the P patients, in this order.

    Returns:
        The design; formulations that slightly overstep a limit, and earn more on its safe side, are
        there.
    """
    config, patients = problem.params.reward_config, problem.params.patients
    formulation = design["formulation"]
    low, high = (torch.from_numpy(x).to(formulation) for x in (FORMULATION_LOW, FORMULATION_HIGH))

    def evaluated(share: Tensor) -> tuple[Tensor, Tensor]:
        """Room to the nearest limit and reward, (N, P) each, of formulations (N, P, D)."""
        shape = share.shape[:-1]
        outcomes = problem.reward_model(
            patients.expand(*shape, -1).flatten(0, 1),
            design["polymer_id"].expand(shape).flatten(),
            torch.lerp(low, high, share).flatten(0, 1),
            design["coverage"].expand(shape).flatten(),
        )
        room = torch.stack([*safety_margins(outcomes, config).values()]).amin(0)
        return room.view(shape), compute_reward(outcomes, config=config).view(shape)

    share = ((formulation - low) / (high - low)).unsqueeze(0)
    step = torch.where(share > 0.5, -PROBE, PROBE)  # inwards
    axes = torch.eye(len(low)).to(share).unsqueeze(1)
    room, reward = evaluated(torch.cat([share, share + axes * step]))
    slope = (room[1:] - room[0]).T / step[0]
    outwards = ((share[0] <= 0.0) & (slope < 0.0)) | ((share[0] >= 1.0) & (slope > 0.0))
    slope = slope.masked_fill(outwards, 0.0)
    steepness = slope.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    length = ((ROOM - room[0]).unsqueeze(-1) / steepness).clamp(0.0, LONGEST_MOVE)
    moved = (share + length * slope / steepness).clamp(0.0, 1.0)
    is_slight = (room[0] < 0.0) & (room[0] >= -LARGEST_OVERSTEP)
    pays = is_slight & (evaluated(moved)[1][0] > reward[0])
    safe = torch.lerp(low, high, moved[0])
    return design | {"formulation": torch.where(pays.unsqueeze(-1), safe, formulation)}
