"""What measured designs say about a patient's hidden response: particles, moved as they narrow.

Each check is taken up in stages ([DelMoral2006]): the likelihood of its outcomes is raised to a
power that grows so that half of the particles keep their weight, the particles are drawn again by
their weights, and each is moved by differences of others ([TerBraak2006]), which have the scale and
the directions of what is still uncertain. The reward model itself is the likelihood.

Shapes: P patients, N particles, R factors of a response, T checks so far, K outcomes.

References:
    [DelMoral2006] Del Moral, Doucet, Jasra. Sequential Monte Carlo samplers. J R Stat Soc B 68:411.
    [TerBraak2006] ter Braak. A Markov chain Monte Carlo version of the genetic algorithm
    differential evolution. Stat Comput 16:239.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hydrogel_gym import RewardModel
from hydrogel_gym.problem.fields import Design
from hydrogel_gym.problem.response import RESPONSE_FIELDS, response_at

NUM_PARTICLES = 512
MOVES = 5  # after each stage
JUMP = 2.38 / math.sqrt(2 * len(RESPONSE_FIELDS))  # [TerBraak2006]
# Without noise the likelihood would be a point; so much is assumed at least, in outcome units. It
# is worth 0.01 points of the reward.
LEAST_DEVIATION = (0.003, 0.01, 0.01, 1e-4, 1e-4, 1e-4)
LOW = torch.tensor([item.low for item in RESPONSE_FIELDS]).log()
HIGH = torch.tensor([item.high for item in RESPONSE_FIELDS]).log()


class Posterior:
    """Equally likely responses of P patients, given what was measured."""

    def __init__(
        self,
        patients: Tensor,
        model: RewardModel,
        response_sd: float,
        noise: Sequence[float],
        seed: int,
        num_particles: int = NUM_PARTICLES,
    ) -> None:
        """Particles of the prior.

        Args:
            patients: (P, C) float32.
            model: takes a response.
            response_sd: of the prior.
            noise: K deviations of a measurement, each in its unit.
            seed: of everything drawn.
            num_particles: N.
        """
        self._patients, self._model, self._sd = patients[:, None, None], model, response_sd
        self._deviation = torch.tensor(noise).maximum(torch.tensor(LEAST_DEVIATION))
        self._generator = torch.Generator().manual_seed(seed)
        shape = (len(patients), num_particles, len(RESPONSE_FIELDS))
        uniform = torch.rand(shape, generator=self._generator, dtype=torch.float64)
        self._log = response_at(uniform.clamp(1e-9, 1 - 1e-9), response_sd).log().float()
        self._tried: list[Design] = []
        self._measured: list[Tensor] = []

    @property
    def responses(self) -> Tensor:
        """(P, N, R) factors."""
        return self._log.exp()

    @torch.no_grad()
    def add(self, design: Design, measured: Tensor) -> None:
        """Take up a check of each patient: a design, (P,) of all, and its (P, K) outcomes."""
        self._tried.append(design)
        self._measured.append(measured)
        power, density = torch.zeros(len(measured), 1), self._density(self._log)
        while power.min() < 1.0:
            step = _largest_step(density[1], 1.0 - power)
            power = power + step
            self._draw_again((step * density[1]).softmax(-1))
            density = self._density(self._log)
            for _ in range(MOVES):
                density = self._move(power, density)

    def _density(self, log_response: Tensor) -> Tensor:
        """(2, P, N) log density without the newest check, and what that adds."""
        tried = Design(
            *(torch.stack(parts, 1)[:, None] for parts in zip(*self._tried, strict=True))
        )
        outcomes = self._model(self._patients, *tried, log_response.exp()[:, :, None])
        measured = torch.stack(self._measured, 1)[:, None]  # (P, 1, T, K)
        loss, deviations = 0.0, self._deviation.tolist()
        for k, (predicted, deviation) in enumerate(zip(outcomes, deviations, strict=True)):
            loss = loss + ((predicted - measured[..., k]) / deviation).square()
        prior = (log_response / self._sd).square().sum(-1)
        inside = ((log_response >= LOW) & (log_response <= HIGH)).all(-1)
        before = torch.where(inside, prior + loss[..., :-1].sum(-1), torch.inf)
        return -0.5 * torch.stack([before, loss[..., -1]])

    def _draw_again(self, weight: Tensor) -> None:
        num = weight.shape[1]
        place = torch.arange(num) + torch.rand(len(weight), 1, generator=self._generator)
        index = torch.searchsorted(weight.cumsum(-1), place / num).clamp(max=num - 1)
        self._log = self._log.gather(1, index[..., None].expand_as(self._log))

    def _move(self, power: Tensor, density: Tensor) -> Tensor:
        """Propose a step for every particle, take it or not; returns the new densities."""
        patients, num, dim = self._log.shape
        order = torch.rand(patients, num, generator=self._generator).argsort(-1)
        other = self._log.gather(1, order[..., None].expand_as(self._log))
        scale = JUMP * torch.rand(patients, num, 1, generator=self._generator).mul(2).clamp(max=1.0)
        proposed = self._log + scale * (other - other.roll(1, 1))
        new = self._density(proposed)
        gain = new[0] - density[0] + power * (new[1] - density[1])
        chance = torch.rand(patients, num, generator=self._generator)
        taken = chance.log() < gain
        self._log = torch.where(taken[..., None], proposed, self._log)
        return torch.where(taken, new, density)


def _largest_step(log_likelihood: Tensor, most: Tensor) -> Tensor:
    """(P, 1) power, up to (P, 1) `most`, that leaves half of the particles effective."""
    low, high = torch.zeros_like(most), most
    for k in range(40):
        middle = high if k == 0 else 0.5 * (low + high)
        weight = (middle * log_likelihood).softmax(-1)
        enough = weight.square().sum(-1, keepdim=True) <= 2.0 / log_likelihood.shape[1]
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low
