"""Wrappers for the hybrid action; `envs.wrappers` describes them."""

from hydrogel_gym.envs.wrappers import (
    DiscretizeHybridAction,
    FlattenHybridAction,
    RescaleFormulation,
    VectorDiscretizeHybridAction,
    VectorFlattenHybridAction,
    VectorRescaleFormulation,
)

__all__ = [
    "DiscretizeHybridAction",
    "FlattenHybridAction",
    "RescaleFormulation",
    "VectorDiscretizeHybridAction",
    "VectorFlattenHybridAction",
    "VectorRescaleFormulation",
]
