"""Stage-1 models: what the environment asks of one, how one is loaded, and how it is checked.

A reward model is any callable `(patient, polymer_id, formulation, coverage) -> Outcomes` on batched
tensors. It is frozen: evaluation mode, no gradients to its parameters.
"""

from __future__ import annotations

import importlib
import os
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hydrogel_gym.mechanistic import MechanisticModel
from hydrogel_gym.spaces import (
    FORMULATION_FIELDS,
    NUM_POLYMERS,
    OUTCOME_FIELDS,
    PATIENT_FIELDS,
    Outcomes,
)
from hydrogel_gym.stage1 import load_stage1


@runtime_checkable
class RewardModel(Protocol):
    """A frozen Stage-1 model."""

    def __call__(
        self, patient: Tensor, polymer_id: Tensor, formulation: Tensor, coverage: Tensor
    ) -> Outcomes:
        """Predict the outcomes of a batch of designs.

        Args:
            patient: (..., 11) in the order and units of `PATIENT_FIELDS`.
            polymer_id: (...) int64 row of the polymer table.
            formulation: (..., 4) in the order and units of `FORMULATION_FIELDS`.
            coverage: (...) int64 index into `COVERAGES`.

        Returns:
            `Outcomes` of (...) tensors in the dtype and on the device of `patient`.
        """
        ...


class RewardModelError(ValueError):
    """A reward model that cannot be loaded, or that does not return what is asked of it."""


def load_reward_model(
    spec: str | RewardModel,
    device: str | torch.device = "cpu",
    *,
    outcome_scale: str = "source",
    pessimism: float | None = None,
    compute_dtype: torch.dtype | None = None,
) -> RewardModel:
    """Load, freeze and check a Stage-1 model.

    Args:
        spec: `"mechanistic"`, the built-in model; `"module:factory"`, a function without arguments
            that returns a model; or a model.
        device: where it will run.
        outcome_scale: `"source"` or `"literature"`, for the built-in model only.
        pessimism: for a checkpoint only, see `stage1.Stage1Ensemble`; None is its own.
        compute_dtype: for a checkpoint only, of its products; None is float32.

    Returns:
        The model; an `nn.Module` is put into evaluation mode, on `device` and without trainable
        parameters, in place.

    Raises:
        RewardModelError: it cannot be loaded, or its outcomes for a two-row batch are not the six
            fields of `Outcomes` with the batch's shape, dtype and device, finite and in range.
    """
    ensemble_only = {"pessimism": pessimism, "compute_dtype": compute_dtype}
    if isinstance(spec, str) and os.path.splitext(spec)[1] == ".pt":
        try:
            model = load_stage1(spec, **ensemble_only)
        except ValueError as error:
            raise RewardModelError(f"reward_model {spec!r}: {error}") from error
    else:
        for argument, value in ensemble_only.items():
            if value is not None:
                raise RewardModelError(
                    f"{argument} is {value!r}, but only a Stage-1 checkpoint (.pt) has an ensemble "
                    f"to apply it to; reward_model is {spec!r}"
                )
        model = _load(spec, outcome_scale) if isinstance(spec, str) else spec
    if isinstance(model, nn.Module):
        model.eval().requires_grad_(False).to(device)
    name = f"reward_model {spec!r}" if isinstance(spec, str) else "reward_model"
    check_reward_model(model, device, name=name)
    return model


def _load(spec: str, outcome_scale: str) -> RewardModel:
    if spec == "mechanistic":
        return MechanisticModel(outcome_scale=outcome_scale)
    module_name, _, factory_name = spec.partition(":")
    if not factory_name:
        raise RewardModelError(
            f"reward_model is {spec!r}; allowed: 'mechanistic' or 'module:factory'"
        )
    try:
        return getattr(importlib.import_module(module_name), factory_name)()
    except Exception as error:  # whatever the user's module or factory raises
        raise RewardModelError(
            f"reward_model {spec!r} cannot be loaded: {type(error).__name__}: {error}"
        ) from error


@torch.no_grad()
def check_reward_model(
    model: RewardModel, device: str | torch.device = "cpu", *, name: str = "reward_model"
) -> None:
    """Run a model once on two designs and compare what it returns with the contract.

    Raises:
        RewardModelError: names the field, what was expected and what was got.
    """
    if not callable(model):
        raise RewardModelError(
            f"{name} is {model!r}; expected a callable, or a string that names one"
        )
    device = torch.device(device)
    middle = [
        [(f.low + f.high) / 2 for f in fields] for fields in (PATIENT_FIELDS, FORMULATION_FIELDS)
    ]
    patient, formulation = (
        torch.tensor([row, row], dtype=torch.float32, device=device) for row in middle
    )
    polymer_id = torch.tensor([0, NUM_POLYMERS - 1], device=device)
    coverage = torch.tensor([0, 1], device=device)
    try:
        outcomes = model(patient, polymer_id, formulation, coverage)
    except Exception as error:
        raise RewardModelError(
            f"{name} failed on two designs (patient (2, 11) float32, polymer_id (2,) int64, "
            f"formulation (2, 4) float32, coverage (2,) int64): {type(error).__name__}: {error}"
        ) from error
    if getattr(outcomes, "_fields", None) != Outcomes._fields:
        raise RewardModelError(
            f"{name} returned {type(outcomes).__name__}; expected Outcomes{Outcomes._fields}"
        )
    for value, item in zip(outcomes, OUTCOME_FIELDS, strict=True):
        expected = f"a (2,) {patient.dtype} tensor on {patient.device}"
        if not isinstance(value, Tensor):
            raise RewardModelError(
                f"{name}: {item.name} is {type(value).__name__}; expected {expected}"
            )
        if (value.shape, value.dtype, value.device) != ((2,), patient.dtype, patient.device):
            raise RewardModelError(
                f"{name}: {item.name} is a {tuple(value.shape)} {value.dtype} tensor on "
                f"{value.device}; expected {expected}"
            )
        if device.type == "meta":
            continue  # no values to look at
        if not (value.isfinite() & (value >= item.low) & (value <= item.high)).all():
            raise RewardModelError(
                f"{name}: {item.name} is {value.tolist()}; expected finite values in "
                f"[{item.low:g}, {item.high:g}]"
            )
