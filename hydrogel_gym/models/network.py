"""The network of a Stage-1 ensemble: its features, its layers and its sizes.

The shape follows the Stage-1 network of HYDRA-BERT: an adapter on a polymer embedding, an encoder
of the numeric features, an embedding of the polymer's category, a trunk that joins the three, and
one head per outcome.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from hydrogel_gym.problem.fields import COVERAGES, FORMULATION_FIELDS, PATIENT_FIELDS, Outcomes

# Order of the numeric features, as in the source.
NUMERIC_FIELDS = (
    *(item.name for item in PATIENT_FIELDS),
    *(item.name for item in FORMULATION_FIELDS),
    *(f"coverage_{name}" for name in COVERAGES),
)
# Positive, and wrong by factors rather than by differences.
LOG_FIELDS = ("edv_ml", "esv_ml", "youngs_modulus_kpa", "half_life_days")


@dataclass(frozen=True)
class Architecture:
    """Sizes of a `Stage1Network`.

    `polymer_dim` is the width of the polymer embedding, `num_categories` the number of polymer
    categories; the rest are numbers of units.
    """

    polymer_dim: int
    num_categories: int
    num_members: int = 5
    adapter_dim: int = 32
    category_dim: int = 8
    encoder_dim: int = 128
    trunk_dim: int = 128
    head_dim: int = 16


class MemberLinear(nn.Module):
    """One linear layer per member, computed in one product.

    Args:
        num_members: K.
        in_features: of each.
        out_features: of each.
    """

    def __init__(self, num_members: int, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(in_features)  # as `nn.Linear`
        self.weight = nn.Parameter(
            torch.empty(num_members, in_features, out_features).uniform_(-bound, bound)
        )
        self.bias = nn.Parameter(torch.empty(num_members, 1, out_features).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """(K, B, in) or (B, in), for all members alike, to (K, B, out)."""
        if x.dim() == 2:
            x = x.expand(self.weight.shape[0], -1, -1)
        return torch.baddbmm(self.bias, x, self.weight)


class Stage1Network(nn.Module):
    """K members of the same shape with weights of their own.

    Predictions are standardised, but for the logit; `Stage1Ensemble` puts them into units.

    Args:
        architecture: the sizes.
        polymer_embedding: (polymers, polymer_dim), standardised, in the order of the polymer table.
        polymer_category: (polymers,) int64, below `num_categories`.
    """

    polymer_embedding: Tensor
    polymer_category: Tensor

    def __init__(
        self, architecture: Architecture, polymer_embedding: Tensor, polymer_category: Tensor
    ) -> None:
        super().__init__()
        a = self.architecture = architecture
        K = a.num_members
        self.register_buffer("polymer_embedding", polymer_embedding)
        self.register_buffer("polymer_category", polymer_category)
        self.adapter = MemberLinear(K, a.polymer_dim, a.adapter_dim)
        self.category = nn.Parameter(0.1 * torch.randn(K, a.num_categories, a.category_dim))
        self.encoder = nn.ModuleList(
            [
                MemberLinear(K, len(NUMERIC_FIELDS), a.encoder_dim),
                MemberLinear(K, a.encoder_dim, a.encoder_dim),
            ]
        )
        # The first layer of the trunk in two parts, so that the one of the polymer is a table.
        self.join_numeric = MemberLinear(K, a.encoder_dim, a.trunk_dim)
        self.join_polymer = MemberLinear(K, a.adapter_dim + a.category_dim, a.trunk_dim)
        self.trunk = MemberLinear(K, a.trunk_dim, a.trunk_dim)
        self.heads = MemberLinear(K, a.trunk_dim, len(Outcomes._fields) * a.head_dim)
        self.out = nn.Parameter(torch.randn(K, 1, len(Outcomes._fields), a.head_dim) / a.head_dim)
        self.out_bias = nn.Parameter(torch.zeros(K, 1, len(Outcomes._fields)))
        self.to(torch.float32)  # whatever the default of the process

    def polymer_table(self) -> Tensor:
        """(K, polymers, trunk_dim): all that depends on the polymer alone."""
        adapted = silu(self.adapter(self.polymer_embedding))
        category = self.category[:, self.polymer_category]
        table: Tensor = self.join_polymer(torch.cat([adapted, category], -1))
        return table

    def forward(
        self, numeric: Tensor, polymer_id: Tensor, polymer_table: Tensor | None = None
    ) -> Tensor:
        """Standardised predictions.

        Args:
            numeric: (B, features) or (K, B, features), standardised, as `NUMERIC_FIELDS`.
            polymer_id: (B,) or (K, B) int64.
            polymer_table: what `polymer_table` returns, of a network that is frozen.

        Returns:
            (K, B, outcomes) in the order of `Outcomes`.
        """
        table = self.polymer_table() if polymer_table is None else polymer_table
        if polymer_id.dim() == 1:
            polymer = table[:, polymer_id]
        else:
            polymer = torch.stack([rows[i] for rows, i in zip(table, polymer_id, strict=True)])
        x = numeric
        for layer in self.encoder:
            x = silu(layer(x))
        x = silu(self.join_numeric(x) + polymer)
        x = x + silu(self.trunk(x))
        x = silu(self.heads(x)).unflatten(-1, self.out.shape[-2:])
        predictions: Tensor = (x * self.out).sum(-1) + self.out_bias
        return predictions


def raw_numeric(patient: Tensor, formulation: Tensor, coverage: Tensor) -> Tensor:
    """(B, features) in the order of `NUMERIC_FIELDS`, in physical units or their logarithm.

    Args:
        patient: (B, C) in the order and units of `PATIENT_FIELDS`.
        formulation: (B, D) in the order and units of `FORMULATION_FIELDS`.
        coverage: (B,) int64 index into `COVERAGES`.
    """
    levels = [(coverage == level).to(patient.dtype) for level in range(len(COVERAGES))]
    columns = [*patient.unbind(-1), *formulation.unbind(-1), *levels]
    named = zip(NUMERIC_FIELDS, columns, strict=True)
    return torch.stack([x.log() if name in LOG_FIELDS else x for name, x in named], -1)
