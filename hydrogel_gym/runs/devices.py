"""Where a run computes: the device, its arithmetic and its memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Literal

import torch

from hydrogel_gym.errors import UsageError, first_line
from hydrogel_gym.memory import available_bytes
from hydrogel_gym.runs.ranks import ALONE, World

Precision = Literal["fp32", "bf16", "fp64"]

# At least, for the tensors of a rollout and their copies; with the libraries, the 200,000 samples
# of the source preset take 1,750 each by `benchmark/speed/throughput.py`.
BYTES_PER_SAMPLE = 1000
BYTES_PER_GATHERED_SAMPLE = 400  # on every rank: the batch of all, and its copies by minibatch


def resolve_device(name: str, world: World = ALONE) -> torch.device:
    """The device of that name; of several GPUs that of this rank.

    Raises:
        UsageError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if world.local_size > 1 and name.startswith("cuda"):
        count = torch.cuda.device_count()
        if name != "cuda" or count < world.local_size:
            raise UsageError(
                f"--device {name} for {world.local_size} ranks on this machine, which has {count} "
                "GPUs; allowed: cpu, or cuda with a GPU for each rank"
            )
    if world.launched and name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', world.rank)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used: {first_line(error)}") from error
    return device


def check_precision(precision: Precision, device: torch.device) -> None:
    """Refuse bfloat16 where the hardware would only emulate it.

    Raises:
        UsageError: names the fallback.
    """
    if precision != "bf16" or device.type == "meta":
        return
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    elif torch.__version__ < "2.13":
        raise UsageError(
            f"--precision bf16 needs torch 2.13 or later on a CPU; this is {torch.__version__}; "
            "use --precision fp32"
        )
    else:
        supported = any(on for name, on in torch.cpu.get_capabilities().items() if "bf16" in name)
    if not supported:
        raise UsageError(
            f"--precision bf16: this {device.type} has no bfloat16 arithmetic (AVX512-BF16 or AMX "
            "on a CPU, compute capability 8.0 on CUDA); use --precision fp32"
        )


def check_rollout_memory(num_envs: int, num_steps: int, device: torch.device, world: World) -> None:
    """Refuse a rollout that does not fit into memory.

    Linux hands out more memory than there is and ends the process that uses it.

    Raises:
        UsageError: says what fits.
    """
    available = available_bytes(device)
    if available is None:
        return
    samples, per_sample = num_envs * num_steps, BYTES_PER_SAMPLE
    if world.size > 1:
        per_sample = BYTES_PER_SAMPLE // world.size + BYTES_PER_GATHERED_SAMPLE
        available //= world.local_size if device.type == "cpu" else 1
    if samples * per_sample > available:
        raise UsageError(
            f"--num-envs {num_envs} x --num-steps {num_steps} needs about "
            f"{samples * per_sample / 1e9:,.1f} GB for a rollout and {device} has "
            f"{available / 1e9:,.1f} GB left; {available // per_sample:,} samples fit"
        )


@contextlib.contextmanager
def fast_float32(device: torch.device) -> Iterator[None]:
    """Matrix products in TF32 on CUDA, by oneDNN instead of MKL on CPUs.

    oneDNN is the faster of the two on AMD processors. It is what the setting below selects, but
    where it makes bfloat16 of the factors too (AMX), the default stays.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "medium")
    if device.type == "cpu":
        factor = torch.linspace(1.0, 2.0, 64 * 64, dtype=torch.float32).view(64, 64)
        exact = (factor.double() @ factor.double()).float()
        if not torch.allclose(factor @ factor, exact, rtol=1e-5):
            torch.set_float32_matmul_precision(before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
