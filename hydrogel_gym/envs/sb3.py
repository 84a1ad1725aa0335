"""Stable-Baselines3's `VecEnv` over any Gymnasium vector environment, stepped as one batch.

Stable-Baselines3 makes its own vectors of single environments, one Python call each. A vector
environment that is already one batch, as `HydrogelVectorEnv` is, loses its speed there; here it
keeps it. Needs `pip install -e ".[sb3]"`; nothing else of the package does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv

_ACTION_SPACES = (gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete)


class BatchedVecEnv(VecEnv):
    """A Gymnasium vector environment as Stable-Baselines3 wants it.

    `info` of an episode that was truncated has `terminal_observation` and
    `TimeLimit.truncated=True`, from which Stable-Baselines3 bootstraps. All other environments
    share one info of the step, `{"TimeLimit.truncated": False}`: after a termination no algorithm
    reads the last observation (on-policy ones return no value for it, replay buffers mask it), and
    a dict for each of thousands of episodes of one step would be slow. Copy an info before writing
    to it, as `VecMonitor` does.

    Args:
        envs: resets in the same step; its single action space is `Box`, `Discrete` or
            `MultiDiscrete`. May return tensors: `make_vec("HydrogelDesignFlat-v0", num_envs=2000,
            output="torch")` is faster than numpy output, which makes an object per episode.
        all_terminal_observations: give `terminal_observation` for terminated episodes too, in an
            info of their own. `VecFrameStack` and some callbacks need it.

    Raises:
        ValueError: `envs` is not a vector environment, resets in another mode, or has an action
            space that Stable-Baselines3 does not take.
    """

    def __init__(
        self, envs: gym.vector.VectorEnv, *, all_terminal_observations: bool = False
    ) -> None:
        if not isinstance(envs, gym.vector.VectorEnv):
            raise ValueError(
                f"envs is a {type(envs).__name__}; expected a gymnasium.vector.VectorEnv, as "
                "gym.make_vec makes"
            )
        mode = envs.metadata.get("autoreset_mode")
        if mode not in (AutoresetMode.SAME_STEP, AutoresetMode.SAME_STEP.value):
            raise ValueError(
                f"envs has the autoreset mode {getattr(mode, 'value', mode)}; Stable-Baselines3 "
                'needs "SameStep"'
            )
        if not isinstance(envs.single_action_space, _ACTION_SPACES):
            raise ValueError(
                f"the single action space is a {type(envs.single_action_space).__name__}; "
                "Stable-Baselines3 takes Box, Discrete or MultiDiscrete, as "
                "HydrogelDesignFlat-v0 and HydrogelDesignDiscrete-v0 have"
            )
        self.envs = envs
        self.all_terminal_observations = all_terminal_observations
        self._actions: np.ndarray | None = None
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> Any:
        """(B, ...) observations, or a dict of them; uses up what `seed` and `set_options` gave."""
        if any(options != self._options[0] for options in self._options):
            raise ValueError("the environments are one batch: give all of them the same options")
        seeds = None if self._seeds[0] is None else self._seeds
        options = self._options[0] or None
        # A list of seeds is allowed, whatever the base class declares.
        obs, _ = self.envs.reset(seed=seeds, options=options)  # type: ignore[arg-type]
        self._reset_seeds()
        self._reset_options()
        return _to_numpy(obs)

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the (B, ...) actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Observations, (B,) float32 rewards, (B,) whether an episode ended, and B infos."""
        obs, reward, terminated, truncated, info = self.envs.step(self._actions)
        terminated, truncated = _to_numpy(terminated), _to_numpy(truncated)
        done = terminated | truncated
        truncated = truncated & ~terminated
        infos = [{"TimeLimit.truncated": False}] * self.num_envs
        with_infos = done if self.all_terminal_observations else truncated
        if with_infos.any():
            final_obs = _to_numpy(info["final_obs"])
            for row in np.flatnonzero(with_infos).tolist():
                infos[row] = {
                    "TimeLimit.truncated": bool(truncated[row]),
                    "terminal_observation": _row(final_obs, row),
                }
        return _to_numpy(obs), _to_numpy(reward).astype(np.float32), done, infos

    def close(self) -> None:
        """Close the environments."""
        self.envs.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """One picture per environment, with `render_mode="rgb_array"`."""
        frames: Any = self.envs.render()
        return frames or [None] * self.num_envs

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Of each wanted environment; where the environments are one batch, the batch's."""
        rows = self._rows(indices)
        if (members := self._members()) is not None:
            return [members[row].get_wrapper_attr(attr_name) for row in rows]
        return [getattr(self.envs, attr_name)] * len(rows)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute that is there; where the environments are one batch, for all of them.

        Raises:
            NotImplementedError: it is wanted for some of a batch.
        """
        rows = self._rows(indices)
        if (members := self._members()) is not None:
            for row in rows:
                setattr(members[row], attr_name, value)
            return
        if set(rows) != set(range(self.num_envs)):
            self._refuse(f"{attr_name} can be set for all of them only")
        getattr(self.envs, attr_name)  # An unknown name would be set, and then ignored.
        setattr(self.envs.unwrapped, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of each wanted environment.

        Raises:
            NotImplementedError: the environments are one batch; call the method of `envs` instead.
        """
        if (members := self._members()) is None:
            self._refuse(f"call envs.{method_name} instead")
        methods: list[Callable[..., Any]] = [
            members[row].get_wrapper_attr(method_name) for row in self._rows(indices)
        ]
        return [method(*method_args, **method_kwargs) for method in methods]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        """Whether each wanted environment is wrapped; one in a batch never is."""
        members = self._members()
        return [
            members is not None and _is_wrapped(members[row], wrapper_class)
            for row in self._rows(indices)
        ]

    def _members(self) -> Sequence[gym.Env] | None:
        """The environments, where there is one object for each, as in `SyncVectorEnv`."""
        return getattr(self.envs.unwrapped, "envs", None)

    def _rows(self, indices: Any) -> list[int]:
        return (
            np.arange(self.num_envs)[slice(None) if indices is None else indices].ravel().tolist()
        )

    def _refuse(self, hint: str) -> NoReturn:
        raise NotImplementedError(
            f"the environments of {type(self.envs.unwrapped).__name__} are one batch; {hint}"
        )


def _to_numpy(value: Any) -> Any:
    """Arrays of an array or tensor, or of every one in a dict."""
    if isinstance(value, Mapping):
        return {key: _to_numpy(item) for key, item in value.items()}
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _row(obs: Any, row: int) -> Any:
    """A copy of one observation, since `VecNormalize` replaces what it is given."""
    if isinstance(obs, Mapping):
        return {key: _row(item, row) for key, item in obs.items()}
    if obs.dtype == object:
        return obs[row]
    return obs[row].copy()


def _is_wrapped(env: gym.Env, wrapper_class: type[gym.Wrapper]) -> bool:
    while isinstance(env, gym.Wrapper):
        if isinstance(env, wrapper_class):
            return True
        env = env.env
    return False
