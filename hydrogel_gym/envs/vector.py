"""Many environments as one batch of tensors: a thin adapter over the functions of `dynamics`.

It keeps a `State`, has `DesignProblem` turn what a user sends into designs and apply them, and puts
the result into the shape that Gymnasium wants. Nothing is computed here.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args

import gymnasium as gym
import numpy as np
import torch
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space, create_empty_array
from torch import Tensor

from hydrogel_gym.compiled import CompiledFunction, CompileError
from hydrogel_gym.envs.codec import as_tensor, check_choice, check_count
from hydrogel_gym.envs.design_problem import (
    DesignProblem,
    check_options,
    is_single,
    map_arrays,
    stream_keys,
    whole_seed,
)
from hydrogel_gym.envs.frames import evaluations_of, frames, scene_of, warn_that_no_mode_was_chosen
from hydrogel_gym.envs.infos import StepReader
from hydrogel_gym.envs.rendering import RENDER_FPS, RENDER_MODES, Evaluation, RenderMode
from hydrogel_gym.envs.spaces import ActionFormat, ObsFormat
from hydrogel_gym.memory import bytes_per_env, check_memory, is_out_of_memory, too_large
from hydrogel_gym.models.contract import RewardModel
from hydrogel_gym.problem import dynamics
from hydrogel_gym.problem.cohort import Cohort
from hydrogel_gym.problem.dynamics import Step
from hydrogel_gym.problem.reward import RewardConfig
from hydrogel_gym.problem.state import PatientAssignment, RewardMode, State

Output = Literal["numpy", "torch"]
Dtype = Literal["float32", "float64"]


def _autoreset_mode(mode: str | AutoresetMode) -> AutoresetMode:
    if not isinstance(mode, AutoresetMode):
        check_choice("autoreset_mode", mode, tuple(choice.value for choice in AutoresetMode))
    return AutoresetMode(mode)


def _explains_failures(method: Callable[..., Any]) -> Callable[..., Any]:
    """Say in one line how much memory is missing, or that a step need not be compiled."""

    @functools.wraps(method)
    def explaining(self: HydrogelVectorEnv, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except CompileError as error:
            raise CompileError(
                f"compile=True failed: {error}; compile=False runs the same step uncompiled"
            ) from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            line = too_large(self.num_envs, self._bytes_per_env, self.device)
            raise MemoryError(line) from error

    return explaining


class HydrogelVectorEnv(gym.vector.VectorEnv):
    """`num_envs` design problems at once, as one batch of tensors on one device.

    The problem, its spaces, rewards and infos are those of `HydrogelEnv`; every array gains a
    leading dimension B = `num_envs`. A run is reproducible for a given seed, `num_envs` and device;
    under `random` assignment a seeded one agrees step for step with Gymnasium's vector environments
    over `HydrogelEnv`.

    Environment i is patient i mod P for good (`patient_assignment="fixed"`, the same for every
    seed), or a fresh draw of its own stream at each reset (`"random"`).

    Autoreset: all three modes of Gymnasium, in `metadata["autoreset_mode"]` and `autoreset_mode`.
    The default is `SameStep`, since with `NextStep` every second step of a single-step problem is a
    reset with reward 0. `info` is a dict of (B, ...) arrays, each with its mask under `_key`. In
    `SameStep` the last observation and info of an episode are in `final_obs` and `final_info`.

    `output="numpy"` (default) is ordinary Gymnasium. With `output="torch"` everything returned is a
    tensor on `device`, nothing is read on the host, and `info` always has the same keys: entries
    whose mask is false are zero, and `final_obs` is one tensor (or dict of tensors) of all rows.

    Args:
        num_envs: B.
        device: where state, model and `output="torch"` live.
        horizon, cohort, reward_model, reward_config: as for `HydrogelEnv`.
        action_format, obs_format, observe_explored, reward_mode: likewise.
        patient_assignment: `"fixed"` or `"random"`.
        output: `"numpy"` or `"torch"`.
        autoreset_mode: `"SameStep"`, `"NextStep"`, `"Disabled"` or Gymnasium's enumeration.
        validate_actions: check actions, and the reward model's outcomes, at every step. None means
            on the CPU only: on an accelerator a check is a synchronisation. Unchecked, an action
            that is not in the space reaches no table, and the built-in model's reward is NaN.
        compile: run a step as one graph of `torch.compile`, made when the environment is. Integers
            and bools are the same as without, floats to rounding. Needs a C++ compiler (on a GPU,
            Triton) and a reward model without a graph break. Making the environment takes some
            seconds longer; whatever the reward model reads beside tensors is constant from then on.
            Where other work shares the cores, call `torch.set_num_threads(1)` before: threads that
            wait for each other can make a step, compiled or not, a hundred times slower.
        dtype: `"float64"` computes in double precision, for `output="torch"` alone, since the
            spaces are of float32. It is there to compare runs by: vector instructions round a
            float32 number by its place in the batch.
        render_mode: `"rgb_array"` or `"ansi"`, one frame per environment; see `render`.
        max_episode_steps: truncates episodes of more steps, as `gym.make` does of one environment.

    Raises:
        ValueError: an argument is not what it may be; names it, its value and what is allowed.
        MemoryError: `num_envs` is more than fits; names how many would. Also from `reset`, `step`.
        CompileError: the step cannot be compiled, as a `RuntimeError`; names the cause.
    """

    metadata: dict[str, Any] = {
        "render_modes": list(RENDER_MODES),
        "render_fps": RENDER_FPS,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 2000,
        *,
        device: str | torch.device = "cpu",
        horizon: int = 1,
        cohort: Cohort | str | os.PathLike[str] | None = None,
        reward_model: str | RewardModel = "mechanistic",
        reward_config: RewardConfig | None = None,
        action_format: ActionFormat = "dict",
        obs_format: ObsFormat = "box",
        observe_explored: bool = False,
        reward_mode: RewardMode = "score",
        patient_assignment: PatientAssignment = "fixed",
        output: Output = "numpy",
        autoreset_mode: str | AutoresetMode = "SameStep",
        validate_actions: bool | None = None,
        compile: bool = False,
        dtype: Dtype = "float32",
        render_mode: RenderMode | None = None,
        max_episode_steps: int | None = None,
    ) -> None:
        check_count("num_envs", num_envs)
        check_choice("render_mode", render_mode, (None, *RENDER_MODES))
        check_choice("output", output, get_args(Output))
        check_choice("dtype", dtype, get_args(Dtype) if output == "torch" else ("float32",))
        self.autoreset_mode = _autoreset_mode(autoreset_mode)
        self.problem = self._make_problem(
            device=device,
            horizon=horizon,
            cohort=cohort,
            reward_model=reward_model,
            reward_config=reward_config,
            action_format=action_format,
            obs_format=obs_format,
            observe_explored=observe_explored,
            reward_mode=reward_mode,
            patient_assignment=patient_assignment,
            validate=True if output == "numpy" and validate_actions is None else validate_actions,
            dtype=getattr(torch, dtype),
            max_episode_steps=max_episode_steps,
        )
        self.num_envs = num_envs
        self.output = output
        self.device = self.problem.device
        self._bytes_per_env = bytes_per_env(
            compiled=compile,
            numpy=output == "numpy",
            explored=self.problem.params.observe_explored,
            grouped=obs_format == "dict",
            history=self.problem.history_size,
        )
        check_memory(num_envs, self._bytes_per_env, self.device)
        self.metadata = {**type(self).metadata, "autoreset_mode": self.autoreset_mode}
        self.single_action_space = self.problem.actions.space
        self.single_observation_space = self.problem.observation_space
        self._state: State | None = None
        self._done = torch.zeros(0, dtype=torch.bool, device=self.device)  # until the first reset
        # What `render` needs of the last step: the state before it, which environments were stepped
        # and not reset since, and the action.
        self.render_mode = render_mode
        self._last: tuple[State, Tensor, tuple[Tensor, ...]] | None = None
        self._prepare(compile)

    def _make_problem(self, **settings: Any) -> DesignProblem:
        return DesignProblem(**settings)

    @_explains_failures
    @torch.no_grad()
    def _prepare(self, compile: bool) -> None:
        """Make what a step needs and what grows with `num_envs`; compile by a step nobody sees."""
        autoreset: Any = self.autoreset_mode.value
        self._reader = StepReader(autoreset, self.device)
        self._step: Callable[..., tuple[Step, Tensor]] = functools.partial(
            self.problem.step, autoreset=autoreset
        )
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        if not compile:
            return
        self._step = CompiledFunction(self._step, self.device)
        keys = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        state = dynamics.initial(keys, self.problem.params)
        action = create_empty_array(self.single_action_space, self.num_envs, np.zeros)
        action = self.problem.actions.read(action, (self.num_envs,))
        self._step(state, torch.zeros_like(keys, dtype=torch.bool), action)

    @_explains_failures
    @torch.no_grad()
    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in every environment, or in those of a mask.

        Args:
            seed: an int s seeds environment i with s + i; a list has one seed (or None) each.
            options: `"patient_id"`, B ids, or `"patient_index"`, B rows of the cohort: under
                `fixed` assignment these patients stay until others are chosen or a seed is given,
                under `random` for this episode.
                `"reset_mask"`, a (B,) bool array: only these environments are reset.

        Raises:
            ValueError: an option, id or mask is not what it may be; nothing is reset.
        """
        options = check_options(options, {"patient_id", "patient_index", "reset_mask"})
        mask = self._reset_mask(options.get("reset_mask"))
        chosen = self.problem.chosen_patients(options, (self.num_envs,))
        seeds = self._seeds(seed)
        if seed is not None and is_single(seed):
            super().reset(seed=seeds[0])

        fresh = self._reset_state(seeds)
        if chosen is not None:
            fresh = fresh._replace(patient_index=chosen, home_index=chosen.clone())
        every = torch.ones(self.num_envs, dtype=torch.bool, device=self.device)
        if mask is None or self._state is None:
            self._state, self._done = fresh, ~every
        else:
            self._state = dynamics.select(mask, fresh, self._state)
            self._done = self._done & ~mask
        if self._last is not None:
            state, stepped, action = self._last
            self._last = None if mask is None else (state, stepped & ~mask, action)
        mask = every if mask is None else mask.clone()
        patients = self._state.patient_index.masked_fill(~mask, 0)
        info = {"patient_index": patients, "_patient_index": mask}
        return self._to_output(self.problem.observe(self._state)), self._to_output(info)

    def _seeds(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        """One seed, or None, per environment."""
        if seed is None:
            return [None] * self.num_envs
        if is_single(seed):
            first = whole_seed(seed)
            return [first + i for i in range(self.num_envs)]
        seeds: list[Any] = list(seed)  # type: ignore[arg-type]  # a sequence, by its dimension
        if len(seeds) != self.num_envs:
            raise ValueError(f"seed has {len(seeds)} entries; expected num_envs = {self.num_envs}")
        return [None if value is None else whole_seed(value) for value in seeds]

    def _reset_state(self, seeds: Sequence[int | None]) -> State:
        """First episode of every environment that has a seed, the next one of the others."""
        params, is_seeded = self.problem.params, [seed is not None for seed in seeds]
        if self._state is not None and not any(is_seeded):
            return dynamics.next_episode(self._state, params)
        keys = torch.from_numpy(stream_keys(seeds, self.np_random)).to(self.device)
        first = dynamics.initial(keys, params)
        if self._state is None:
            return first
        seeded = torch.tensor(is_seeded, device=self.device)
        return dynamics.select(seeded, first, dynamics.next_episode(self._state, params))

    def _reset_mask(self, mask: Any) -> Tensor | None:
        if mask is None:
            return None
        if self._state is None:
            raise ResetNeeded("reset every environment once before resetting some by `reset_mask`")
        tensor = as_tensor(mask, "reset_mask", self.device)
        if tensor.dtype != torch.bool or tensor.shape != (self.num_envs,):
            raise ValueError(
                f"reset_mask is a {tuple(tensor.shape)} array of {tensor.dtype}; expected "
                f"({self.num_envs},) of bool, as terminated | truncated is"
            )
        if self.problem.validate and not tensor.any():
            raise ValueError("reset_mask is all False; at least one environment must be reset")
        return tensor

    @_explains_failures
    @torch.no_grad()
    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Evaluate one design per environment.

        Raises:
            ValueError: an action is not in the space, or the reward model failed; names the
                environment. The state is untouched.
            ResetNeeded: not reset yet, or (mode `Disabled`, where actions are checked) an episode
                has ended and was not reset.
        """
        if self._state is None:
            raise ResetNeeded("call reset() before step()")
        action = self.problem.actions.read(actions, (self.num_envs,))
        step, valid = self._step(self._state, self._done, action)
        if self.problem.validate and not valid:
            self._refuse(self._state, action)
        if self.render_mode is not None:
            ignores = self.autoreset_mode is AutoresetMode.NEXT_STEP
            stepped = ~self._done if ignores else torch.ones_like(self._done)
            # The caller may write to its action.
            self._last = self._state, stepped, tuple(tensor.clone() for tensor in action)
        return self._accept(step)

    @torch.no_grad()
    def render(self) -> tuple[Any, ...] | None:
        """Show every environment's patient and what the last step did; see `HydrogelEnv.render`.

        An environment whose episode ended in the last step still shows that step, in mode
        `SameStep` as well, where it has begun another: with one design per episode nothing but
        patients would be seen otherwise.

        Returns:
            B arrays or texts. An array takes some 20 ms and 0.9 MB. Without a render mode None,
            with a warning.

        Raises:
            ResetNeeded: there are no patients before the first reset.
            DependencyNotInstalled: `"rgb_array"` needs Pillow, which the extra `render` brings.
        """
        if self.render_mode is None:
            warn_that_no_mode_was_chosen()
            return None
        if self._state is None:
            raise ResetNeeded("call reset() before render()")
        patients = self._state.patient_index
        evaluations: list[Evaluation | None] = [None] * self.num_envs
        if self._last is not None:
            state, stepped, action = self._last
            stepped = stepped & self.problem.actions.allows(action)
            design = self.problem.ignore(self.problem.actions.decode(action), ~stepped)
            stop = self.problem.actions.stops(action)
            result = self.problem.transition(state, design, skip=~stepped, stop=stop)
            patients = torch.where(stepped, state.patient_index, patients)
            evaluations = [
                evaluation if shown else None
                for evaluation, shown in zip(
                    evaluations_of(design, result), stepped.tolist(), strict=True
                )
            ]
        pairs = zip(patients.tolist(), evaluations, strict=True)
        return frames(self.render_mode, [scene_of(self.problem, *pair) for pair in pairs])

    def state_dict(self) -> dict[str, Tensor]:
        """What every later observation, reward and reset depends on, beside the actions.

        Returns:
            (B, ...) tensors on `device`: those of `state.State` and `done` (the episode ended
            in the step before). They are never written to. Environments of another B take any
            rows of them, in any order, by `load_state_dict`.

        Raises:
            ResetNeeded: there is no state before the first reset.
        """
        if self._state is None:
            raise ResetNeeded("call reset() before state_dict()")
        return {**self._state.tensors(), "done": self._done}

    def load_state_dict(self, state: Mapping[str, Tensor], *, check: bool = True) -> None:
        """Continue from what `state_dict` returned, here or in other environments of this problem.

        Args:
            state: (B, ...) tensors, on any device; copied.
            check: whether they can be a state, which reads them on the host.

        Raises:
            ValueError: an entry is missing, unknown, or of another shape or type, or names a
                patient that the cohort does not have; nothing is loaded.
        """
        if check:
            self.problem.check_state(state, self.num_envs)
        copied = {name: rows.to(self.device, copy=True) for name, rows in state.items()}
        self._done = copied.pop("done")
        self._state, self._last = State.of(copied), None

    def _refuse(self, state: State, action: tuple[Tensor, ...]) -> NoReturn:
        """Say what is wrong with a step, which was found only to be wrong somewhere."""
        mode, problem = self.autoreset_mode, self.problem
        if mode is AutoresetMode.DISABLED and self._done.any():
            env = int(self._done.nonzero()[0])
            raise ResetNeeded(
                f"env {env} has ended; reset it with reset(options={{'reset_mask': ...}})"
            )
        skip = self._done if mode is AutoresetMode.NEXT_STEP else None
        problem.actions.check(action, skip=skip)
        design = problem.ignore(problem.actions.decode(action), skip)
        problem.transition(state, design, skip=skip, stop=problem.actions.stops(action))
        raise ValueError("the reward model returned an outcome that is not finite, but not again")

    def _accept(self, step: Step) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Keep the state of a step; return what Gymnasium wants of one, in the user's library."""
        self._done, rows = self._reader.read(step, self._to_output)
        self._state = step.state
        reward, terminated, truncated, stepped, ended = self._reader.step(rows)
        # As in Gymnasium, numpy infos have no key that is true of no environment.
        has_every_key = self.output == "torch"
        is_reported = has_every_key or stepped.any()
        info = self._reader.info(rows) if is_reported else self._reader.reset_info(rows)
        if step.final_obs is not None and (has_every_key or ended.any()):
            final_info_mask, final_obs_mask = self._reader.final_masks(rows)
            info |= {"final_info": self._reader.final_info(rows), "_final_info": final_info_mask}
            final_obs = self._final_obs(step.final_obs, ended)
            info |= {"final_obs": final_obs, "_final_obs": final_obs_mask}
        obs = self._to_output(self.problem.group(step.obs))
        return obs, reward, terminated, truncated, info

    def _final_obs(self, obs: Tensor, done: Any) -> Any:
        """Last observations: all rows, or Gymnasium's object array of those that ended."""
        obs = self._to_output(self.problem.group(obs))
        if self.output == "torch":
            return obs
        ended, final_obs = map_arrays(lambda rows: rows[done], obs), np.full(self.num_envs, None)
        if isinstance(ended, dict):
            groups = zip(*ended.values(), strict=True)
            ended = [dict(zip(ended, rows, strict=True)) for rows in groups]
        final_obs[done] = np.fromiter(ended, object, len(ended))
        return final_obs

    def _to_output(self, value: Any) -> Any:
        if self.output == "torch":
            return value
        return map_arrays(lambda tensor: tensor.cpu().numpy(), value)
