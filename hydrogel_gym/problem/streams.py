"""Random numbers as pure functions of their counters: no generator, no state, no order.

A draw depends on nothing but its arguments, so a single environment, a vector of them and one
batched environment agree whatever the order in which their episodes end.

References:
    [Steele2014] Steele, Lea, Flood. Fast splittable pseudorandom number generators. OOPSLA 2014.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN_GAMMA = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15
# Levels of a draw by table: of each, all are equally likely.
_LEVEL_BITS = 10
NUM_LEVELS = 2**_LEVEL_BITS
_MAX_LEVELS_OF_A_WORD = 63 // _LEVEL_BITS


def _mix64(x: Tensor) -> Tensor:
    """Finaliser of SplitMix64 [Steele2014] on int64, whose products wrap as unsigned ones do."""

    def shift_right(value: Tensor, bits: int) -> Tensor:
        return (value >> bits) & ((1 << (64 - bits)) - 1)  # logical, not arithmetic

    x = (x ^ shift_right(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ shift_right(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ shift_right(x, 31)


def random_bits(key: Tensor, *counters: Tensor | int) -> Tensor:
    """(B,) int64 of 64 random bits each.

    Args:
        key: (B,) int64 stream keys.
        *counters: (B,) int64, or numbers; each depth is a stream of its own.
    """
    bits = _mix64(key + _GOLDEN_GAMMA)
    for counter in counters:
        bits = _mix64(bits + counter * _GOLDEN_GAMMA)
    return bits


def draw_levels(num: int, key: Tensor, *counters: Tensor | int) -> Tensor:
    """(B, num) int64 in [0, NUM_LEVELS), uniform and independent.

    Args:
        num: draws for each key.
        key: (B,) int64 stream keys.
        *counters: as for `random_bits`.

    Raises:
        ValueError: 64 bits hold fewer draws.
    """
    if num > _MAX_LEVELS_OF_A_WORD:
        raise ValueError(f"num is {num}; allowed: 0 to {_MAX_LEVELS_OF_A_WORD}")
    shifts = torch.arange(num, device=key.device) * _LEVEL_BITS
    levels: Tensor = (random_bits(key, *counters).unsqueeze(-1) >> shifts) & (NUM_LEVELS - 1)
    return levels


def level_middles() -> Tensor:
    """(NUM_LEVELS,) float64 in (0, 1), the middle of each level's share of the unit interval."""
    middles: Tensor = (torch.arange(NUM_LEVELS, dtype=torch.float64) + 0.5) / NUM_LEVELS
    return middles
