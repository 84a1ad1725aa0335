"""What Stage 3 has to know of a design beside its reward: how it can be made, and robustness.

Pure batched functions on tensors, any device. `train/rank_designs.py` writes what they give.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from hydrogel_gym.problem.dynamics import clip_formulation
from hydrogel_gym.problem.fields import FORMULATION_FIELDS, Design, Outcomes
from hydrogel_gym.problem.polymers import WINDOWS, PolymerTable
from hydrogel_gym.problem.reward import RewardConfig, RewardFunction, compute_reward
from hydrogel_gym.problem.reward import safety_margins as safety_margins

ERROR_FRAC = 0.05  # of each parameter, in manufacture; an assumption (grade D)
# Every parameter low, as requested or high: a batch each, the first of which is as requested.
PERTURBATIONS = torch.tensor(
    list(product((0.0, -1.0, 1.0), repeat=len(FORMULATION_FIELDS))), dtype=torch.float32
)


def window_distance(design: Design, polymers: PolymerTable) -> Tensor:
    """How far a request is inside the polymer's windows.

    Args:
        design: B designs.
        polymers: with the windows.

    Returns:
        (B,) smallest distance to an edge of one of the windows, as a share of the parameter's whole
        range; below 0 outside. A window of one value, as of what cannot conduct, counts only if it
        is missed.
    """
    distances = []
    for field, value in zip(FORMULATION_FIELDS, design.formulation.unbind(-1), strict=True):
        if field.name not in WINDOWS:
            continue
        window = getattr(polymers, field.name).to(value.device, value.dtype)[design.polymer_id]
        low, high = window.unbind(-1)
        inside = torch.minimum(value - low, high - value) / (field.high - field.low)
        is_met_value = (low == high) & (inside >= 0.0)
        distances.append(inside.masked_fill(is_met_value, torch.inf))
    return torch.stack(distances).amin(0)


def robustness(
    patient: Tensor, design: Design, reward_model: RewardFunction, config: RewardConfig
) -> tuple[Tensor, Tensor]:
    """Predicted reward if the parameters are missed by `ERROR_FRAC`.

    Args:
        patient: (B, C), of each design.
        design: B designs.
        reward_model: the Stage-1 model.
        config: weights and limits.

    Returns:
        (B,) worst and (B,) mean reward over `PERTURBATIONS`, formulations kept to their box.
    """
    worst = torch.full_like(design.formulation[:, 0], torch.inf)
    total = torch.zeros_like(worst)
    for signs in PERTURBATIONS.to(worst.device, worst.dtype):
        made = clip_formulation(design.formulation * (1.0 + ERROR_FRAC * signs))
        outcomes = reward_model(patient, design.polymer_id, made, design.coverage)
        reward = compute_reward(outcomes, config=config)
        worst, total = torch.minimum(worst, reward), total + reward
    return worst, total / len(PERTURBATIONS)


def pareto_rank(outcomes: Outcomes) -> Tensor:
    """Rank of each of N designs of one patient among the others.

    Large gain and stress relief, small toxicity and fibrosis are better. A design dominates another
    if it is no worse in any of the four and better in one.

    Returns:
        (N,) int64: 1 for those that none dominates, 2 for those that none of the rest does, ...
    """
    goals = torch.stack(
        [
            outcomes.delta_ef_pct,
            outcomes.stress_reduction_pct,
            -outcomes.toxicity_risk,
            -outcomes.fibrosis_risk,
        ],
        dim=-1,
    )
    no_worse = (goals[:, None] >= goals).all(-1)
    dominates = no_worse & ~no_worse.T  # [i, j]: i dominates j
    rank = torch.zeros(len(goals), dtype=torch.int64, device=goals.device)
    level = 0
    while (rank == 0).any():
        level += 1
        left = rank == 0
        front = left & ~(dominates & left[:, None]).any(0)
        rank = rank.masked_fill(front, level)
    return rank
