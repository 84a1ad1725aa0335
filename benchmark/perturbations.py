"""Reward models that are wrong in what nobody knows, and patients measured with an error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from hydrogel_gym import load_polymers
from hydrogel_gym.models.contract import RewardModel
from hydrogel_gym.models.mechanistic import MechanisticModel, MechanisticParams
from hydrogel_gym.problem.fields import PATIENT_FIELDS

SPREAD = 0.2  # of an assumption, as a share of its value
NOISE = 0.05  # of a patient's feature, likewise

# The indices of the polymer table, all of grade D, and the upper end of their range; all are 0 or
# more. The windows are of grade D too, but moving one moves what can be made at all.
POLYMER_INDICES = {
    "bioactivity": 1.0,
    "base_toxicity": math.inf,
    "filler_toxicity": math.inf,
    "filler_mid_dose_s_per_m": math.inf,
    "foreign_body_tendency": 1.0,
    "cohesion": 1.0,
}

# Integrity is nearly the product of these two and lies close above its limit, so that a fifth less
# of either breaks the limit whatever is designed. The joint draws are made without them as well.
HELD = ("integrity_cohesion_gain", "cohesion")


class Case(NamedTuple):
    """A reward model to evaluate designs by."""

    kind: str  # nominal, constant, joint or joint-held
    name: str  # the assumption, or the number of the draw
    factor: float  # of the assumption; NaN where each has its own
    model: RewardModel


def assumptions() -> tuple[str, ...]:
    """Names of everything of grade D that is moved here."""
    return (*MechanisticParams.names_graded("D"), *POLYMER_INDICES)


def perturbed(factors: dict[str, float | Tensor]) -> MechanisticModel:
    """Built-in model whose assumptions are multiplied.

    Args:
        factors: by name, one of `assumptions()`: a number, or for an index of the polymer table
            also (24,), a number per polymer. What is not named stays as it is.

    Raises:
        ValueError: a name is no assumption.
    """
    if unknown := sorted(set(factors) - set(assumptions())):
        raise ValueError(f"no assumption is called {', '.join(unknown)}")
    params, polymers = MechanisticParams(), load_polymers()
    constants, indices = {}, {}
    for name, factor in factors.items():
        if name in POLYMER_INDICES:
            column = getattr(polymers, name) * factor
            indices[name] = column.clamp(max=POLYMER_INDICES[name])
        else:
            constants[name] = getattr(params, name) * factor
    return MechanisticModel(replace(polymers, **indices), replace(params, **constants))


def joint_factors(generator: torch.Generator) -> dict[str, float | Tensor]:
    """One draw of a factor for every assumption, and for every polymer in each of its indices."""

    def draw(*size: int) -> Tensor:
        uniform = torch.rand(size, generator=generator, dtype=torch.float64)
        return 1.0 + SPREAD * (2.0 * uniform - 1.0)

    num_polymers = len(load_polymers())
    return {
        name: draw(num_polymers) if name in POLYMER_INDICES else draw().item()
        for name in assumptions()
    }


def cases(num_draws: int) -> Iterator[Case]:
    """The model as shipped, then with one assumption moved, then with all, and all but `HELD`."""
    yield Case("nominal", "", 1.0, MechanisticModel())
    for name in assumptions():
        for factor in (1.0 - SPREAD, 1.0 + SPREAD):
            yield Case("constant", name, factor, perturbed({name: factor}))
    generator = torch.Generator().manual_seed(0)
    for draw in range(num_draws):
        factors = joint_factors(generator)
        yield Case("joint", str(draw), math.nan, perturbed(factors))
        held = {name: factor for name, factor in factors.items() if name not in HELD}
        yield Case("joint-held", str(draw), math.nan, perturbed(held))


def measured(features: Tensor, generator: torch.Generator) -> Tensor:
    """Features (P, 11) as an instrument with independent errors reads them, kept in their limits.

    The errors break the identities between columns (LVEF and volumes, say), as independent
    measurements do.
    """
    low, high = (
        torch.tensor([getattr(field, end) for field in PATIENT_FIELDS], dtype=features.dtype)
        for end in ("low", "high")
    )
    uniform = torch.rand(features.shape, generator=generator, dtype=features.dtype)
    return (features * (1.0 + NOISE * (2.0 * uniform - 1.0))).clamp(low, high)
