"""How many environments fit into memory, the message if they do not, and reuse of freed memory."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import torch

# Peak while a step runs: spaces, states, what the step hands out and needs in between, and what the
# step before handed out, which the caller still keeps. The first three are what
# `benchmark/speed/environment.py` measures, rounded; the last two were measured in the same way.
_BYTES_PER_ENV = 1150  # compiled, torch
_BYTES_UNCOMPILED = 260
_BYTES_NUMPY = 300
_BYTES_EXPLORED = 750  # `observe_explored=True`
_BYTES_GROUPED = 1050  # `obs_format="dict"`, as numpy: a dict per `final_obs`
# Of each number of a history, counted, not measured: state, `obs` and `final_obs` of two steps, the
# bounds of the space, and what a step needs in between; ten of float32.
_BYTES_HISTORY = 40


def bytes_per_env(
    *, compiled: bool, numpy: bool, explored: bool, grouped: bool, history: int = 0
) -> int:
    """About how many bytes one environment, with so many numbers of history, needs at the peak."""
    return (
        _BYTES_PER_ENV
        + _BYTES_UNCOMPILED * (not compiled)
        + _BYTES_NUMPY * numpy
        + _BYTES_EXPLORED * explored
        + _BYTES_GROUPED * (numpy and grouped)
        + _BYTES_HISTORY * history
    )


def available_bytes(device: torch.device) -> int | None:
    """Memory that can be had on a device; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")  # Linux
    if device.type != "cpu" or not meminfo.exists():
        return None
    rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(rows["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in rows else None


def too_large(num_envs: int, bytes_each: int, device: torch.device) -> str:
    """What `num_envs` needs and what would fit, in one line."""
    line = f"num_envs is {num_envs}; it needs about {num_envs * bytes_each / 1e9:,.1f} GB"
    available = available_bytes(device)
    if available is None:
        return f"{line} ({bytes_each:,} bytes each), more than there is; take fewer"
    fitting = available // bytes_each
    return (
        f"{line} ({bytes_each:,} bytes each) and {device} has {available / 1e9:,.1f} GB left; "
        f"take {max(1, min(fitting, num_envs // 2)):,} or fewer"
    )


def check_memory(num_envs: int, bytes_each: int, device: torch.device) -> None:
    """Refuse more environments than fit.

    Linux hands out more memory than there is and ends the process that uses it, so that asking is
    no test.

    Raises:
        MemoryError: names how many would fit.
    """
    available = available_bytes(device)
    if available is not None and num_envs * bytes_each > available:
        raise MemoryError(too_large(num_envs, bytes_each, device))


def keep_freed_memory() -> None:
    """Have glibc keep freed buffers for reuse, in the whole process and for good.

    By default those of megabytes go back to the system, which hands them out again one zeroed page
    of 4 KiB at a time: a quarter of the time of a training update, and with a million environments
    nearly half that of a step. Elsewhere than on Linux this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(parameter, 2**31 - 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether numpy, torch on a CPU or torch on an accelerator failed to get memory."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
