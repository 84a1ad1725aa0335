"""The fast path: what a recipe defines in plain PyTorch, as one compiled graph each.

Nothing here changes what is computed; a test compares the two.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from hydrogel_gym.compiled import CompiledFunction, CompileError
from hydrogel_gym.errors import UsageError
from hydrogel_gym.runs.graphs import Replayed, has_graphs
from hydrogel_gym.runs.ranks import ALONE, World

Compile = Literal["auto", "on", "off"]
Made = TypeVar("Made")
Parts = dict[str, Tensor]  # of a loss, by name
# Forward pass of the agent, and a minibatch; returns the loss and its parts.
Loss = Callable[[Callable[..., Any], Any], tuple[Tensor, Parts]]

# Of `worth_compiling`. Small and large minibatches save about as much.
SECONDS_SAVED_PER_UPDATE = 3e-3
COMPILE_SECONDS = 34.0


def worth_compiling(num_updates: int) -> bool:
    """Whether a run is long enough for compiled graphs to save more than they cost.

    Both sides are measured by `benchmark/speed/throughput.py` on two CPU cores, without anything
    cached, and scale alike with the speed of a machine: so the answer depends on the request alone,
    and a seed gives the same run every time.
    """
    return num_updates * SECONDS_SAVED_PER_UPDATE > COMPILE_SECONDS


def compiled_or_plain(
    make: Callable[[bool], Made],
    mode: Compile,
    num_updates: int,
    world: World,
    device: torch.device,
) -> tuple[Made, float | None]:
    """What `make` makes, compiled where that is wanted or, under `auto`, where the run gains by it.

    Args:
        make: given whether to compile; raises `CompileError` where that is not possible.
        mode: what is wanted.
        num_updates: of the whole run.
        world: the ranks, which all compile or none.
        device: where.

    Returns:
        It, and the seconds that compiling took; None if it is not compiled.

    Raises:
        UsageError: compiling is wanted and not possible here.
    """
    if mode == "off" or (mode == "auto" and not worth_compiling(num_updates)):
        return make(False), None
    if world.rank == 0:
        print("compiling rollout and update, once per shape and machine ...", file=sys.stderr)
    began, made, cause = time.perf_counter(), None, None
    try:
        made = make(True)
    except CompileError as error:
        cause = error
    # All or none, for a rank that compiles calls others than one that does not.
    failed = world.any(torch.tensor([cause is not None], dtype=torch.int32, device=device))
    if made is not None and not failed.item():
        return made, time.perf_counter() - began
    cause = cause or CompileError("another rank cannot compile")
    if mode == "on":
        raise UsageError(f"--compile on: {cause}; use --compile off") from cause
    if world.rank == 0:
        print(f"not compiled, going on without: {cause}", file=sys.stderr)
    return make(False), None


def compile_function(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """A function of tensors of fixed shapes as one compiled graph.

    Shapes and settings never change in training, and checking whether they did takes as long as a
    tenth of an update.
    """
    graph = CompiledFunction(function, device, {"guard_filter_fn": "skip_all_guards_unsafe"})
    return Replayed(graph) if has_graphs(device) else graph


def compile_training(
    agent: nn.Module,
    optimizer: torch.optim.Optimizer,
    act: Callable[..., Any],
    loss: Loss,
    max_grad_norm: float,
    world: World,
    *,
    act_inputs: tuple[Any, ...],
    minibatch: Any,
) -> tuple[Callable[..., Any], CompiledStep]:
    """Acting and the gradient step as one graph each, run once so that what follows is fast.

    Args:
        agent: the policy, updated in place.
        optimizer: of `flatten_weights(agent)` alone.
        act: of the agent and `act_inputs`.
        loss: of a minibatch.
        max_grad_norm: largest norm of the gradient.
        world: the ranks.
        act_inputs: an example.
        minibatch: an example.

    Returns:
        `act`, and what takes a minibatch and updates the agent.

    Raises:
        CompileError: something that compiling needs is missing; says what.
    """
    (flat,) = optimizer.param_groups[0]["params"]
    workers = num_workers(len(tree_leaves(minibatch)[0]), flat.device)
    step = CompiledStep(agent, optimizer, loss, max_grad_norm, world, workers)
    fast_act = compile_function(functools.partial(act, agent), flat.device)
    with torch.no_grad():
        fast_act(*act_inputs)
    step.warm_up(minibatch)
    return lambda _, *inputs: fast_act(*inputs), step


def flatten_weights(module: nn.Module) -> nn.Parameter:
    """The weights of a module as one vector, which they become views of.

    So the gradient is one vector too, the optimiser takes one kernel, and the module is always up
    to date.
    """
    weights = list(module.parameters())
    flat = nn.Parameter(torch.cat([weight.detach().flatten() for weight in weights]))
    sizes = [weight.numel() for weight in weights]
    for weight, part in zip(weights, flat.detach().split(sizes), strict=True):
        weight.data = part.view_as(weight)
    return flat


def num_workers(rows: int, device: torch.device) -> int:
    """How many threads share a minibatch of so many rows equally: at most those of torch."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return max(n for n in range(1, threads + 1) if rows % n == 0)


class CompiledStep:
    """A step of an optimiser on a minibatch: forward, loss and backward as one graph, and clipping.

    On several CPU cores each of as many threads takes its share of the minibatch from end to end,
    and they meet once per step. Threads inside an operation meet at every one, and where another
    process has one of the cores all wait for it: `benchmark/speed/throughput.py`.

    On one GPU `recorded` makes a CUDA graph of what takes many steps.

    Args:
        module: what is learned, in place.
        optimizer: of `flatten_weights(module)` alone.
        loss: the mean over a minibatch; calls what it is given as it would call the module.
        max_grad_norm: largest norm of the gradient.
        world: the ranks.
        workers: threads that share a minibatch, on a CPU.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        max_grad_norm: float,
        world: World = ALONE,
        workers: int = 1,
    ) -> None:
        self.module, self.optimizer, self.loss = module, optimizer, loss
        self.max_grad_norm, self.world, self.workers = max_grad_norm, world, workers
        (self.flat,) = optimizer.param_groups[0]["params"]
        weights = dict(module.named_parameters())
        self.names = list(weights)
        self.shapes = [weight.shape for weight in weights.values()]
        self.sizes = [weight.numel() for weight in weights.values()]
        self.buffers = dict(module.named_buffers())
        self.meets = world.joined or workers > 1  # others, before the gradient is clipped
        # Ranks meet between a gradient and its step. A rate that is a tensor is of float32 to the
        # fused optimiser on CUDA, and float64 is there to compare runs by.
        graphs = has_graphs(self.flat.device) and self.flat.dtype == torch.float32
        self.records, self.recordings = graphs and not self.meets, dict[Any, Replayed]()
        gradient = self.gradient if self.meets else self.clipped_gradient
        self.gradient_graph = compile_function(gradient, self.flat.device)
        self.clip_graph = compile_function(self.clipped, self.flat.device)
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    def __call__(self, minibatch: Any, average: Callable[[Tensor], Tensor] | None = None) -> Parts:
        """Update the module; returns the parts of the loss and the norm of the gradient.

        Args:
            minibatch: this rank's share of it.
            average: the mean of a vector over the ranks, if there are several.
        """
        parts: Parts = self.in_worker(self.update, minibatch, average)
        return parts

    def in_worker(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call in a single-threaded thread on a CPU, and where it is on other devices."""
        if self.flat.device.type != "cpu":
            return function(*args)
        return self.pool.submit(function, *args).result()

    @torch.no_grad()
    def update(self, minibatch: Any, average: Callable[[Tensor], Tensor] | None) -> Parts:
        """`__call__` in a worker, which takes a share itself."""
        first, *others = shares_of(minibatch, self.workers)
        waiting = [self.pool.submit(self.gradient_of, share) for share in others]
        results = [self.gradient_of(first), *(each.result() for each in waiting)]
        gradients = [gradient for gradient, _ in results]
        parts = {name: mean_of([each[name] for _, each in results]) for name in results[0][1]}
        if average is not None:
            gradients = [average(mean_of(gradients))]
        gradient = gradients[0]
        if self.meets:
            gradient, parts["grad_norm"] = self.clip_graph(*gradients)
        self.flat.grad = gradient
        self.optimizer.step()
        self.flat.grad = None  # so that the next gradient takes its memory, which is in the cache
        return parts

    @torch.no_grad()  # of each thread
    def gradient_of(self, share: Any) -> tuple[Tensor, Parts]:
        """`gradient`, compiled."""
        gradient, parts = self.gradient_graph(share)
        return gradient, parts

    def recorded(
        self, function: Callable[..., Any], inputs: tuple[Any, ...], generator: torch.Generator
    ) -> Callable[[], Any]:
        """`function` of `inputs`, which takes steps, as a graph that is kept for inputs like these.

        The first call of all runs as it is, and makes the optimiser's state; the second is
        recorded. What the graph reads of `inputs` and of the learning rate is what they are now.

        Args:
            function: does all its work on the device, and the same at every call with inputs of
                these shapes; returns tensors.
            inputs: trees of tensors and numbers.
            generator: all that it draws from.
        """
        (group,) = self.optimizer.param_groups

        def as_tensor(given: Any) -> Tensor:
            return given if isinstance(given, Tensor) else self.flat.new_full((), given)

        inputs = tree_map(as_tensor, (group["lr"], *inputs))
        shapes = tuple(each.shape for each in tree_leaves(inputs))
        if shapes not in self.recordings:
            at_rate = functools.partial(self.at_rate, function)
            self.recordings[shapes] = Replayed(at_rate, 1, generator)
        self.recordings[shapes].load(*inputs)
        return self.recordings[shapes].replay

    def at_rate(self, function: Callable[..., Any], rate: Tensor, *inputs: Any) -> Any:
        """`function`, while the learning rate is a tensor that a graph can read."""
        (group,) = self.optimizer.param_groups
        # Of a fused optimiser this is only asked for; outside of a recording it would warn.
        changes = {"lr": rate, "capturable": torch.cuda.is_current_stream_capturing()}
        before = {name: group[name] for name in changes}
        group.update(changes)
        try:
            return function(*inputs)
        finally:
            group.update(before)

    @torch.no_grad()
    def warm_up(self, minibatch: Any) -> None:
        """Compile, and leave everything as it was."""
        # Copies, since a graph would be specialised to two inputs being the same tensor. Nothing is
        # averaged, since another rank may be unable to compile.
        first, *_ = shares_of(tree_map(torch.clone, minibatch), self.workers)
        gradient, _ = self.in_worker(self.gradient_of, first)
        if self.meets:
            of_each = 1 if self.world.joined else self.workers
            self.in_worker(self.clip_graph, *(gradient.clone() for _ in range(of_each)))

    def gradient(self, minibatch: Any) -> tuple[Tensor, Parts]:
        """Gradient of the loss as one vector, and the parts of the loss."""
        gradient, (_, parts) = torch.func.grad_and_value(self.loss_of, has_aux=True)(
            self.flat.detach(), minibatch
        )
        return gradient, parts

    def loss_of(self, flat: Tensor, minibatch: Any) -> tuple[Tensor, Parts]:
        """The loss as a function of the weights."""
        parts = zip(self.names, flat.split(self.sizes), self.shapes, strict=True)
        weights = {name: part.view(shape) for name, part, shape in parts}

        def forward(*inputs: Any) -> Any:
            return torch.func.functional_call(self.module, (weights, self.buffers), inputs)

        return self.loss(forward, minibatch)

    def clipped(self, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """The mean gradient, no longer than `max_grad_norm`, and its norm before."""
        gradient = functools.reduce(torch.add, gradients) / len(gradients)
        norm = gradient.norm()
        return gradient * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0), norm

    def clipped_gradient(self, minibatch: Any) -> tuple[Tensor, Parts]:
        """Both."""
        gradient, parts = self.gradient(minibatch)
        gradient, norm = self.clipped(gradient)
        return gradient, parts | {"grad_norm": norm}


def shares_of(minibatch: Any, count: int) -> list[Any]:
    """A minibatch in so many equal parts."""
    rows = len(tree_leaves(minibatch)[0]) // count
    starts = range(0, rows * count, rows)
    return [tree_map(lambda part: part[start : start + rows], minibatch) for start in starts]  # noqa: B023


def mean_of(tensors: Sequence[Tensor]) -> Tensor:
    """Mean of tensors of one shape, in the place of the first."""
    first, *others = tensors
    for other in others:
        first += other
    return first.div_(len(tensors)) if others else first
