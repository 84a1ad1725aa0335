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
from collections.abc import Callable
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


class Candidates(NamedTuple):
    """N formulations for each of K pairs of P patients."""

    pairs: Tensor  # (P, K, 2) int64, polymer and coverage
    share: Tensor  # (P, K, N, D) formulations as shares of their box
    score: Tensor  # (P, K, N)


ScoreFunction = Callable[[Tensor, Tensor], Tensor]  # of `pairs` and `share`


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
    device, num_patients = patients.device, len(patients)
    generator = torch.Generator().manual_seed(seed)
    score_of = _score_function(patients, reward_model, config.stricter(LIMIT_MARGIN))
    engine = torch.quasirandom.SobolEngine(len(FORMULATION_FIELDS), scramble=True, seed=seed)
    share = (
        engine.draw(NUM_SOBOL, dtype=torch.float32)
        .to(device)
        .expand(num_patients, len(PAIRS), -1, -1)
    )
    pairs = torch.tensor(PAIRS, device=device).expand(num_patients, -1, -1)
    found = Candidates(pairs, share, score_of(pairs, share))
    for num_pairs, population, generations in ROUNDS:
        found = _select_fittest(found, num_pairs, population)
        for _ in range(generations):
            found = _evolve(found, score_of, generator)
    return _best(found)


def _score_function(
    patients: Tensor, reward_model: RewardFunction, config: RewardConfig
) -> ScoreFunction:
    """Score of formulations (P, K, N, D), shares of the box, for pairs (P, K, 2)."""
    broadcasts = getattr(reward_model, "broadcasts", False)

    def score_of(pairs: Tensor, share: Tensor) -> Tensor:
        batch = share.shape[:-1]
        formulation, (polymer_id, coverage) = _formulation(share), pairs[..., None, :].unbind(-1)
        inputs = patients[:, None, None], polymer_id, formulation, coverage
        if not broadcasts:  # one batch dimension, as in the environments
            every = (x.expand(*batch, *x.shape[3:]).flatten(0, 2) for x in inputs)
            inputs = next(every), next(every), next(every), next(every)
        outcomes = reward_model(*inputs)
        score = compute_reward(outcomes, config=config)
        is_finite = functools.reduce(torch.add, outcomes).isfinite()
        return torch.where(is_finite, score, torch.inf).view(batch)

    return score_of


def _formulation(share: Tensor) -> Tensor:
    low, high = (torch.from_numpy(b).to(share.device) for b in (FORMULATION_LOW, FORMULATION_HIGH))
    return torch.lerp(low, high, share)


def _select_fittest(found: Candidates, num_pairs: int, population: int) -> Candidates:
    """The leading pairs of each patient, and the best formulations of each of these."""
    pairs, share, score = found
    leading = score.amax(-1).topk(num_pairs, dim=1).indices
    pairs = pairs.gather(1, leading[..., None].expand(-1, -1, 2))
    score = score.gather(1, leading[..., None].expand(-1, -1, score.shape[2]))
    share = share.gather(1, leading[..., None, None].expand(-1, -1, *share.shape[2:]))
    score, fittest = score.topk(population, dim=2)
    share = share.gather(2, fittest[..., None].expand(-1, -1, -1, share.shape[-1]))
    return Candidates(pairs, share, score)


def _evolve(found: Candidates, score_of: ScoreFunction, generator: torch.Generator) -> Candidates:
    """One generation of differential evolution."""
    pairs, share, score = found
    _, num_pairs, population, dim = share.shape
    members = (1, num_pairs, population, 1)
    lowest, highest = DIFFERENTIAL_WEIGHT
    random = functools.partial(torch.rand, generator=generator, dtype=torch.float32)
    weight = lowest + (highest - lowest) * random(members)
    crossed = random((*members[:-1], dim)) < CROSSOVER_RATE
    weight, crossed = weight.to(share.device), crossed.to(share.device)
    # Two distinct members other than the current one, by rotating the population.
    shifts = 1 + torch.randperm(population - 1, generator=generator)[:2]
    one, other = (share.roll(shift, 2) for shift in shifts.tolist())
    leader = score.argmax(-1)[..., None, None].expand(-1, -1, 1, dim)
    trial = share + weight * (share.gather(2, leader) - share + one - other)
    trial = torch.where(crossed, trial, share).clamp(0.0, 1.0)
    trial_score = score_of(pairs, trial)
    accepted = trial_score >= score
    return Candidates(
        pairs,
        torch.where(accepted[..., None], trial, share),
        torch.where(accepted, trial_score, score),
    )


def _best(found: Candidates) -> Design:
    pairs, share, score = found
    rows = torch.arange(len(score), device=score.device)
    leader = score.flatten(1).argmax(-1)
    pair = pairs[rows, leader // score.shape[2]]
    return Design(pair[:, 0], _formulation(share.flatten(1, 2)[rows, leader]), pair[:, 1])
