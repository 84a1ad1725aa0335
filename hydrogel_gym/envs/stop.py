"""Actions that may also end the episode: those of a format, and `stop`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from hydrogel_gym.envs.codec import HEADS, ActionCodec, check_range, integers
from hydrogel_gym.envs.spaces import ActionFormat
from hydrogel_gym.problem.fields import Design

STOP = "stop"


class StoppingCodec(ActionCodec):
    """Reads and writes actions with `stop`: a fourth head, or a last column in the flat formats.

    In `"box"` a number above 0 stops. A design comes with it all the same, one of the space.

    Args:
        action_format, device, dtype: as for `ActionCodec`.
    """

    def __init__(
        self,
        action_format: ActionFormat,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(action_format, device=device, dtype=dtype)
        self._use(_with_stop(self.space))
        self._is_flat = action_format in ("box", "multidiscrete")

    def read(self, action: Any, batch_shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        """As of `ActionCodec`, with the (B,) int64 of `stop` last where the action has heads."""
        if self._is_flat:
            return super().read(action, batch_shape)
        design, stop = self._split(action)
        stop = integers(stop, STOP, batch_shape, self._device)
        return (*super().read(design, batch_shape), stop)

    def check(self, action: tuple[Tensor, ...], *, skip: Tensor | None = None) -> None:
        """As of `ActionCodec`."""
        if self._is_flat:
            return super().check(action, skip=skip)
        super().check(action[:-1], skip=skip)
        check_range(STOP, action[-1], 2, skip)

    def allows(self, action: tuple[Tensor, ...]) -> Tensor:
        """As of `ActionCodec`."""
        if self._is_flat:
            return super().allows(action)
        return super().allows(action[:-1]) & (action[-1] >= 0) & (action[-1] < 2)

    def decode(self, action: tuple[Tensor, ...]) -> Design:
        """As of `ActionCodec`; also of who stops."""
        return super().decode((action[0][..., :-1],) if self._is_flat else action[:-1])

    def stops(self, action: tuple[Tensor, ...]) -> Tensor:
        """(B,) bool, who ends the episode instead of trying a design."""
        return (action[0][..., -1] if self._is_flat else action[-1]) > 0

    def encode(
        self, design: Design, stop: Tensor | None = None
    ) -> Tensor | dict[str, Tensor] | tuple[Tensor, ...]:
        """As of `ActionCodec`, with (B,) bool of who stops; by default nobody does."""
        action = super().encode(design)
        if stop is None:
            stop = torch.zeros_like(design.polymer_id)
        if isinstance(action, dict):
            return action | {STOP: stop.long()}
        if isinstance(action, tuple):
            return (*action, stop.long())
        last = stop.to(action.dtype).unsqueeze(-1)
        return torch.cat([action, last * 2 - 1 if self.action_format == "box" else last], -1)

    def _split(self, action: Any) -> tuple[Any, Any]:
        """The design of an action and its `stop`."""
        heads = (*HEADS, STOP)
        if self.action_format == "dict":
            if not isinstance(action, Mapping) or set(action) != set(heads):
                has = f"the keys {tuple(action)}" if isinstance(action, Mapping) else "no keys"
                raise ValueError(f"action has {has}; expected {heads}")
            return {head: action[head] for head in HEADS}, action[STOP]
        if not isinstance(action, (tuple, list)) or len(action) != len(heads):
            has = f"{len(action)} entries" if isinstance(action, (tuple, list)) else "no entries"
            raise ValueError(f"action has {has}; expected a tuple of {heads}")
        return action[:-1], action[-1]


def _with_stop(space: spaces.Space[Any]) -> Any:
    if isinstance(space, spaces.Dict):
        return spaces.Dict({**space.spaces, STOP: spaces.Discrete(2)})
    if isinstance(space, spaces.Tuple):
        return spaces.Tuple((*space.spaces, spaces.Discrete(2)))
    if isinstance(space, spaces.Box):
        return spaces.Box(-1.0, 1.0, (space.shape[0] + 1,))
    assert isinstance(space, spaces.MultiDiscrete)
    return spaces.MultiDiscrete(np.append(space.nvec, 2))
