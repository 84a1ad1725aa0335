"""Reading the actions that a user sends: checks, and the way to a `Design` and back.

Checks that read a value on the host are apart from the rest, since on an accelerator each of them
is a synchronisation; checks of containers, shapes and dtypes cost nothing and always run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hydrogel_gym.envs.spaces import (
    FORMULATION_LEVELS,
    ActionFormat,
    action_space,
    decode_box,
    decode_multidiscrete,
    encode_box,
    encode_multidiscrete,
)
from hydrogel_gym.problem.fields import (
    COVERAGES,
    FORMULATION_FIELDS,
    Design,
    from_unit_range,
    to_unit_range,
)
from hydrogel_gym.problem.polymers import NUM_POLYMERS

HEADS = Design._fields


class ActionCodec:
    """Reads and writes the actions of one format.

    What it reads has the batch shape `(B,)`, or `()` for one environment without a batch dimension;
    its tensors have a leading batch dimension B.

    Args:
        action_format, num_levels, rescaled: as for `spaces.action_space`.
        device: where the tensors go; None leaves them where they are.
        dtype: of what is continuous.
    """

    def __init__(
        self,
        action_format: ActionFormat,
        *,
        num_levels: Sequence[int] = FORMULATION_LEVELS,
        rescaled: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.action_format = action_format
        self._num_levels, self._rescaled = tuple(num_levels), rescaled
        self._device, self._dtype = device, dtype
        self._use(action_space(action_format, num_levels=num_levels, rescaled=rescaled))

    def _use(self, space: Any) -> None:
        self.space, self._width = space, (space.shape or (0,))[0]
        # Plain numbers, since an array would be an input of the compiled step.
        self._sizes = tuple(np.ravel(getattr(space, "nvec", ())).tolist())

    def read(self, action: Any, batch_shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Tensors of an action: one of B rows for the flat formats, else one per head.

        Args:
            action: as the action space has it; numpy or torch, any integer dtype, a tuple also as a
                list, each discrete also with a trailing dimension of 1.
            batch_shape: (B,) or ().

        Raises:
            ValueError: container, shape or dtype is not what it may be; names the field.
        """
        device, dtype = self._device, self._dtype
        if self.action_format == "box":
            return (_floats(action, "action", batch_shape, self._width, device, dtype),)
        if self.action_format == "multidiscrete":
            return (integers(action, "action", batch_shape, device, width=self._width),)
        polymer_id, formulation, coverage = self._heads(action)
        return (
            integers(polymer_id, "polymer_id", batch_shape, device),
            _floats(
                formulation, "formulation", batch_shape, len(FORMULATION_FIELDS), device, dtype
            ),
            integers(coverage, "coverage", batch_shape, device),
        )

    def check(self, action: tuple[Tensor, ...], *, skip: Tensor | None = None) -> None:
        """Raise a ValueError that names the first environment whose action is not allowed.

        Args:
            action: what `read` returned.
            skip: (B,) mask of environments whose action is ignored.
        """
        if self.action_format == "box":
            _check_finite("action", action[0], _UNIT_RANGES, skip)
        elif self.action_format == "multidiscrete":
            for column, size in enumerate(self._sizes):
                check_range(f"action[{column}]", action[0][:, column], size, skip)
        else:
            polymer_id, formulation, coverage = action
            check_range("polymer_id", polymer_id, NUM_POLYMERS, skip)
            ranges = _UNIT_RANGES if self._rescaled else _FORMULATION_RANGES
            _check_finite("formulation", formulation, ranges, skip)
            check_range("coverage", coverage, len(COVERAGES), skip)

    def allows(self, action: tuple[Tensor, ...]) -> Tensor:
        """(B,) bool, whether `check` accepts a row; reads nothing on the host."""
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
        """Designs of what `read` returned; the formulation is left unclipped."""
        if self.action_format == "box":
            return decode_box(action[0])
        if self.action_format == "multidiscrete":
            return decode_multidiscrete(action[0], self._num_levels)
        design = Design(*action)
        if self._rescaled:
            return design._replace(formulation=from_unit_range(design.formulation))
        return design

    def stops(self, action: tuple[Tensor, ...]) -> Tensor | None:
        """(B,) bool, who ends the episode instead of trying a design; None where nobody can."""
        return None

    def encode(self, design: Design) -> Tensor | dict[str, Tensor] | tuple[Tensor, ...]:
        """Actions that stand for designs, of batch shape (B,); the inverse of `read` and `decode`.

        For `"multidiscrete"` the nearest, for the others to the rounding of the dtype.
        """
        if self.action_format == "box":
            return encode_box(design)
        if self.action_format == "multidiscrete":
            return encode_multidiscrete(design, self._num_levels)
        if self._rescaled:
            design = design._replace(formulation=to_unit_range(design.formulation))
        return design._asdict() if self.action_format == "dict" else tuple(design)

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


def replace_rows(design: Design, mask: Tensor, formulation: float) -> Design:
    """Designs with polymer 0, coverage 0 and the same formulation everywhere the mask is true."""
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
_UNIT_RANGES = ["[-1, 1]"] * len(FORMULATION_FIELDS)


def as_tensor(value: Any, name: str, device: torch.device | None) -> Tensor:
    """Tensor of what a user sent.

    Raises:
        ValueError: it contains no numbers.
    """
    if isinstance(value, Tensor):
        tensor = value.detach() if value.requires_grad else value
        return tensor if device is None else tensor.to(device)
    try:
        array = np.asarray(value)
        if array.dtype == object:  # numbers in boxes
            array = np.array(array.tolist())
        if array.dtype.itemsize > 8 and array.dtype.kind == "f":
            array = array.astype(np.float64)
        # A copy in native order: torch would warn of a read-only array, and reads neither swapped
        # bytes nor negative strides.
        array = np.array(array, array.dtype.newbyteorder("="), order="C")
        return torch.tensor(array, device=device)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {value!r}; expected numbers") from error


def integers(
    value: Any,
    name: str,
    batch_shape: tuple[int, ...],
    device: torch.device | None,
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
    device: torch.device | None,
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


def first_row(bad: Tensor, skip: Tensor | None) -> int | None:
    """First environment, of those not skipped, for which the (B,) mask is true."""
    if skip is not None:
        bad = bad & ~skip
    return int(bad.nonzero()[0]) if bad.any() else None


def check_range(name: str, index: Tensor, size: int, skip: Tensor | None) -> None:
    """Raise a ValueError that names the first environment whose (B,) index is not below `size`."""
    env = first_row((index < 0) | (index >= size), skip)
    if env is not None:
        raise ValueError(
            f"env {env}: {name} is {int(index[env])}; allowed: whole numbers 0 to {size - 1}"
        )


def _check_finite(name: str, value: Tensor, clipped_to: list[str], skip: Tensor | None) -> None:
    """Raise if a row is not finite; `clipped_to` has the ranges of its first columns."""
    env = first_row(~value.isfinite().all(-1), skip)
    if env is not None:
        column = int((~value[env].isfinite()).nonzero()[0])
        clip = f", clipped to {clipped_to[column]}" if column < len(clipped_to) else ""
        raise ValueError(
            f"env {env}: {name}[{column}] is {value[env, column].item()}; "
            f"allowed: a finite number{clip}"
        )
