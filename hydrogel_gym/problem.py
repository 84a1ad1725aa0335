"""What the two environments share: the design problem, and the checks of what a user sends.

Checks that read a value on the host can be switched off, since on an accelerator each of them is a
synchronisation; checks of containers, shapes and dtypes cost nothing and always run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Integral
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from hydrogel_gym import dynamics
from hydrogel_gym.cohort import Cohort, load_cohort
from hydrogel_gym.dynamics import (
    EnvParams,
    PatientAssignment,
    RewardConfig,
    RewardMode,
    State,
    Transition,
)
from hydrogel_gym.reward_model import RewardModel, load_reward_model
from hydrogel_gym.spaces import (
    COVERAGES,
    FORMULATION_FIELDS,
    NUM_POLYMERS,
    ActionFormat,
    Design,
    ObsFormat,
    action_space,
    decode_box,
    decode_multidiscrete,
    observation_space,
    split_observation,
)

HEADS = Design._fields


class DesignProblem:
    """The problem of an environment: its parameters, its spaces and the way in and out of them.

    Designs, states and results have a leading batch dimension B. What a user sends has the batch
    shape `(B,)`, or `()` for one environment without a batch dimension.
    """

    def __init__(
        self,
        *,
        device: str | torch.device,
        horizon: int,
        cohort: Cohort | str | os.PathLike[str] | None,
        reward_model: str | RewardModel,
        reward_config: RewardConfig | None,
        action_format: ActionFormat,
        obs_format: ObsFormat,
        observe_explored: bool,
        reward_mode: RewardMode,
        patient_assignment: PatientAssignment,
        validate: bool | None,
    ) -> None:
        check_count("horizon", horizon)
        check_choice("reward_mode", reward_mode, get_args(RewardMode))
        check_choice("patient_assignment", patient_assignment, get_args(PatientAssignment))
        self.action_format = action_format
        self.obs_format = obs_format
        self.action_space = action_space(action_format)
        reward_config = reward_config or RewardConfig()
        self.observation_space = observation_space(
            obs_format,
            horizon=horizon,
            max_score=reward_config.max_score,
            observe_explored=observe_explored,
        )
        self.device = torch.device(device)
        self.validate = self.device.type == "cpu" if validate is None else validate
        self.cohort = cohort if isinstance(cohort, Cohort) else load_cohort(cohort)
        self.reward_model = load_reward_model(reward_model, self.device)
        self.params = EnvParams(
            patients=self.cohort.features.to(self.device, torch.float32),
            horizon=horizon,
            reward_config=reward_config,
            reward_mode=reward_mode,
            patient_assignment=patient_assignment,
            observe_explored=observe_explored,
        )

    def observe(self, state: State) -> Tensor | dict[str, Tensor]:
        """Observation of every environment in the format asked for."""
        obs = dynamics.observation(state, self.params)
        return obs if self.obs_format == "box" else split_observation(obs)

    def patient_indices(self, patients: Any, batch_shape: tuple[int, ...]) -> Tensor:
        """(B,) int64 patient indices, a copy, from ids or indices in a list, array or tensor.

        Raises:
            ValueError: an id is unknown, an index out of range, or there are not B of them.
        """
        if not isinstance(patients, Tensor):
            given = np.asarray(patients, dtype=object)
            rows = [self.cohort.index(p) if isinstance(p, str) else p for p in given.flat]
            patients = np.reshape(rows, given.shape)
        index = _integers(patients, "patient_id", batch_shape, self.device).clone()
        if self.validate:
            _check_range("patient_id", index, self.params.num_patients, skip=None)
        return index

    def design(
        self, action: Any, batch_shape: tuple[int, ...], *, skip: Tensor | None = None
    ) -> Design:
        """Check actions and turn them into designs.

        Args:
            action: as the action space has it; numpy or torch, any integer dtype, a tuple also as a
                list, each discrete also with a trailing dimension of 1.
            batch_shape: (B,) or ().
            skip: (B,) mask of environments whose action is ignored, and so not checked.

        Raises:
            ValueError: names the field, what it is and what is allowed; for a value that is out of
                range, the environment too.
        """
        width = len(FORMULATION_FIELDS)
        if self.action_format == "box":
            flat = _floats(action, "action", batch_shape, self.action_space.shape[0], self.device)
            if self.validate:
                _check_finite("action", flat, ["[-1, 1]"] * width, skip)
            design = decode_box(flat)
        elif self.action_format == "multidiscrete":
            sizes = self.action_space.nvec.tolist()
            flat = _integers(action, "action", batch_shape, self.device, width=len(sizes))
            if self.validate:
                for column, size in enumerate(sizes):
                    _check_range(f"action[{column}]", flat[:, column], size, skip)
            design = decode_multidiscrete(flat)
        else:
            polymer_id, formulation, coverage = self._heads(action)
            design = Design(
                _integers(polymer_id, "polymer_id", batch_shape, self.device),
                _floats(formulation, "formulation", batch_shape, width, self.device),
                _integers(coverage, "coverage", batch_shape, self.device),
            )
            if self.validate:
                _check_range("polymer_id", design.polymer_id, NUM_POLYMERS, skip)
                _check_finite("formulation", design.formulation, _FORMULATION_RANGES, skip)
                _check_range("coverage", design.coverage, len(COVERAGES), skip)
        if skip is None:
            return design
        # Whatever an ignored action holds, it must not reach a look-up in a table.
        return Design(
            design.polymer_id.masked_fill(skip, 0),
            design.formulation.masked_fill(skip.unsqueeze(-1), 0.0),
            design.coverage.masked_fill(skip, 0),
        )

    def _heads(self, action: Any) -> tuple[Any, ...]:
        if self.action_format == "dict":
            if not isinstance(action, Mapping):
                raise ValueError(f"action is a {type(action).__name__}; expected a dict of {HEADS}")
            if set(action) != set(HEADS):
                raise ValueError(f"action has the keys {tuple(action)}; expected {HEADS}")
            return tuple(action[head] for head in HEADS)
        if not isinstance(action, (tuple, list)):
            raise ValueError(f"action is a {type(action).__name__}; expected a tuple of {HEADS}")
        if len(action) != len(HEADS):
            raise ValueError(f"action has {len(action)} entries; expected a tuple of {HEADS}")
        return tuple(action)

    def transition(self, state: State, design: Design, *, skip: Tensor | None = None) -> Transition:
        """Apply one design per environment; see `dynamics.transition`.

        Raises:
            ValueError: the reward model returned an outcome that is not finite (checked where
                actions are); names the patient and the design.
        """
        result = dynamics.transition(state, design, self.params, self.reward_model)
        if self.validate:
            env = _first(~torch.stack(result.outcomes).isfinite().all(0), skip)
            if env is not None:
                outcomes = {k: v[env].item() for k, v in result.outcomes._asdict().items()}
                raise ValueError(
                    f"env {env}: the reward model returned {outcomes} for patient "
                    f"{self.cohort.patient_ids[int(state.patient_index[env])]} and the design "
                    f"polymer_id={int(design.polymer_id[env])}, "
                    f"formulation={result.formulation[env].tolist()}, "
                    f"coverage={int(design.coverage[env])}; expected finite outcomes"
                )
        return result


def check_count(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is a whole number, 1 or more."""
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} is {value!r}; allowed: a whole number, 1 or more")


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise a ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")


_FORMULATION_RANGES = [
    f"[{item.low:g}, {item.high:g}] ({item.name})" for item in FORMULATION_FIELDS
]


def as_tensor(value: Any, name: str, device: torch.device) -> Tensor:
    """Tensor of what a user sent.

    Raises:
        ValueError: it holds no numbers.
    """
    if isinstance(value, Tensor):
        return value.to(device)
    try:
        # A copy: torch would warn of a read-only array.
        return torch.tensor(np.asarray(value), device=device)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {value!r}; expected numbers") from error


def _integers(
    value: Any,
    name: str,
    batch_shape: tuple[int, ...],
    device: torch.device,
    *,
    width: int | None = None,
) -> Tensor:
    """(B,) int64, or (B, width)."""
    tensor = as_tensor(value, name, device)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected an integer dtype")
    row = () if width is None else (width,)
    allowed = [(*batch_shape, *row)] + ([(*batch_shape, 1)] if width is None else [])
    _check_shape(name, tensor, *allowed)
    return tensor.reshape(-1, *row).long()


def _floats(
    value: Any, name: str, batch_shape: tuple[int, ...], width: int, device: torch.device
) -> Tensor:
    """(B, width) float32."""
    tensor = as_tensor(value, name, device)
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected a real number dtype")
    _check_shape(name, tensor, (*batch_shape, width))
    return tensor.reshape(-1, width).to(torch.float32)


def _check_shape(name: str, tensor: Tensor, *allowed: tuple[int, ...]) -> None:
    if tuple(tensor.shape) not in allowed:
        expected = " or ".join(map(str, allowed))
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {expected}")


def _first(bad: Tensor, skip: Tensor | None) -> int | None:
    """First environment, of those not skipped, for which the (B,) mask holds."""
    if skip is not None:
        bad = bad & ~skip
    return int(bad.nonzero()[0]) if bad.any() else None


def _check_range(name: str, index: Tensor, size: int, skip: Tensor | None) -> None:
    env = _first((index < 0) | (index >= size), skip)
    if env is not None:
        raise ValueError(
            f"env {env}: {name} is {int(index[env])}; allowed: whole numbers 0 to {size - 1}"
        )


def _check_finite(name: str, value: Tensor, clipped_to: list[str], skip: Tensor | None) -> None:
    """Raise if a row is not finite; `clipped_to` holds the ranges of its first columns."""
    env = _first(~value.isfinite().all(-1), skip)
    if env is not None:
        column = int((~value[env].isfinite()).nonzero()[0])
        clip = f", clipped to {clipped_to[column]}" if column < len(clipped_to) else ""
        raise ValueError(
            f"env {env}: {name}[{column}] is {value[env, column].item()}; "
            f"allowed: a finite number{clip}"
        )
