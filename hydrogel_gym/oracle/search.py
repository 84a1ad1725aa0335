"""Batched global search for the design of largest reward, by low-discrepancy samples and evolution.

The safety penalties make the reward jump, and the best designs often lie right at a jump, so the
search takes no gradient: for every polymer and coverage the formulation box is sampled with a
low-discrepancy sequence [Sobol1967], and differential evolution [Storn1997] refines the best
samples of the pairs that still lead. Random numbers are shared by all patients, so a patient's
result does not depend on who else is in the cohort.

References:
    [Sobol1967] Sobol. On the distribution of points in a cube and the approximate evaluation of
    integrals. USSR Comput Math Math Phys 7:86. Scrambled.
    [Storn1997] Storn, Price. Differential evolution. J Glob Optim 11:341. Here the variant
    current-to-best/1/bin.
"""

from __future__ import annotations

import functools
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from hydrogel_gym.problem.fields import (
    COVERAGES,
    FORMULATION_FIELDS,
    FORMULATION_HIGH,
    FORMULATION_LOW,
    Design,
)
from hydrogel_gym.problem.polymers import NUM_POLYMERS
from hydrogel_gym.problem.reward import RewardConfig, RewardFunction, compute_reward

PAIRS = tuple(product(range(NUM_POLYMERS), range(len(COVERAGES))))
NUM_SOBOL = 128  # formulations per pair


class Round(NamedTuple):
    """Differential evolution of the leading pairs of a patient."""

    num_pairs: int
    population: int
    generations: int


# Every pair is refined a little before any is dropped: samples alone misjudge a pair whose good
# formulations lie in a thin layer under a safety limit.
ROUNDS = (Round(len(PAIRS), 24, 6), Round(24, 24, 16), Round(6, 24, 40))
CALLS_PER_SEARCH = len(PAIRS) * NUM_SOBOL + sum(
    r.num_pairs * r.population * r.generations for r in ROUNDS
)

DIFFERENTIAL_WEIGHT = (0.4, 0.9)  # drawn afresh for each trial ("dither")
CROSSOVER_RATE = 0.9  # [Storn1997] for parameters that depend on each other

# Batches of another shape, and other devices, round differently; a design must not lose its safety
# to that. The limits are tightened by this much in the search and by nothing in the score.
LIMIT_MARGIN = 1e-5


@torch.no_grad()
def search(
    patients: Tensor, reward_model: RewardFunction, config: RewardConfig, seed: int
) -> Design:
    """Best design of each patient in one search; no host read, any device.

    A design whose outcomes are not all finite counts as the best there is, so that it is what the
    caller gets to see.

    Args:
        patients: (P, C) float32.
        reward_model: the Stage-1 model.
        config: weights and limits.
        seed: of the samples and of the evolution, the same for every patient.

    Returns:
        `Design` of (P,), (P, D) and (P,) tensors on the patients' device.
    """
    device = patients.device
    num_patients, dim = patients.shape[0], len(FORMULATION_FIELDS)
    generator = torch.Generator().manual_seed(seed)
    low, high = (torch.from_numpy(b).to(device) for b in (FORMULATION_LOW, FORMULATION_HIGH))
    config = config.stricter(LIMIT_MARGIN)

    def judge(pairs: Tensor, share: Tensor) -> Tensor:
        """(P, K, N) scores of formulations (P, K, N, D), shares of the box, for pairs (P, K, 2)."""
        batch = share.shape[:-1]
        # One batch dimension, as in the environments: not every model broadcasts.
        outcomes = reward_model(
            patients[:, None, None].expand(*batch, -1).reshape(-1, patients.shape[-1]),
            pairs[..., None, 0].expand(batch).reshape(-1),
            torch.lerp(low, high, share).reshape(-1, dim),
            pairs[..., None, 1].expand(batch).reshape(-1),
        )
        score = compute_reward(outcomes, config=config)
        return torch.where(functools.reduce(torch.add, outcomes).isfinite(), score, torch.inf).view(
            batch
        )

    sobol = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(NUM_SOBOL)
    pairs = torch.tensor(PAIRS, device=device).expand(num_patients, -1, -1)
    share = sobol.to(device).expand(num_patients, len(PAIRS), -1, -1)
    score = judge(pairs, share)
    for num_pairs, population, generations in ROUNDS:
        leading = score.amax(-1).topk(num_pairs, dim=1).indices
        pairs = pairs.gather(1, leading[..., None].expand(-1, -1, 2))
        score = score.gather(1, leading[..., None].expand(-1, -1, score.shape[2]))
        share = share.gather(1, leading[..., None, None].expand(-1, -1, *share.shape[2:]))
        score, fittest = score.topk(population, dim=2)
        share = share.gather(2, fittest[..., None].expand(-1, -1, -1, dim))
        for _ in range(generations):
            members = (1, num_pairs, population, 1)
            lowest, highest = DIFFERENTIAL_WEIGHT
            weight = lowest + (highest - lowest) * torch.rand(members, generator=generator)
            crossed = torch.rand((*members[:-1], dim), generator=generator) < CROSSOVER_RATE
            weight, crossed = weight.to(device), crossed.to(device)
            # Two distinct members other than the current one, by rotating the population.
            shifts = 1 + torch.randperm(population - 1, generator=generator)[:2]
            one, other = (share.roll(shift, 2) for shift in shifts.tolist())
            leader = score.argmax(-1)[..., None, None].expand(-1, -1, 1, dim)
            trial = share + weight * (share.gather(2, leader) - share + one - other)
            trial = torch.where(crossed, trial, share).clamp(0.0, 1.0)
            trial_score = judge(pairs, trial)
            accepted = trial_score >= score
            score = torch.where(accepted, trial_score, score)
            share = torch.where(accepted[..., None], trial, share)
    rows = torch.arange(num_patients, device=device)
    leader = score.flatten(1).argmax(-1)
    pair = pairs[rows, leader // score.shape[2]]
    return Design(pair[:, 0], torch.lerp(low, high, share.flatten(1, 2)[rows, leader]), pair[:, 1])
