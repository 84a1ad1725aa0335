"""CUDA graphs: kernels that are recorded once and launched together, without work on the host."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from hydrogel_gym.errors import first_line


def has_graphs(device: torch.device) -> bool:
    """Whether kernels of a device can be launched together, as a CUDA graph."""
    return device.type == "cuda"


class Replayed:
    """A function on CUDA whose kernels are launched together, as a CUDA graph.

    The first calls run as they are and compile; the next is recorded. All are on inputs of its own
    that those of a call are copied into. A recorded function must do all its work on the device.

    Args:
        function: what to record.
        calls_before_recording: how many run as they are.
        generator: what it draws from besides the device's own; goes on from call to call.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        calls_before_recording: int = 2,
        generator: torch.Generator | None = None,
    ) -> None:
        self.function, self.calls_left = function, float(calls_before_recording)
        self.generator, self.inputs = generator, ()
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Any) -> Any:
        """What the function returns, in tensors that no later call writes to."""
        if torch.cuda.is_current_stream_capturing():  # a function that this one is part of
            return self.function(*inputs)
        self.load(*inputs)
        return self.replay()

    def load(self, *inputs: Any) -> None:
        """Copy the inputs of calls of `replay`."""
        self.inputs = self.inputs or tree_map(torch.empty_like, inputs)
        tree_map(lambda kept, given: kept.copy_(given), self.inputs, inputs)

    def replay(self) -> Any:
        """`__call__`, on what was loaded last."""
        if self.calls_left:
            self.calls_left -= 1
            return tree_map(torch.clone, self.function(*self.inputs))
        if self.graph is None:
            try:
                self.record()
            except RuntimeError as error:  # nothing that was recorded has happened
                print(f"no CUDA graph, going on without: {first_line(error)}", file=sys.stderr)
                self.graph, self.calls_left = None, math.inf
                return self.replay()
        assert self.graph is not None
        self.graph.replay()
        return tree_map(torch.clone, self.outputs)

    def record(self) -> None:
        """Record the graph; raises a RuntimeError where the function cannot be recorded."""
        self.graph = torch.cuda.CUDAGraph()
        if self.generator is not None:
            self.graph.register_generator_state(self.generator)
        with torch.cuda.graph(self.graph):
            self.outputs = self.function(*self.inputs)


def recorded(
    step: Any, function: Callable[..., Any], inputs: tuple[Any, ...], generator: torch.Generator
) -> Callable[[], Any]:
    """`function` of `inputs`, as `CompiledStep.recorded` where `step` is one that can do this."""
    if not getattr(step, "records", False):
        return functools.partial(function, *inputs)
    replay: Callable[[], Any] = step.recorded(function, inputs, generator)
    return replay
