"""Environments whose patients respond otherwise than predicted, and the problem behind them."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, get_args

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from hydrogel_gym.envs.codec import check_choice
from hydrogel_gym.envs.design_problem import DesignProblem
from hydrogel_gym.envs.manual import with_numbers
from hydrogel_gym.envs.rendering import RenderMode
from hydrogel_gym.envs.single import HydrogelEnv
from hydrogel_gym.envs.spaces import (
    ActionFormat,
    ObsFormat,
    observation_space,
    split_observation,
)
from hydrogel_gym.envs.stop import StoppingCodec
from hydrogel_gym.envs.vector import Dtype, HydrogelVectorEnv, Output
from hydrogel_gym.models.contract import RewardModel
from hydrogel_gym.models.mechanistic import MechanisticModel
from hydrogel_gym.problem.adaptive import SLOT_WIDTH, AdaptiveParams, Observe, slot_fields
from hydrogel_gym.problem.cohort import Cohort
from hydrogel_gym.problem.dynamics import Step
from hydrogel_gym.problem.fields import OUTCOME_FIELDS, Field
from hydrogel_gym.problem.response import MAX_RESPONSE_SD, RESPONSE_FIELDS, ResponseField
from hydrogel_gym.problem.reward import RewardConfig
from hydrogel_gym.problem.state import PatientAssignment, RewardMode, State

OutcomeNoise = float | Mapping[str, float] | Sequence[float]

# The best predicted design, tried once, then loses a point on average: `docs/response_sd.py`.
DEFAULT_RESPONSE_SD = 0.6


@dataclasses.dataclass(frozen=True)
class AdaptiveOptions:
    """What the adaptive problem has besides `DesignProblem`; see `HydrogelAdaptEnv`.

    Raises:
        ValueError: one is not what it may be; names it, its value and what is allowed.
    """

    response_sd: float
    outcome_noise: OutcomeNoise
    allow_stop: bool
    check_cost: float
    reveal_response: bool
    observe: Observe

    def __post_init__(self) -> None:
        _check_number("response_sd", self.response_sd, MAX_RESPONSE_SD)
        _check_number("check_cost", self.check_cost)
        check_choice("observe", self.observe, get_args(Observe))
        noise_deviations(self.outcome_noise)


def noise_deviations(noise: OutcomeNoise) -> tuple[float, ...]:
    """Deviation of each outcome's measurement, in its unit, in the order of `OUTCOME_FIELDS`.

    Args:
        noise: one number for all, a mapping from some outcomes, or one number for each.

    Raises:
        ValueError: an outcome is unknown, numbers are missing, or one is not finite and 0 or more.
    """
    names = tuple(item.name for item in OUTCOME_FIELDS)
    if isinstance(noise, Mapping):
        if unknown := [name for name in noise if name not in names]:
            raise ValueError(f"outcome_noise names {unknown[0]!r}; allowed: {names}")
        given = {name: noise.get(name, 0.0) for name in names}
    elif isinstance(noise, (Sequence, np.ndarray)) and not isinstance(noise, str):
        if len(noise) != len(names):
            raise ValueError(f"outcome_noise has {len(noise)} numbers; expected one for {names}")
        given = dict(zip(names, noise, strict=True))
    else:
        _check_number("outcome_noise", noise)
        given = dict.fromkeys(names, noise)
    for name, value in given.items():
        _check_number(f"outcome_noise of {name}", value)
    return tuple(float(value) for value in given.values())


def _check_number(name: str, value: Any, high: float = math.inf) -> None:
    """Raise a ValueError unless `value` is a finite number, 0 to `high`."""
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not 0.0 <= value <= high:
        allowed = "0 or more" if high == math.inf else f"0 to {high:.4f}"
        raise ValueError(f"{name} is {value!r}; allowed: a finite number, {allowed}")


class AdaptiveProblem(DesignProblem):
    """The problem of an adaptive environment; arguments as for `DesignProblem`, after its options.

    Raises:
        ValueError: as `DesignProblem`, or the reward model takes no response.
    """

    def __init__(self, options: AdaptiveOptions, **settings: Any) -> None:
        super().__init__(**settings)
        self.options, dtype = options, self.params.patients.dtype
        if not isinstance(self.reward_model, MechanisticModel):
            raise ValueError(
                f"reward_model is {settings['reward_model']!r}; allowed: 'mechanistic', or what "
                "returns a MechanisticModel, for no other takes a patient's response"
            )
        noise, horizon = noise_deviations(options.outcome_noise), self.params.horizon
        self.params = dataclasses.replace(
            self.params,
            adaptive=AdaptiveParams.make(
                options.response_sd,
                noise,
                horizon,
                options.check_cost,
                options.observe,
                self.params.patients,
            ),
        )
        config = self.params.reward_config
        has_history = options.observe == "history"
        self.observation_space = observation_space(
            self.obs_format,
            horizon=horizon,
            max_score=config.max_score,
            observe_explored=False,
            slot=slot_fields(config) if has_history else (),
            response=() if has_history else tuple(map(response_field, RESPONSE_FIELDS)),
        )
        if options.allow_stop:
            action_format = self.actions.action_format
            self.actions = StoppingCodec(action_format, device=self.device, dtype=dtype)

    @property
    def history_size(self) -> int:
        """Numbers of the history in an observation."""
        return self.params.horizon * self._slot_width

    @property
    def _slot_width(self) -> int:
        return SLOT_WIDTH if self.options.observe == "history" else 0

    def group(self, obs: Tensor) -> Tensor | dict[str, Tensor]:
        """A (B, F) observation in the chosen format (views, no copy)."""
        if self.obs_format == "box":
            return obs
        return split_observation(obs, self._slot_width, has_response=not self._slot_width)

    def revealed(self, state: State) -> Tensor:
        """(B, R) a copy of the responses of the episodes of a state."""
        assert state.checks  # an adaptive problem has no other states
        return state.checks.response.clone()


def response_field(factor: ResponseField) -> Field:
    """The column of an observation that has the logarithm of a factor of the response."""
    low, high = math.log(factor.low) - 1e-6, math.log(factor.high) + 1e-6  # rounding
    return Field(f"log_{factor.name}", low, high, "logarithm of the factor as observed")


@with_numbers
class HydrogelAdaptEnv(HydrogelEnv):
    """Choose which designs to check on a patient who responds otherwise than predicted.

    ## Description

    As in `HydrogelEnv` a hydrogel is designed for one virtual patient, but the built-in model is
    only a prior belief: each episode draws a hidden response, factors that scale assumed
    constants of the model. A step checks one design, as a finite-element simulation or an
    experiment would, and measures what it truly does. There are `horizon` checks to find the design
    that is best for this patient.

    | Num | Factor | Scales | Min | Max |
    |---|---|---|---|---|
    $response_rows

    A factor is exp(`response_sd` z) with z standard normal, cut off at the range; 1 is what the
    model predicts. Ranges and prior are assumptions (grade D), the patients are synthetic, and no
    figure here is a clinical fact.

    ## Action Space

    That of `HydrogelEnv`. `allow_stop=True` adds `stop`, `Discrete(2)`, as the last head or, in the
    flat formats, as the last column (in `"box"`, above 0): 1 ends the episode without a check,
    whatever the design that comes with it, which must be in the space all the same.

    ## Observation Space

    `obs_format="box"` (default) is a `Box` of $slot_start + `horizon` x $slot_width numbers of
    float32 in physical units, $adapt_obs_dim for a horizon of $adapt_horizon. The first $slot_start
    are those of `HydrogelEnv`; `current_best_score` is the best score as measured, or 0. Then comes
    one slot for each check of the episode, in the order of the checks; a slot is 0 until it is
    filled.

    | Num in slot | Observation | Min | Max | Unit |
    |---|---|---|---|---|
    $slot_rows

    `obs_format="dict"` has the groups of `HydrogelEnv` and `history`, (`horizon`, $slot_width).

    With another `observe` than `"history"` the slots are replaced by the natural logarithms of the
    $num_responses factors (in the dict `response`), so that a policy need not learn what
    measurements mean. Factors are those of one of:

    - `"estimate"`: the means of a Gaussian belief, which an iterated extended Kalman filter has
      from the prior, the checks and the built-in model's equations.
    - `"sample"`: a draw from that belief, another one before each check. Who designs for it what is
      best explores by posterior sampling.
    - `"response"`: the hidden response itself, to train a policy that is then given a sample.

    Which polymers were used is not observed then, so that the novelty bonus is not Markov.

    Otherwise the response is not observed: this is a partially observable problem. It is Markov in
    the belief about the response, and since the prior is fixed and a transition depends on nothing
    else that is hidden, patient and history are sufficient for that belief. A policy of the
    observation therefore loses nothing against one that remembers all that was measured.

    ## Rewards

    The score of a design is that of `HydrogelEnv`, with the outcomes that this patient truly has.
    `reward_mode="improvement"` (default) pays what the episode's best true score gains, so that an
    episode's return is its best true score (or 0); `"score"` pays the true score of each check.
    Each check costs `check_cost`. Stopping pays nothing and costs nothing.

    `outcome_noise` is the standard deviation of each measured outcome, in its own unit: a number
    for all, a mapping from names, or one for each. A measurement is clipped to the range in the
    table above. `info` has the same entries as that of `HydrogelEnv`, all as they were measured,
    and all 0 for who stopped; `reveal_response=True` adds `response`, the $num_responses factors,
    also to the info of a reset.

    ## Starting State

    As `HydrogelEnv`, with an empty history. Response and noise come from the seeded stream of the
    environment: same seed, same responses, also under `patient_assignment="fixed"`. A draw takes
    one of $num_levels_drawn equally likely values.

    ## Episode End

    Terminated after `horizon` checks, or by `stop`.

    ## Arguments

    | Argument | Type | Default | Meaning |
    |---|---|---|---|
    | `response_sd` | float | `0.6` | width of the prior, 0 (as predicted) to $max_response_sd |
    | `outcome_noise` | float, mapping, sequence | `0.0` | deviation of measured outcomes |
    | `allow_stop` | bool | `False` | add `stop` to the action |
    | `check_cost` | float | `0.0` | what a check takes off the reward, 0 or more |
    | `reveal_response` | bool | `False` | have the hidden response in `info` |
    | `observe` | str | `"history"` | `history`, `estimate`, `sample`, `response` |
    | `horizon` | int | `8` | checks per episode |
    | `cohort` | None, path, `Cohort` | `None` | patients; None is the shipped 2,000 |
    | `reward_model` | str, callable | `"mechanistic"` | the built-in model; no other responds |
    | `reward_config` | `RewardConfig` | `None` | weights and limits of the reward |
    | `action_format` | str | `"dict"` | `dict`, `tuple`, `box`, `multidiscrete` |
    | `obs_format` | str | `"box"` | `box`, `dict` |
    | `reward_mode` | str | `"improvement"` | `score`, `improvement` |
    | `patient_assignment` | str | `"random"` | `random`, `fixed` |
    | `device` | str | `"cpu"` | where the model runs |
    | `render_mode` | None, str | `None` | `rgb_array`, `ansi`; see `HydrogelEnv.render` |

    ## Version History

    - v0: first version.
    """

    problem: AdaptiveProblem

    def __init__(
        self,
        *,
        response_sd: float = DEFAULT_RESPONSE_SD,
        outcome_noise: OutcomeNoise = 0.0,
        allow_stop: bool = False,
        check_cost: float = 0.0,
        reveal_response: bool = False,
        observe: Observe = "history",
        device: str | torch.device = "cpu",
        horizon: int = 8,
        cohort: Cohort | str | os.PathLike[str] | None = None,
        reward_model: str | RewardModel = "mechanistic",
        reward_config: RewardConfig | None = None,
        action_format: ActionFormat = "dict",
        obs_format: ObsFormat = "box",
        reward_mode: RewardMode = "improvement",
        patient_assignment: PatientAssignment = "random",
        render_mode: RenderMode | None = None,
    ) -> None:
        self._options = AdaptiveOptions(
            response_sd, outcome_noise, allow_stop, check_cost, reveal_response, observe
        )
        super().__init__(
            device=device,
            horizon=horizon,
            cohort=cohort,
            reward_model=reward_model,
            reward_config=reward_config,
            action_format=action_format,
            obs_format=obs_format,
            reward_mode=reward_mode,
            patient_assignment=patient_assignment,
            render_mode=render_mode,
        )

    def _make_problem(self, **settings: Any) -> AdaptiveProblem:
        return AdaptiveProblem(self._options, **settings)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; as `HydrogelEnv.reset`."""
        obs, info = super().reset(seed=seed, options=options)
        return obs, info | self._revealed()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Check one design, or stop; as `HydrogelEnv.step`."""
        *result, info = super().step(action)
        return (*result, info | self._revealed())

    def _revealed(self) -> dict[str, Any]:
        if not self._options.reveal_response:
            return {}
        assert self._state is not None  # it was just reset or stepped
        return {"response": self.problem.revealed(self._state)[0].cpu().numpy()}


class HydrogelAdaptVectorEnv(HydrogelVectorEnv):
    """`num_envs` adaptive problems at once: `HydrogelAdaptEnv` as `HydrogelVectorEnv` has it.

    Args:
        num_envs: B.
        response_sd, outcome_noise, allow_stop, check_cost, reveal_response, observe: as for
            `HydrogelAdaptEnv`. With `reveal_response` the info has `response`, (B, R): where an
            episode begins that of the new one, as `patient_index` is.
        device, horizon, cohort, reward_model, reward_config: likewise.
        action_format, obs_format, reward_mode, patient_assignment: likewise.
        output, autoreset_mode, validate_actions, compile, dtype: as for `HydrogelVectorEnv`.
        render_mode, max_episode_steps: likewise.

    Raises:
        ValueError, MemoryError, CompileError: as `HydrogelVectorEnv`.
    """

    problem: AdaptiveProblem

    def __init__(
        self,
        num_envs: int = 2000,
        *,
        response_sd: float = DEFAULT_RESPONSE_SD,
        outcome_noise: OutcomeNoise = 0.0,
        allow_stop: bool = False,
        check_cost: float = 0.0,
        reveal_response: bool = False,
        observe: Observe = "history",
        device: str | torch.device = "cpu",
        horizon: int = 8,
        cohort: Cohort | str | os.PathLike[str] | None = None,
        reward_model: str | RewardModel = "mechanistic",
        reward_config: RewardConfig | None = None,
        action_format: ActionFormat = "dict",
        obs_format: ObsFormat = "box",
        reward_mode: RewardMode = "improvement",
        patient_assignment: PatientAssignment = "fixed",
        output: Output = "numpy",
        autoreset_mode: str | AutoresetMode = "SameStep",
        validate_actions: bool | None = None,
        compile: bool = False,
        dtype: Dtype = "float32",
        render_mode: RenderMode | None = None,
        max_episode_steps: int | None = None,
    ) -> None:
        self._options = AdaptiveOptions(
            response_sd, outcome_noise, allow_stop, check_cost, reveal_response, observe
        )
        super().__init__(
            num_envs,
            device=device,
            horizon=horizon,
            cohort=cohort,
            reward_model=reward_model,
            reward_config=reward_config,
            action_format=action_format,
            obs_format=obs_format,
            reward_mode=reward_mode,
            patient_assignment=patient_assignment,
            output=output,
            autoreset_mode=autoreset_mode,
            validate_actions=validate_actions,
            compile=compile,
            dtype=dtype,
            render_mode=render_mode,
            max_episode_steps=max_episode_steps,
        )

    def _make_problem(self, **settings: Any) -> AdaptiveProblem:
        return AdaptiveProblem(self._options, **settings)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in every environment, or in those of a mask; see `HydrogelVectorEnv`."""
        obs, info = super().reset(seed=seed, options=options)
        if self._options.reveal_response:
            mask = torch.as_tensor(info["_patient_index"], device=self.device)
            info |= self._revealed(self._state, mask)
        return obs, info

    def _accept(self, step: Step) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        before = self._state
        *result, info = super()._accept(step)
        if self._options.reveal_response:
            info |= self._revealed(step.state, torch.ones_like(self._done))
            if "final_info" in info:
                info["final_info"] |= self._revealed(before, self._done)
        return (*result, info)

    def _revealed(self, state: State | None, mask: Tensor) -> dict[str, Any]:
        """Responses of a state in the rows of a (B,) mask, and the mask, each a copy."""
        assert state is not None  # it was just reset or stepped
        response = self.problem.revealed(state).masked_fill(~mask.unsqueeze(-1), 0.0)
        return {
            "response": self._to_output(response),
            "_response": self._to_output(mask.clone()),
        }
