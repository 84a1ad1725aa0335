"""The numbers of the manual, `HydrogelEnv`'s docstring: each from the place that decides it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from string import Template
from typing import TypeVar

from hydrogel_gym.envs.spaces import FLAT_ACTION_DIM, FORMULATION_LEVELS, episode_fields
from hydrogel_gym.problem.adaptive import slot_fields
from hydrogel_gym.problem.fields import (
    COVERAGES,
    FORMULATION_FIELDS,
    NUM_PATIENT_FEATURES,
    PATIENT_FIELDS,
)
from hydrogel_gym.problem.polymers import NUM_POLYMERS
from hydrogel_gym.problem.response import MAX_RESPONSE_SD, RESPONSE_FIELDS, ResponseField
from hydrogel_gym.problem.reward import RewardConfig
from hydrogel_gym.problem.streams import NUM_LEVELS

Class = TypeVar("Class", bound=type)


def with_numbers(documented: Class) -> Class:
    """Decorate a class, of whose docstring each `$name` is filled in."""
    if documented.__doc__ is not None:  # as with python -OO
        # Without its indentation, which Python takes off by itself from 3.13 on.
        text = Template(inspect.cleandoc(documented.__doc__))
        documented.__doc__ = text.substitute(_numbers())
    return documented


def _numbers() -> dict[str, object]:
    config = RewardConfig()
    score, iteration = episode_fields(1, config.max_score)
    num_patient_fields = len(PATIENT_FIELDS)
    return {
        "num_polymers": NUM_POLYMERS,
        "num_parameters": len(FORMULATION_FIELDS),
        "num_coverages": len(COVERAGES),
        "num_levels": FORMULATION_LEVELS[0],
        "nvec": [NUM_POLYMERS, *FORMULATION_LEVELS, len(COVERAGES)],
        "flat_dim": FLAT_ACTION_DIM,
        "obs_dim": num_patient_fields + 2,
        "patient_rows": f"0 to {NUM_PATIENT_FEATURES - 1}",
        "tissue_rows": f"{NUM_PATIENT_FEATURES} to {num_patient_fields - 1}",
        "action_rows": _table(
            ("polymer_id", "", "row of the polymer table", 0, NUM_POLYMERS - 1, "index"),
            *(
                ("formulation", i, item.name, item.low, item.high, _unit(item.meaning))
                for i, item in enumerate(FORMULATION_FIELDS)
            ),
            ("coverage", "", ", ".join(COVERAGES), 0, len(COVERAGES) - 1, "index"),
        ),
        "observation_rows": _table(
            *(
                (i, item.name, item.low, item.high, _unit(item.meaning))
                for i, item in enumerate(PATIENT_FIELDS)
            ),
            (num_patient_fields, score.name, score.low, score.high, "reward"),
            (num_patient_fields + 1, iteration.name, iteration.low, "horizon", "steps"),
        ),
        **_adaptive_numbers(config, num_patient_fields + 2),
        **{name: f"{value:g}" for name, value in dataclasses.asdict(config).items()},
    }


def _adaptive_numbers(config: RewardConfig, slot_start: int) -> dict[str, object]:
    slot, horizon = slot_fields(config), 8
    return {
        "slot_start": slot_start,
        "slot_width": len(slot),
        "adapt_horizon": horizon,
        "adapt_obs_dim": slot_start + horizon * len(slot),
        "slot_rows": _table(
            *(
                (i, item.name, item.low, item.high, _unit(item.meaning))
                for i, item in enumerate(slot)
            )
        ),
        "num_responses": len(RESPONSE_FIELDS),
        "num_levels_drawn": NUM_LEVELS,
        "max_response_sd": f"{MAX_RESPONSE_SD:.4f}",
        "response_rows": _table(
            *(
                (i, item.name, _scaled(item), item.low, item.high)
                for i, item in enumerate(RESPONSE_FIELDS)
            )
        ),
    }


def _scaled(item: ResponseField) -> str:
    return ("1 / " if item.divides else "") + ", ".join(f"`{name}`" for name in item.constants)


def _table(*rows: Iterable[object]) -> str:
    """Rows of a Markdown table."""
    texts = [[f"{x:g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in texts)


def _unit(meaning: str) -> str:
    """What follows the last comma of a field's meaning."""
    return meaning.rpartition(", ")[2]
