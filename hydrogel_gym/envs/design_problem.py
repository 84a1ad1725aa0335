"""What the two environments share: the design problem, from what a user sends to the results.

Checks that read a value on the host can be switched off, since on an accelerator each of them is a
synchronisation.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from hydrogel_gym.envs.codec import (
    ActionCodec,
    check_choice,
    check_count,
    check_range,
    first_row,
    integers,
    replace_rows,
)
from hydrogel_gym.envs.spaces import ActionFormat, ObsFormat, observation_space, split_observation
from hydrogel_gym.models.contract import RewardModel, load_reward_model
from hydrogel_gym.problem import dynamics
from hydrogel_gym.problem.cohort import Cohort, load_cohort
from hydrogel_gym.problem.dynamics import Autoreset, Step
from hydrogel_gym.problem.fields import Design
from hydrogel_gym.problem.reward import RewardConfig
from hydrogel_gym.problem.state import EnvParams, PatientAssignment, RewardMode, State, Transition

_PROCESS = os.getpid()


def _avoid_threads_of_parent() -> None:
    """Let torch use one thread where this process was forked from the one that imported it.

    Threads do not survive a fork, and torch would wait for those of the parent for ever.
    """
    if os.getpid() != _PROCESS and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


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
        max_episode_steps: int | None = None,
    ) -> None:
        _avoid_threads_of_parent()
        check_count("horizon", horizon)
        if max_episode_steps is not None:
            check_count("max_episode_steps", max_episode_steps)
        check_choice("reward_mode", reward_mode, get_args(RewardMode))
        check_choice("patient_assignment", patient_assignment, get_args(PatientAssignment))
        self.device = torch.device(device)
        self.actions = ActionCodec(action_format, device=self.device, dtype=dtype)
        self.obs_format = obs_format
        reward_config = reward_config or RewardConfig()
        self.observation_space = observation_space(
            obs_format,
            horizon=horizon,
            max_score=reward_config.max_score,
            observe_explored=observe_explored,
        )
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
            max_episode_steps=max_episode_steps,
        )

    @property
    def history_size(self) -> int:
        """Numbers of the history in an observation; 0 without one."""
        return 0

    def observe(self, state: State) -> Tensor | dict[str, Tensor]:
        """Observation of every environment in the chosen format."""
        return self.group(dynamics.observation(state, self.params))

    def group(self, obs: Tensor) -> Tensor | dict[str, Tensor]:
        """A (B, F) observation in the chosen format (views, no copy)."""
        return obs if self.obs_format == "box" else split_observation(obs)

    def chosen_patients(
        self, options: Mapping[str, Any], batch_shape: tuple[int, ...]
    ) -> Tensor | None:
        """(B,) int64 rows, a copy, of the patients that the options of a reset choose, if any.

        Args:
            options: `patient_id`, ids in a list, array or tensor, or `patient_index`, rows. A whole
                number given as an id is the id of that text; where no id of the cohort is a whole
                number, it can only be meant as a row, and is.
            batch_shape: (B,) or ().

        Raises:
            ValueError: both are given, an id is unknown, a row out of range, or there are not B.
        """
        if options.get("patient_index") is None:
            ids = options.get("patient_id")
            return None if ids is None else self.patient_indices(ids, batch_shape)
        if options.get("patient_id") is not None:
            raise ValueError("reset options have patient_id and patient_index; expected one")
        return self._indices("patient_index", options["patient_index"], batch_shape)

    def patient_indices(self, ids: Any, batch_shape: tuple[int, ...]) -> Tensor:
        """(B,) int64 rows, a copy, of the patients with these ids; see `chosen_patients`."""
        if isinstance(ids, Tensor) and self.cohort.has_whole_number_ids:
            ids = ids.cpu().numpy()
        if not isinstance(ids, Tensor):
            given = np.asarray(ids, dtype=object)
            ids = np.reshape([self._row_of(each) for each in given.flat], given.shape)
        return self._indices("patient_id", ids, batch_shape)

    def check_state(self, state: Mapping[str, Tensor], num_envs: int) -> None:
        """Raise a ValueError unless these are the tensors of a `State` of B rows, and `done`.

        It says which entry is missing, unknown, or of another shape or type, or names a patient
        that the cohort does not have.
        """
        zeros = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        expected = dynamics.initial(zeros, self.params).tensors() | {"done": zeros.bool()}
        if state.keys() != expected.keys():
            raise ValueError(f"state has {sorted(state)}; expected {sorted(expected)}")
        for name, entry in expected.items():
            given = state[name]
            if given.shape != entry.shape or given.dtype != entry.dtype:
                raise ValueError(
                    f"state {name!r} is a {tuple(given.shape)} tensor of {given.dtype}; "
                    f"expected {tuple(entry.shape)} of {entry.dtype}"
                )
        for name in ("home_index", "patient_index"):
            low, high = (int(bound) for bound in state[name].aminmax())
            if low < 0 or high >= self.params.num_patients:
                raise ValueError(
                    f"state {name!r} runs from {low} to {high}; "
                    f"allowed: 0 to {self.params.num_patients - 1}"
                )

    def _row_of(self, patient: Any) -> Any:
        """Row of an id; a whole number as it is where no id is one."""
        is_number = isinstance(patient, Integral) and not isinstance(patient, bool)
        if is_number and self.cohort.has_whole_number_ids:
            patient = str(int(patient))
        return self.cohort.index(patient) if isinstance(patient, str) else patient

    def _indices(self, name: str, rows: Any, batch_shape: tuple[int, ...]) -> Tensor:
        index = integers(rows, name, batch_shape, self.device).clone()
        if self.validate:
            check_range(name, index, self.params.num_patients, skip=None)
        return index

    def design(self, action: Any, batch_shape: tuple[int, ...]) -> Design:
        """Check actions and turn them into designs.

        Args:
            action: as for `ActionCodec.read`.
            batch_shape: (B,) or ().

        Raises:
            ValueError: names the field, what it is and what is allowed; for a value that is out of
                range, the environment too.
        """
        return self.actions.decode(self.read(action, batch_shape))

    def read(self, action: Any, batch_shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Check actions, as `design` does, and leave them as `ActionCodec.read` has them."""
        tensors = self.actions.read(action, batch_shape)
        if self.validate:
            self.actions.check(tensors)
        return tensors

    def ignore(self, design: Design, skip: Tensor | None) -> Design:
        """Designs in which whatever an ignored action contains is replaced by zeros."""
        return design if skip is None else replace_rows(design, skip, 0.0)

    def transition(
        self,
        state: State,
        design: Design,
        *,
        skip: Tensor | None = None,
        stop: Tensor | None = None,
    ) -> Transition:
        """Apply one design per environment; see `dynamics.transition`.

        Raises:
            ValueError: the reward model returned an outcome that is not finite (checked where
                actions are); names the patient and the design.
        """
        result = dynamics.transition(state, design, self.params, self.reward_model, stop)
        if self.validate:
            env = first_row(~torch.stack(result.outcomes).isfinite().all(0), skip)
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
            action: what `ActionCodec.read` returned.
            autoreset: when an ended episode is followed by another.

        Returns:
            The step, and () bool: whether every environment could be stepped, its action allowed
            and the outcomes finite. An action that is not allowed reaches no table and leaves the
            outcomes of the built-in model not a number.
        """
        allowed = self.actions.allows(action)
        # Whatever an action contains, it must not be read outside a table.
        design = replace_rows(self.actions.decode(action), ~allowed, torch.nan)
        if autoreset == "NextStep":
            design = replace_rows(design, done, 0.0)
        stop = self.actions.stops(action)
        step = dynamics.step(state, done, design, self.params, self.reward_model, autoreset, stop)
        # Numbers for the reason given in `dynamics.step`.
        defect = step.defect + (~allowed).to(step.defect.dtype)
        if autoreset == "NextStep":
            defect = defect.masked_fill(done, 0.0)
        elif autoreset == "Disabled":
            defect = defect + done.to(defect.dtype)
        return step, defect.sum() == 0.0


def check_options(options: Mapping[str, Any] | None, allowed: set[str]) -> dict[str, Any]:
    """The options of a reset, as a dict.

    Raises:
        ValueError: one is not among those allowed.
    """
    options = dict(options or {})
    if unknown := sorted(map(str, set(options) - allowed)):
        raise ValueError(f"reset options {unknown} are unknown; allowed: {sorted(allowed)}")
    return options


def is_single(seed: Any) -> bool:
    """Whether a seed is one, and not a sequence, an array or a tensor of them."""
    return np.ndim(seed) == 0


def whole_seed(seed: Any) -> int:
    """A seed as a Python int, from whatever is a whole number.

    Raises:
        ValueError: it is not, or is negative.
    """
    try:
        value = operator.index(seed)
    except TypeError:
        value = -1
    if value < 0:
        raise ValueError(f"seed is {seed!r}; allowed: whole numbers, 0 or more, or None")
    return value


def stream_keys(seeds: Sequence[int | None], rng: np.random.Generator) -> np.ndarray:
    """(B,) int64 stream keys; an absent seed is drawn from the environment's own generator."""
    drawn = rng.integers(2**63, size=len(seeds)) if None in seeds else np.zeros(len(seeds), int)
    return np.array(
        [key if seed is None else seed % 2**63 for seed, key in zip(seeds, drawn, strict=True)],
        np.int64,
    )


def map_arrays(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to an array, or to every array of a nested dict."""
    if isinstance(value, dict):
        return {key: map_arrays(function, item) for key, item in value.items()}
    return function(value)
