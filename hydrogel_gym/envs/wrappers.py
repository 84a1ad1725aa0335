"""Wrappers that put the hybrid action into a form which more libraries take.

- `FlattenHybridAction`: `Box(-1, 1, (FLAT_ACTION_DIM,))`
- `DiscretizeHybridAction`: `MultiDiscrete([polymers, levels..., coverages])`
- `RescaleFormulation`: `Dict` or `Tuple` as before, with the formulation in [-1, 1]

The first two are what `HydrogelDesignFlat-v0` and `HydrogelDesignDiscrete-v0` have built in: the
same functions of `spaces` decode them. Each has a twin for vectors, `Vector...`, and wraps any
environment with the hybrid action of `HydrogelDesign-v0`, dict or tuple, also where wrappers or
vectors of Gymnasium lie between. Actions may be numpy or torch, as the environment's own, and are
passed on in the same library.

A finite number beyond [-1, 1] is passed on beyond the formulation's box, where the environment
clips it and reports so. Everything else that is not in the space is a `ValueError` that names
environment, field, value and range, and leaves the environment untouched. On an accelerator values
are not looked at, which would be a synchronisation; there such an action becomes one whose
formulation is not a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeAlias

import gymnasium as gym
import torch
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor

from hydrogel_gym.envs.codec import ActionCodec, replace_rows
from hydrogel_gym.envs.spaces import FORMULATION_LEVELS, ActionFormat, action_space
from hydrogel_gym.problem.fields import FORMULATION_FIELDS

HYBRID_FORMATS: tuple[ActionFormat, ...] = ("dict", "tuple")
Env: TypeAlias = gym.Env[Any, Any]
VectorEnv: TypeAlias = gym.vector.VectorEnv[Any, Any, Any]
if TYPE_CHECKING:
    VectorActionWrapper: TypeAlias = gym.vector.VectorActionWrapper[Any, Any, Any, Any]
else:  # not generic before Gymnasium 1.3
    VectorActionWrapper = gym.vector.VectorActionWrapper
AnyEnv: TypeAlias = Env | VectorEnv


class _Conversion:
    """Actions of a wrapper's space from and to those of the hybrid space that it lies around.

    Args:
        outer: makes the wrapper's codec of the format, dict or tuple, that the environment has.
        wrapper: its name.
        env: what it is about to wrap.
        space: of one action of `env`.
        batch_shape: (B,) or ().

    Raises:
        ValueError: the environment has no hybrid action, or no longer.
    """

    def __init__(
        self,
        outer: Callable[[ActionFormat], ActionCodec],
        wrapper: str,
        env: AnyEnv,
        space: gym.Space[Any],
        batch_shape: tuple[int, ...],
    ) -> None:
        formats = [name for name in HYBRID_FORMATS if space == action_space(name)]
        if not formats:
            inside = env
            while isinstance(inside, (gym.Wrapper, gym.vector.VectorWrapper)):
                if isinstance(inside, (HybridActionWrapper, VectorHybridActionWrapper)):
                    raise ValueError(
                        f"{wrapper} wraps the hybrid action of HydrogelDesign-v0, which "
                        f"{type(inside).__name__} has converted already; use one of them"
                    )
                inside = inside.env
            raise ValueError(
                f"{wrapper} wraps an environment with the action space of HydrogelDesign-v0, "
                f"{action_space('dict')} or the Tuple of the same; got {space}"
            )
        self.inner = ActionCodec(formats[0])
        self.outer = outer(formats[0])
        self._batch_shape = batch_shape

    def forward(self, action: Any) -> Any:
        """The hybrid action of one of the wrapper's."""
        return self._convert(self.outer, self.inner, action)

    def backward(self, action: Any) -> Any:
        """The wrapper's action of a hybrid one."""
        return self._convert(self.inner, self.outer, action)

    @torch.no_grad()
    def _convert(self, read: ActionCodec, write: ActionCodec, action: Any) -> Any:
        tensors = read.read(action, self._batch_shape)
        design = read.decode(tensors)
        if tensors[0].device.type == "cpu":
            read.check(tensors)
        else:
            design = replace_rows(design, ~read.allows(tensors), torch.nan)
        written = write.encode(design)
        is_torch = any(isinstance(leaf, Tensor) for leaf in _leaves(action))
        if isinstance(written, dict):
            return {name: self._hand_out(value, is_torch) for name, value in written.items()}
        if isinstance(written, tuple):
            return tuple(self._hand_out(value, is_torch) for value in written)
        return self._hand_out(written, is_torch)

    def _hand_out(self, value: Tensor, is_torch: bool) -> Any:
        value = value if self._batch_shape else value[0]
        # The index makes a scalar of an array without dimensions, as `Discrete` has it.
        return value if is_torch else value.numpy()[()]


def _leaves(action: Any) -> Sequence[Any]:
    if isinstance(action, Mapping):
        return list(action.values())
    return action if isinstance(action, (tuple, list)) else [action]


def _flatten(_: ActionFormat) -> ActionCodec:
    return ActionCodec("box")


def _rescale(action_format: ActionFormat) -> ActionCodec:
    return ActionCodec(action_format, rescaled=True)


def _discretize(num_levels: int | Sequence[int]) -> Callable[[ActionFormat], ActionCodec]:
    num_fields = len(FORMULATION_FIELDS)
    levels = num_levels if isinstance(num_levels, Sequence) else [num_levels] * num_fields
    if len(levels) != num_fields or not all(isinstance(n, Integral) and n > 1 for n in levels):
        names = [item.name for item in FORMULATION_FIELDS]
        raise ValueError(
            f"num_levels is {num_levels!r}; allowed: a whole number, 2 or more, or one for each "
            f"of {names}"
        )
    return lambda _: ActionCodec("multidiscrete", num_levels=levels)


class HybridActionWrapper(gym.ActionWrapper[Any, Any, Any], RecordConstructorArgs):
    """What the wrappers of one environment share; wrap with one of them, not with this."""

    def __init__(
        self, env: Env, outer: Callable[[ActionFormat], ActionCodec], **kwargs: Any
    ) -> None:
        RecordConstructorArgs.__init__(self, **kwargs)
        name = type(self).__name__
        if not isinstance(env, gym.Env):
            raise TypeError(f"{name} wraps a gymnasium.Env, got a {type(env).__name__}")
        self._conversion = _Conversion(outer, name, env, env.action_space, ())
        gym.ActionWrapper.__init__(self, env)
        self.action_space = self._conversion.outer.space

    def action(self, action: Any) -> Any:
        """The hybrid action that an action of this space stands for.

        Raises:
            ValueError: the action is not in the space; names the field.
        """
        return self._conversion.forward(action)

    def reverse_action(self, action: Any) -> Any:
        """The action of this space for a hybrid one; the inverse of `action`.

        Raises:
            ValueError: the action is not a hybrid one; names the field.
        """
        return self._conversion.backward(action)


class VectorHybridActionWrapper(VectorActionWrapper, RecordConstructorArgs):
    """What the wrappers of a vector of environments share; wrap with one of them, not with this."""

    def __init__(
        self, env: VectorEnv, outer: Callable[[ActionFormat], ActionCodec], **kwargs: Any
    ) -> None:
        RecordConstructorArgs.__init__(self, **kwargs)
        name = type(self).__name__
        if not isinstance(env, gym.vector.VectorEnv):
            raise TypeError(
                f"{name} wraps a gymnasium.vector.VectorEnv, got a {type(env).__name__}"
            )
        space, batch_shape = env.single_action_space, (env.num_envs,)
        self._conversion = _Conversion(outer, name, env, space, batch_shape)
        VectorActionWrapper.__init__(self, env)
        self.single_action_space = self._conversion.outer.space
        self.action_space = batch_space(self.single_action_space, env.num_envs)

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """When an environment whose episode has ended is reset; that of the wrapped vector."""
        return AutoresetMode(self.metadata["autoreset_mode"])

    def actions(self, actions: Any) -> Any:
        """The batch of hybrid actions that B actions of this space stand for.

        Raises:
            ValueError: an action is not in the space; names environment and field.
        """
        return self._conversion.forward(actions)

    def reverse_actions(self, actions: Any) -> Any:
        """The B actions of this space for a batch of hybrid ones; the inverse of `actions`.

        Raises:
            ValueError: an action is not a hybrid one; names environment and field.
        """
        return self._conversion.backward(actions)


class FlattenHybridAction(HybridActionWrapper):
    """One vector in [-1, 1] for the whole action.

    `Box(-1, 1, (FLAT_ACTION_DIM,))`: the formulation, rescaled, then a score per polymer and a
    score per coverage, the largest of which is chosen. `reverse_action` gives the chosen ones 1 and
    the others -1; polymer and coverage survive the way there and back, the formulation to rounding.

    Args:
        env: with the hybrid action of `HydrogelDesign-v0`, dict or tuple.

    Raises:
        TypeError: `env` is not a single environment.
        ValueError: its action is another one.
    """

    def __init__(self, env: Env) -> None:
        super().__init__(env, _flatten)


class VectorFlattenHybridAction(VectorHybridActionWrapper):
    """`FlattenHybridAction` for a vector of B environments: actions are (B, FLAT_ACTION_DIM).

    Args:
        env: a vector with the hybrid action of `HydrogelDesign-v0`, dict or tuple.

    Raises:
        TypeError: `env` is not a vector.
        ValueError: its action is another one.
    """

    def __init__(self, env: VectorEnv) -> None:
        super().__init__(env, _flatten)


class DiscretizeHybridAction(HybridActionWrapper):
    """Whole numbers for the whole action.

    `MultiDiscrete([polymers, levels..., coverages])`: polymer, one of evenly spaced levels per
    formulation parameter with both bounds among them, coverage. `reverse_action` takes the nearest
    level; of an action of this space it is the exact inverse.

    Args:
        env: with the hybrid action of `HydrogelDesign-v0`, dict or tuple.
        num_levels: per formulation parameter, 2 or more; one number for all or one for each.

    Raises:
        TypeError: `env` is not a single environment.
        ValueError: its action is another one, or `num_levels` is not what it may be.
    """

    def __init__(self, env: Env, num_levels: int | Sequence[int] = FORMULATION_LEVELS) -> None:
        super().__init__(env, _discretize(num_levels), num_levels=num_levels)


class VectorDiscretizeHybridAction(VectorHybridActionWrapper):
    """`DiscretizeHybridAction` for a vector of B environments: actions are (B, 1 + D + 1).

    Args:
        env: a vector with the hybrid action of `HydrogelDesign-v0`, dict or tuple.
        num_levels: per formulation parameter, 2 or more; one number for all or one for each.

    Raises:
        TypeError: `env` is not a vector.
        ValueError: its action is another one, or `num_levels` is not what it may be.
    """

    def __init__(
        self, env: VectorEnv, num_levels: int | Sequence[int] = FORMULATION_LEVELS
    ) -> None:
        super().__init__(env, _discretize(num_levels), num_levels=num_levels)


class RescaleFormulation(HybridActionWrapper):
    """The formulation in [-1, 1]; polymer and coverage as they are.

    The space keeps the form of the environment's, `Dict` or `Tuple`. `reverse_action` is the
    inverse to rounding.

    Args:
        env: with the hybrid action of `HydrogelDesign-v0`, dict or tuple.

    Raises:
        TypeError: `env` is not a single environment.
        ValueError: its action is another one.
    """

    def __init__(self, env: Env) -> None:
        super().__init__(env, _rescale)


class VectorRescaleFormulation(VectorHybridActionWrapper):
    """`RescaleFormulation` for a vector of B environments: the formulation is (B, D).

    Args:
        env: a vector with the hybrid action of `HydrogelDesign-v0`, dict or tuple.

    Raises:
        TypeError: `env` is not a vector.
        ValueError: its action is another one.
    """

    def __init__(self, env: VectorEnv) -> None:
        super().__init__(env, _rescale)
