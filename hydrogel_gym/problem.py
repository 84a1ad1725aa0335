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
    Autoreset,
    EnvParams,
    PatientAssignment,
    RewardConfig,
    RewardMode,
    State,
    Step,
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
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_count("horizon", horizon)
        check_choice("reward_mode", reward_mode, get_args(RewardMode))
        check_choice("patient_assignment", patient_assignment, get_args(PatientAssignment))
        self.action_format = action_format
        self.obs_format = obs_format
        self.action_space = action_space(action_format)
        # Plain numbers, since an array would be an input of the compiled step.
        self._sizes = tuple(np.ravel(getattr(self.action_space, "nvec", ())).tolist())
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
            patients=self.cohort.features.to(self.device, dtype),
            horizon=horizon,
            reward_config=reward_config,
            reward_mode=reward_mode,
            patient_assignment=patient_assignment,
            observe_explored=observe_explored,
        )

    def observe(self, state: State) -> Tensor | dict[str, Tensor]:
        """Observation of every environment in the format asked for."""
        return self.group(dynamics.observation(state, self.params))

    def group(self, obs: Tensor) -> Tensor | dict[str, Tensor]:
        """A (B, 13) or (B, 37) observation in the format asked for (views, no copy)."""
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

    def read_action(self, action: Any, batch_shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Tensors of an action: one of B rows for the flat formats, else one per head.

        Args:
            action: as the action space has it; numpy or torch, any integer dtype, a tuple also as a
                list, each discrete also with a trailing dimension of 1.
            batch_shape: (B,) or ().

        Raises:
            ValueError: container, shape or dtype is not what it may be; names the field.
        """
        device, dtype = self.device, self.params.patients.dtype
        if self.action_format == "box":
            width = self.action_space.shape[0]
            return (_floats(action, "action", batch_shape, width, device, dtype),)
        if self.action_format == "multidiscrete":
            return (_integers(action, "action", batch_shape, device, width=len(self._sizes)),)
        polymer_id, formulation, coverage = self._heads(action)
        return (
            _integers(polymer_id, "polymer_id", batch_shape, device),
            _floats(
                formulation, "formulation", batch_shape, len(FORMULATION_FIELDS), device, dtype
            ),
            _integers(coverage, "coverage", batch_shape, device),
        )

    def check_action(self, action: tuple[Tensor, ...], *, skip: Tensor | None = None) -> None:
        """Raise a ValueError that names the first environment whose action is not allowed.

        Args:
            action: what `read_action` returned.
            skip: (B,) mask of environments whose action is ignored.
        """
        if self.action_format == "box":
            _check_finite("action", *action, ["[-1, 1]"] * len(FORMULATION_FIELDS), skip)
        elif self.action_format == "multidiscrete":
            for column, size in enumerate(self._sizes):
                _check_range(f"action[{column}]", action[0][:, column], size, skip)
        else:
            polymer_id, formulation, coverage = action
            _check_range("polymer_id", polymer_id, NUM_POLYMERS, skip)
            _check_finite("formulation", formulation, _FORMULATION_RANGES, skip)
            _check_range("coverage", coverage, len(COVERAGES), skip)

    def allows(self, action: tuple[Tensor, ...]) -> Tensor:
        """(B,) bool, whether `check_action` accepts a row; reads nothing on the host."""
        if self.action_format == "box":
            return action[0].isfinite().all(-1)
        if self.action_format == "multidiscrete":
            columns = zip(action[0].unbind(-1), self._sizes, strict=True)
            within = [(column >= 0) & (column < size) for column, size in columns]
            return torch.stack(within).all(0)
        polymer_id, formulation, coverage = action
        return (
            (polymer_id >= 0)
            & (polymer_id < NUM_POLYMERS)
            & formulation.isfinite().all(-1)
            & (coverage >= 0)
            & (coverage < len(COVERAGES))
        )

    def decode(self, action: tuple[Tensor, ...]) -> Design:
        """Designs of what `read_action` returned; the formulation is left unclipped."""
        if self.action_format == "box":
            return decode_box(*action)
        if self.action_format == "multidiscrete":
            return decode_multidiscrete(*action)
        return Design(*action)

    def design(
        self, action: Any, batch_shape: tuple[int, ...], *, skip: Tensor | None = None
    ) -> Design:
        """Check actions and turn them into designs.

        Args:
            action: as for `read_action`.
            batch_shape: (B,) or ().
            skip: (B,) mask of environments whose action is ignored, and so not checked.

        Raises:
            ValueError: names the field, what it is and what is allowed; for a value that is out of
                range, the environment too.
        """
        tensors = self.read_action(action, batch_shape)
        if self.validate:
            self.check_action(tensors, skip=skip)
        return self.ignore(self.decode(tensors), skip)

    def ignore(self, design: Design, skip: Tensor | None) -> Design:
        """Designs in which whatever an ignored action holds is replaced by zeros."""
        return design if skip is None else _replace_rows(design, skip, 0.0)

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

    def step(
        self, state: State, done: Tensor, action: tuple[Tensor, ...], autoreset: Autoreset
    ) -> tuple[Step, Tensor]:
        """One step of a vector of environments, from action to observation; see `dynamics.step`.

        Pure, without a read on the host or a branch on data: this is what is compiled.

        Args:
            state: B environments.
            done: (B,) bool, whose episode ended in the step before.
            action: what `read_action` returned.
            autoreset: when an ended episode is followed by another.

        Returns:
            The step, and () bool: whether every environment could be stepped, its action allowed
            and the outcomes finite. An action that is not allowed reaches no table and leaves the
            outcomes of the built-in model not a number.
        """
        allowed = self.allows(action)
        # Whatever an action holds, it must not be read outside a table.
        design = _replace_rows(self.decode(action), ~allowed, torch.nan)
        if autoreset == "NextStep":
            design = _replace_rows(design, done, 0.0)
        step = dynamics.step(state, done, design, self.params, self.reward_model, autoreset)
        # Numbers for the reason given in `dynamics.step`.
        defect = step.defect + (~allowed).to(step.defect.dtype)
        if autoreset == "NextStep":
            defect = defect.masked_fill(done, 0.0)
        elif autoreset == "Disabled":
            defect = defect + done.to(defect.dtype)
        return step, defect.sum() == 0.0


def _replace_rows(design: Design, mask: Tensor, formulation: float) -> Design:
    """Designs with polymer 0, coverage 0 and the same formulation everywhere the mask holds."""
    return Design(
        design.polymer_id.masked_fill(mask, 0),
        design.formulation.masked_fill(mask.unsqueeze(-1), formulation),
        design.coverage.masked_fill(mask, 0),
    )


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
        return value.detach().to(device) if value.requires_grad else value.to(device)
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
    return tensor.reshape(-1, *row).long().contiguous()


def _floats(
    value: Any,
    name: str,
    batch_shape: tuple[int, ...],
    width: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """(B, width)."""
    tensor = as_tensor(value, name, device)
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected a real number dtype")
    _check_shape(name, tensor, (*batch_shape, width))
    return tensor.reshape(-1, width).to(dtype).contiguous()


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
