"""Millions of designs for one patient: drawn in blocks by several threads, evaluated, sifted.

What is drawn depends on the seed, the patient and the place among the patient's designs, and on
nothing else. The policy is known by what it would choose alone: probabilities of polymer and
coverage, and a distribution of the formulation, of whatever kind.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hydrogel_gym.designs.grid import NUM_CELLS, on_grid
from hydrogel_gym.designs.schema import NUMBERS, REWARD, numbers_of
from hydrogel_gym.designs.store import Designs
from hydrogel_gym.designs.top import TopDesigns
from hydrogel_gym.problem.fields import COVERAGES, FORMULATION_FIELDS, Outcomes
from hydrogel_gym.problem.reward import RewardConfig, RewardFunction, compute_reward

if TYPE_CHECKING:
    from typing_extensions import Self

# Random numbers are drawn, and designs evaluated, so many at a time, whatever else is wanted: in
# other batches the same numbers would round differently.
BLOCK = 1 << 16


class Distribution(Protocol):
    """A named tuple of tensors that describe distributions of the formulation."""

    def rows(self, index: Any) -> Self:
        """The distributions at `index` of the first dimension."""
        ...

    def sample(self, normal: Tensor, temperature: float = 1.0) -> Tensor:
        """(B, D) from as many standard normal numbers; densities to the power 1 / temperature."""
        ...


class Sampler(NamedTuple):
    """What the designs of one patient are drawn from, on the device.

    There are twice as many slots as cells: the policy's choices of polymer and coverage, and the
    even ones. One uniform number picks a slot and, by the alias method [Walker1977], whether it or
    its other is meant.

    References:
        [Walker1977] Walker. An efficient method for generating discrete random variables with
        general distributions. ACM Trans Math Softw 3:253.
    """

    patient: Tensor  # (C,)
    formulation: Distribution  # by polymer
    keep: Tensor  # (2 * NUM_CELLS,) probability that a slot means itself
    other: Tensor  # (2 * NUM_CELLS,) int64, what it means else


def make_sampler(
    patient: Tensor, probability: Tensor, formulation: Distribution, explore: float
) -> Sampler:
    """A sampler in float32, on the patient's device.

    Args:
        patient: (C,).
        probability: (NUM_CELLS,) of each polymer and coverage.
        formulation: by polymer.
        explore: share of the designs that is drawn evenly from all that there is.
    """
    even = np.full(NUM_CELLS, 1.0 / NUM_CELLS)
    slots = np.concatenate([(1.0 - explore) * probability.cpu().numpy(), explore * even])
    keep, other = (torch.from_numpy(part).to(patient.device) for part in alias_table(slots))
    return Sampler(patient, tree_map(Tensor.float, formulation), keep.float(), other)


def alias_table(probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(K,) chances of keeping a slot and (K,) aliases, for the alias method."""
    scaled = probability / probability.sum() * len(probability)
    keep, other = np.ones_like(scaled), np.arange(len(scaled))
    small = [i for i, p in enumerate(scaled) if p < 1.0]
    large = [i for i, p in enumerate(scaled) if p >= 1.0]
    while small and large:
        poor, rich = small.pop(), large.pop()
        keep[poor], other[poor] = scaled[poor], rich
        scaled[rich] -= 1.0 - scaled[poor]
        (small if scaled[rich] < 1.0 else large).append(rich)
    return keep, other  # what is left over by rounding keeps itself


def draw(
    sampler: Sampler,
    uniform: Tensor,
    normal: Tensor,
    *,
    squash: Callable[[Tensor], Tensor],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Designs: (B,) cells, polymer * number of coverages + coverage, and (B, D) formulations.

    Args:
        sampler: of the patient.
        uniform: (B,) in [0, 1).
        normal: (B, D) standard normal.
        squash: takes what the policy's distribution samples to [-1, 1].
        temperature: of that distribution.
    """
    scaled = uniform * len(sampler.keep)
    slot = scaled.long().clamp(max=len(sampler.keep) - 1)
    slot = torch.where(scaled - slot < sampler.keep[slot], slot, sampler.other[slot])
    explores = slot >= NUM_CELLS
    cell = torch.where(explores, slot - NUM_CELLS, slot)
    formulation = sampler.formulation.rows(cell // len(COVERAGES))
    chosen = squash(formulation.sample(normal, temperature))
    # The distribution function of a normal number is evenly distributed.
    even = torch.erf(normal * math.sqrt(0.5))
    return cell, on_grid((torch.where(explores.unsqueeze(-1), even, chosen) + 1.0) / 2.0)


def evaluate(
    sampler: Sampler,
    uniform: Tensor,
    normal: Tensor,
    *,
    squash: Callable[[Tensor], Tensor],
    temperature: float,
    reward_model: RewardFunction,
    reward_config: RewardConfig,
) -> tuple[Tensor, Tensor]:
    """Draw and evaluate a block; pure, without a read on the host.

    Returns:
        (B,) uint8 cells and (R, B) rows of `NUMBERS`.
    """
    cell, formulation = draw(sampler, uniform, normal, squash=squash, temperature=temperature)
    polymer, coverage = cell // len(COVERAGES), cell % len(COVERAGES)
    patient = sampler.patient.expand(len(cell), -1)
    outcomes = reward_model(patient, polymer, formulation, coverage)
    reward = checked_reward(outcomes, reward_config)
    return cell.to(torch.uint8), numbers_of(formulation, outcomes, reward)


def checked_reward(outcomes: Outcomes, config: RewardConfig) -> Tensor:
    """Reward of designs; not a number where an outcome is not finite, for `check_finite` to see.

    The numbers that are kept would not show it: an infinite logit is a probability of 0 or 1.
    """
    return compute_reward(outcomes, config=config) + sum(outcome * 0.0 for outcome in outcomes)


def check_finite(patient_id: str, cell: np.ndarray, numbers: np.ndarray) -> None:
    """Refuse outcomes that are not finite.

    Raises:
        FloatingPointError: names patient and design.
    """
    bad = np.flatnonzero(~np.isfinite(numbers).all(0))
    if len(bad):
        polymer, coverage = divmod(int(cell[bad[0]]), len(COVERAGES))
        found = dict(zip(NUMBERS, numbers[:, bad[0]].tolist(), strict=True))
        raise FloatingPointError(
            f"the reward model returned an outcome that is not finite for patient {patient_id!r} "
            f"and the design polymer_id={polymer}, coverage={COVERAGES[coverage]}: {found}"
        )


def block_seed(seed: int, patient_id: str, block: int) -> int:
    """Seed of a block's random numbers."""
    key = json.dumps([seed, patient_id, block]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


class Block(NamedTuple):
    """What is left of a block once it was looked through."""

    size: int
    best: Designs  # that may be among the best
    diverse: Designs  # that may be the best of their cell
    every: Designs | None  # all of it, if it is to be written


class CandidateStream:
    """The candidates of one patient, drawn by several threads.

    Args:
        patient_id: who.
        sampler: what to draw from.
        evaluate: of a sampler, (B,) uniform and (B, D) normal numbers, the (B,) cells and (R, B)
            `NUMBERS` of a block of designs.
        num_candidates: how many to draw.
        top_k: how many of the best to keep.
        seed: of the random numbers.
    """

    def __init__(
        self,
        patient_id: str,
        sampler: Sampler,
        evaluate: Callable[[Sampler, Tensor, Tensor], tuple[Tensor, Tensor]],
        *,
        num_candidates: int,
        top_k: int,
        seed: int,
    ) -> None:
        self.patient_id, self.sampler, self.evaluate = patient_id, sampler, evaluate
        self.num_candidates, self.top_k, self.seed = num_candidates, top_k, seed
        self.best, self.diverse = TopDesigns(top_k), TopDesigns(1, per_cell=True)
        self.num_blocks = math.ceil(num_candidates / BLOCK)

    @torch.no_grad()
    def block(self, index: int, wanted: bool) -> Block:
        """Draw and look through a block; all of it is handed out only if wanted.

        Raises:
            FloatingPointError: an outcome is not finite; names patient and design.
        """
        device = self.sampler.patient.device
        generator = torch.Generator(device)
        generator.manual_seed(block_seed(self.seed, self.patient_id, index))
        uniform = torch.rand(BLOCK, generator=generator, dtype=torch.float32, device=device)
        shape = (BLOCK, len(FORMULATION_FIELDS))
        normal = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
        cell, numbers = (x.cpu().numpy() for x in self.evaluate(self.sampler, uniform, normal))
        size = min(BLOCK, self.num_candidates - index * BLOCK)
        cell, numbers = cell[:size], numbers[:, :size]
        if not np.isfinite(numbers[REWARD].sum()):
            check_finite(self.patient_id, cell, numbers)
        best = self.best.promising(cell, numbers[REWARD])
        diverse = self.diverse.promising(cell, numbers[REWARD])
        return Block(
            size,
            (cell[best], numbers[:, best]),
            (cell[diverse], numbers[:, diverse]),
            (cell, numbers) if wanted else None,
        )

    def blocks(
        self, pool: ThreadPoolExecutor, ahead: int, is_wanted: Callable[[int], bool]
    ) -> Iterator[Block]:
        """Every block in its order, `ahead` of them under way at a time; the best are kept."""
        under_way: list[Future[Block]] = []
        try:
            for index in range(self.num_blocks):
                under_way.append(pool.submit(self.block, index, is_wanted(index)))
                if len(under_way) > ahead:
                    yield self._sifted(under_way.pop(0).result())
            while under_way:
                yield self._sifted(under_way.pop(0).result())
        finally:
            for future in under_way:
                future.cancel()

    def _sifted(self, block: Block) -> Block:
        self.best.add(*block.best)
        self.diverse.add(*block.diverse)
        return block
