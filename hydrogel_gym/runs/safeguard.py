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

    def evaluated(rows: Tensor | slice, formulations: Tensor) -> tuple[Tensor, Tensor]:
        """Room to the nearest limit and reward, (N, R) each, of formulations (N, R, D)."""
        shape = formulations.shape[:-1]
        outcomes = problem.reward_model(
            patients[rows].expand(*shape, -1).flatten(0, 1),
            design["polymer_id"][rows].expand(shape).flatten(),
            formulations.flatten(0, 1),
            design["coverage"][rows].expand(shape).flatten(),
        )
        room = torch.stack([*safety_margins(outcomes, config).values()]).amin(0)
        return room.view(shape), compute_reward(outcomes, config=config).view(shape)

    every = design["formulation"]
    (room,), _ = evaluated(slice(None), every.unsqueeze(0))
    rows = ((room < 0.0) & (room >= -LARGEST_OVERSTEP)).nonzero().squeeze(-1)
    if not len(rows):
        return design
    low, high = (torch.from_numpy(x).to(every) for x in (FORMULATION_LOW, FORMULATION_HIGH))
    share = (every[rows] - low) / (high - low)
    step = torch.where(share > 0.5, -PROBE, PROBE)  # inwards
    probes = torch.cat([share.unsqueeze(0), share + torch.diag_embed(step).movedim(1, 0)])
    room, reward = evaluated(rows, torch.lerp(low, high, probes))
    slope = (room[1:] - room[0]).T / step
    outwards = ((share <= 0.0) & (slope < 0.0)) | ((share >= 1.0) & (slope > 0.0))
    slope = slope.masked_fill(outwards, 0.0)
    steepness = slope.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    length = ((ROOM - room[0]).unsqueeze(-1) / steepness).clamp(0.0, LONGEST_MOVE)
    moved = torch.lerp(low, high, (share + length * slope / steepness).clamp(0.0, 1.0))
    pays = (evaluated(rows, moved.unsqueeze(0))[1][0] > reward[0]).unsqueeze(-1)
    formulation = every.clone()
    formulation[rows] = torch.where(pays, moved, every[rows])
    return design | {"formulation": formulation}
