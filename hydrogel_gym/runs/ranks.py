"""The processes that train together: who they are, what they share, and how one is missed.

`torchrun` starts them, one per device. Gradients are averaged in memory that CPU ranks of one
machine share, else by messages.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from hydrogel_gym.errors import UsageError, first_line
from hydrogel_gym.memory import is_out_of_memory

SHARED_MEMORY = "/dev/shm"
# Rank 0 searches for the best designs while the others wait.
TIMEOUT = timedelta(minutes=30)
# How gloo, which raises nothing narrower than RuntimeError, words that a peer is gone.
PEER_IS_GONE = ("gloo", "connection", "timed out", "timeout", "peer")


class RankLostError(RuntimeError):
    """Another rank has ended, or cannot be reached."""


def collective(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that every rank calls, failing as `RankLostError` where another one is missing."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except RuntimeError as error:
            if not is_lost_rank(error):
                raise
            raise RankLostError(f"another rank was lost: {first_line(error)}") from error

    return call


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed for want of another rank, and not for what this one did."""
    if is_out_of_memory(error):
        return False
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in PEER_IS_GONE)


class World(NamedTuple):
    """The processes that train together, one per device.

    Every rank steps its own share of the environments and learns from its own share of every
    minibatch. What they share is made to be the same on all of them, so that a run does not depend
    on their number: the weights, the random numbers, and, gathered once per rollout, the batch.
    Methods other than `share` are collective: every rank calls them, with tensors of one shape.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1  # ranks on this machine
    launched: bool = False  # by something that watches over the ranks, as torchrun does
    joined: bool = False  # there is a process group

    def share(self, count: int) -> slice:
        """This rank's part of `count` things, which the number of ranks divides."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    @collective
    def gather(self, rows: Tensor, dim: int = 0) -> Tensor:
        """The rows of all ranks, by rank, along a dimension."""
        if not self.joined:
            return rows
        rows = rows.movedim(dim, 0).contiguous()
        gathered = rows.new_empty(self.size * len(rows), *rows.shape[1:])
        # torch before 2.13 has the older name only, which later ones warn of.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(gathered, rows)
        return gathered.movedim(0, dim)

    @collective
    def average(self, values: Tensor) -> Tensor:
        """The mean over the ranks, in place."""
        if self.joined:
            dist.all_reduce(values)
            values /= self.size
        return values

    @collective
    def any(self, flags: Tensor) -> Tensor:
        """Which of (K,) int32 flags any rank has set, in place."""
        if self.joined:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        return flags

    @collective
    def broadcast(self, content: bytes | None, device: torch.device) -> bytes | None:
        """What rank 0 has."""
        if not self.joined:
            return content
        length = torch.tensor([-1 if content is None else len(content)], device=device)
        dist.broadcast(length, 0)
        size = int(length)
        if size < 0:
            return None
        data = torch.empty(size, dtype=torch.uint8, device=device)
        if content is not None:
            data.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(data, 0)
        return data.cpu().numpy().tobytes()

    @collective
    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Give every rank the values of rank 0, in place."""
        if self.joined:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    @collective
    def wait(self) -> None:
        """Return once every rank has called this."""
        if self.joined:
            dist.barrier()


ALONE = World()


class SharedMemoryMean:
    """The mean over the ranks of a vector, by way of memory that they share.

    Args:
        rows: (2, ranks, length) shared by all ranks.
        world: which tells when all have written.
    """

    def __init__(self, rows: Tensor, world: World) -> None:
        self.rows, self.world, self.turn = rows, world, 0

    def __call__(self, vector: Tensor) -> Tensor:
        """The mean, in the vector's place; every rank calls."""
        # Two places, in turn: a rank that is ahead does not write where another still reads.
        self.turn = 1 - self.turn
        rows = self.rows[self.turn]
        rows[self.world.rank] = vector
        self.world.wait()
        return torch.mean(rows, 0, out=vector)


def averaging(weights: Sequence[Tensor], world: World) -> Callable[[Tensor], Tensor] | None:
    """How the ranks average a gradient of these weights, as one vector; collective.

    CPU ranks of one machine do so in memory that they share, if there is some: in messages, which
    gloo sends through sockets, it costs them about twice as much. None
    where there is one rank alone.
    """
    if not world.joined:
        return None
    device, dtype = weights[0].device, weights[0].dtype
    if device.type != "cpu" or world.local_size < world.size:
        return world.average
    shape = (2, world.size, sum(weight.numel() for weight in weights))
    size, path = math.prod(shape), None
    with contextlib.ExitStack() as stack:
        if world.rank == 0:
            # Another system than Linux, or too little memory.
            with contextlib.suppress(OSError, AttributeError):
                file = stack.enter_context(tempfile.NamedTemporaryFile(dir=SHARED_MEMORY))
                # Now, since writing to memory that is not there ends a process.
                os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
                path = file.name.encode()
        path = world.broadcast(path, device)
        if path is None:
            return world.average
        rows = torch.from_file(path.decode(), shared=True, size=size, dtype=dtype)
        world.wait()  # then the file loses its name, and goes with the last process
    return SharedMemoryMean(rows.view(shape), world)


def average_gradients(
    parameters: Sequence[nn.Parameter], average: Callable[[Tensor], Tensor]
) -> None:
    """Give every rank the mean gradient, as one vector instead of one per parameter."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = average(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = flat.split([gradient.numel() for gradient in gradients])
    pairs = zip(parts, gradients, strict=True)
    torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in pairs])


def world_from_environment() -> World:
    """The ranks that `torchrun` started; this process alone where it did not."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return ALONE
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    given = {name: os.environ.get(name, "1") for name in names}
    for name, value in given.items():
        if not value.isdecimal():
            raise UsageError(f"${name} is {value!r}; allowed: a whole number, as torchrun sets it")
    rank, size, local_size = map(int, given.values())
    if rank >= size:
        raise UsageError(f"$RANK is {rank}; allowed: below $WORLD_SIZE, {size}")
    return World(rank, size, local_size, launched=True)


@contextlib.contextmanager
def joined(world: World, device: torch.device) -> Iterator[World]:
    """The ranks, able to talk to each other.

    Raises:
        RankLostError: one of them did not come within `TIMEOUT`.
    """
    if world.size == 1:
        yield world
        return
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
    connect(world, device)
    yield world._replace(joined=True)
    dist.destroy_process_group()  # not after an error, which other ranks may not know of


@collective
def connect(world: World, device: torch.device) -> None:
    """Make the process group of the ranks."""
    if not (port := os.environ.get("MASTER_PORT", "")).isdecimal():
        raise UsageError(
            f"$MASTER_PORT is {port or 'not set'}; allowed: a port, as torchrun sets it"
        )
    try:
        store = next(rendezvous("env://", world.rank, world.size, timeout=TIMEOUT))[0]
    except RuntimeError as error:  # before torch 2.5 nothing narrower
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UsageError(f"the ranks cannot meet at {address}: {first_line(error)}") from error
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        store = unused_store_prefix(store, world, TIMEOUT)
    on_cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=TIMEOUT,
        device_id=device if on_cuda else None,
    )


def unused_store_prefix(store: Store, world: World, timeout: timedelta) -> Store:
    """A part of a launcher's store that nobody has written to; the same one for all ranks.

    `torchrun` gives the ranks that it starts again the store of those before them, and torch then
    connects to addresses that dead ranks have left in it (pytorch/pytorch, issue 135712). Launchers
    on several machines do not agree on how often they have restarted, so rank 0 makes up a name and
    sends it to every rank under what that rank made up: neither can be older than the two of them.

    Raises:
        RankLostError: a rank did not answer in time.
    """
    name = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    store.set_timeout(timeout)
    if world.rank:
        store.set(f"rank {world.rank} asks as", name)
        try:
            name = store.get(name).decode()  # waits for it
        except dist.DistStoreError as error:
            raise RankLostError(f"rank 0 did not join within {timeout}") from error
        store.set(f"rank {world.rank} knows {name}", "")
        return PrefixStore(name, store)
    for rank in range(1, world.size):
        # Until it is known that the answer came: a request may be of a rank that was lost before.
        while not store.check([f"rank {rank} knows {name}"]):
            if time.monotonic() > deadline:
                raise RankLostError(f"rank {rank} did not join within {timeout}")
            if store.check([f"rank {rank} asks as"]):
                store.set(store.get(f"rank {rank} asks as").decode(), name)
            time.sleep(0.01)
    return PrefixStore(name, store)
