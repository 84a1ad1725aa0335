"""Stage-1 models: what the environment needs of one, how one is loaded, and how it is checked.

A reward model is any callable `(patient, polymer_id, formulation, coverage) -> Outcomes` on batched
tensors. It is frozen: evaluation mode, no gradients to its parameters.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hydrogel_gym.models.ensemble import load_stage1
from hydrogel_gym.models.exported import INPUTS, ProgramError, load_program
from hydrogel_gym.models.mechanistic import MechanisticModel, OutcomeScale
from hydrogel_gym.problem.fields import (
    COVERAGES,
    FORMULATION_FIELDS,
    OUTCOME_FIELDS,
    PATIENT_FIELDS,
    Outcomes,
)
from hydrogel_gym.problem.polymers import NUM_POLYMERS, load_polymers


@runtime_checkable
class RewardModel(Protocol):
    """A frozen Stage-1 model.

    One with a true attribute `broadcasts` may be given batch shapes that broadcast, others get
    equal ones of one dimension.
    """

    def __call__(
        self, patient: Tensor, polymer_id: Tensor, formulation: Tensor, coverage: Tensor
    ) -> Outcomes:
        """Predict the outcomes of a batch of designs.

        Args:
            patient: (..., C) in the order and units of `PATIENT_FIELDS`.
            polymer_id: (...) int64 row of the polymer table.
            formulation: (..., D) in the order and units of `FORMULATION_FIELDS`.
            coverage: (...) int64 index into `COVERAGES`.

        Returns:
            `Outcomes` of (...) tensors in the dtype and on the device of `patient`.
        """
        ...


class RewardModelError(ValueError):
    """A reward model that cannot be loaded, or that does not return what it must."""


def load_reward_model(
    spec: str | os.PathLike[str] | RewardModel,
    device: str | torch.device = "cpu",
    *,
    outcome_scale: OutcomeScale = "source",
    pessimism: float | None = None,
    compute_dtype: torch.dtype | None = None,
) -> RewardModel:
    """Load, freeze and check a Stage-1 model.

    Args:
        spec: `"mechanistic"`, the built-in model; a path to a `.pt2` file, a program saved by
            `torch.export.save` (see `exported.load_program`); a path to a `.pt` file, a checkpoint
            of `train/fit_stage1.py`; `"module:factory"`, a function without arguments that returns
            a model; or a model.
        device: where it will run.
        outcome_scale: `"source"` or `"literature"`, for the built-in model only.
        pessimism: for a checkpoint only, see `ensemble.Stage1Ensemble`; None is its own.
        compute_dtype: for a checkpoint only, of its products; None is float32.

    Returns:
        The model; an `nn.Module` is put into evaluation mode, on `device` and without trainable
        parameters, in place.

    Raises:
        RewardModelError: it cannot be loaded, or its outcomes for one design of every polymer and
            coverage are not the fields of `Outcomes` with the batch's shape, dtype and device,
            finite and in range.
    """
    if isinstance(spec, os.PathLike):
        spec = os.fspath(spec)
    of_ensemble = {"pessimism": pessimism, "compute_dtype": compute_dtype}
    has_ensemble = isinstance(spec, str) and Path(spec).suffix == ".pt"
    for argument, value in of_ensemble.items():
        if value is not None and not has_ensemble:
            raise RewardModelError(
                f"{argument} is {value!r}; only a Stage-1 checkpoint (.pt) has an ensemble to "
                f"apply it to, and reward_model is {spec!r}"
            )
    model = _load(spec, outcome_scale, of_ensemble) if isinstance(spec, str) else spec
    if isinstance(model, nn.Module):
        model.eval().requires_grad_(False).to(device)
    name = f"reward_model {spec!r}" if isinstance(spec, str) else "reward_model"
    check_reward_model(model, device, name=name)
    return model


def _load(spec: str, outcome_scale: OutcomeScale, of_ensemble: dict[str, Any]) -> RewardModel:
    if spec == "mechanistic":
        return MechanisticModel(outcome_scale=outcome_scale)
    # Before the colon is looked for: C:\stage1.pt2 has one too.
    path = Path(spec)
    if path.suffix == ".pt2":
        try:
            return load_program(path)
        except ProgramError as error:
            raise RewardModelError(str(error)) from error
    if path.suffix == ".pt":
        try:
            return load_stage1(path, **of_ensemble)
        except ValueError as error:
            raise RewardModelError(f"reward_model {spec!r}: {error}") from error
    module_name, _, factory_name = spec.partition(":")
    if not factory_name:
        raise RewardModelError(
            f"reward_model is {spec!r}; allowed: 'mechanistic', a path to a .pt2 program, "
            "a path to a .pt Stage-1 checkpoint, or 'module:factory'"
        )
    try:
        with _importing_from_working_directory():
            model: RewardModel = getattr(importlib.import_module(module_name), factory_name)()
        return model
    except Exception as error:  # whatever the user's module or factory raises
        raise RewardModelError(
            f"reward_model {spec!r} cannot be loaded: {type(error).__name__}: {error}"
        ) from error


@contextlib.contextmanager
def _importing_from_working_directory() -> Iterator[None]:
    """Find modules there too, after all other places, as scripts and commands do not."""
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


@torch.no_grad()
def check_reward_model(
    model: RewardModel, device: str | torch.device = "cpu", *, name: str = "reward_model"
) -> None:
    """Run a model on every polymer with every coverage and compare the outcomes with the contract.

    The patient and the formulation are in the middle of their ranges. The designs are given twice,
    in one batch dimension and in two.

    Raises:
        RewardModelError: names the field, what was expected and what was got.
    """
    if not callable(model):
        raise RewardModelError(
            f"{name} is {model!r}; expected a callable, or a string that names one"
        )
    device = torch.device(device)
    num_designs = NUM_POLYMERS * len(COVERAGES)
    patient, formulation = (
        torch.tensor(
            [(f.low + f.high) / 2 for f in fields], dtype=torch.float32, device=device
        ).repeat(num_designs, 1)
        for fields in (PATIENT_FIELDS, FORMULATION_FIELDS)
    )
    designs = torch.arange(num_designs, device=device)
    coverage = designs % len(COVERAGES)
    polymer_id = designs // len(COVERAGES)
    inputs = (patient, polymer_id, formulation, coverage)
    outcomes = _checked_outcomes(model, inputs, name)
    _checked_outcomes(model, tuple(t.view(2, -1, *t.shape[1:]) for t in inputs), name)
    if device.type == "meta":
        return  # no values to look at
    for value, item in zip(outcomes, OUTCOME_FIELDS, strict=True):
        good = value.isfinite() & (value >= item.low) & (value <= item.high)
        if good.all():
            continue
        bad = (~good).nonzero().flatten().tolist()
        polymer, level = divmod(bad[0], len(COVERAGES))
        others = f" (and for {len(bad) - 1} more of {num_designs} designs)" if bad[1:] else ""
        raise RewardModelError(
            f"{name}: {item.name} is {value[bad[0]].item():g} for polymer {polymer} "
            f"({load_polymers().names[polymer]}), coverage {COVERAGES[level]}{others}; "
            f"expected finite values in [{item.low:g}, {item.high:g}]"
        )


def _checked_outcomes(model: RewardModel, inputs: tuple[Tensor, ...], name: str) -> Outcomes:
    """Outcomes of a batch of any shape, after a look at their types, shapes, dtypes and devices."""
    patient, shape = inputs[0], tuple(inputs[1].shape)
    versions = [_num_writes(value) for value in inputs]
    try:
        outcomes = model(*inputs)
    except Exception as error:
        given = ", ".join(
            f"{field} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
            for field, value in zip(INPUTS, inputs, strict=True)
        )
        raise RewardModelError(
            f"{name} failed on {shape} designs ({given}): {type(error).__name__}: {error}"
        ) from error
    for field, value, version in zip(INPUTS, inputs, versions, strict=True):
        if _num_writes(value) != version:
            raise RewardModelError(f"{name} writes to {field}; expected a model that only reads it")
    if getattr(outcomes, "_fields", None) != Outcomes._fields:
        raise RewardModelError(
            f"{name} returned {type(outcomes).__name__}; expected Outcomes{Outcomes._fields}"
        )
    expected = f"a {shape} {patient.dtype} tensor on {patient.device}"
    for field, value in outcomes._asdict().items():
        if not isinstance(value, Tensor):
            raise RewardModelError(
                f"{name}: {field} is {type(value).__name__}; expected {expected}"
            )
        if (value.shape, value.dtype, value.device) != (shape, patient.dtype, patient.device):
            raise RewardModelError(
                f"{name}: {field} is a {tuple(value.shape)} {value.dtype} tensor on "
                f"{value.device}; expected {expected}"
            )
    return outcomes


def _num_writes(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version
