"""What a step of the vector environment costs: time, memory and kernels, compiled and not.

    python benchmark/environment.py

Writes `results/environment.csv`, `.md` and `.png`. About five minutes on two cores, most of which
the compiler takes. Needs `pip install -e ".[train]"` for the picture. Measures a CUDA device too,
where there is one.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import platform
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium
import pandas as pd
import torch
from gymnasium.vector import SyncVectorEnv
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode

from hydrogel_gym import HydrogelEnv, HydrogelVectorEnv
from hydrogel_gym.files import write_atomically
from hydrogel_gym.memory import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
VARIANTS = {
    "torch": {"output": "torch"},
    "torch, compiled": {"output": "torch", "compile": True},
    "numpy, compiled": {"output": "numpy", "compile": True},
}
MANUAL_SIZE = 2000  # the default `num_envs`, one environment per shipped patient
SYNC_ENVS = 32
MEMORY_FROM = 2**18  # fewer environments fit into what the compiler needed before them
ROUND_SECONDS = 0.1


class CountOperations(TorchDispatchMode):
    """Counts the operations that reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run an operation; a view launches nothing and is not counted."""
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def make(variant: str, num_envs: int, device: str) -> tuple[HydrogelVectorEnv, Any]:
    """An environment after its reset, and an action in its own library."""
    env = HydrogelVectorEnv(num_envs, device=device, **VARIANTS[variant])
    env.reset(seed=0)
    env.action_space.seed(0)
    action = env.action_space.sample()
    if env.output == "torch":
        action = {head: torch.from_numpy(value).to(device) for head, value in action.items()}
    return env, action


def time_calls(
    calls: dict[str, Callable[[], Any]], rounds: int, device: str
) -> dict[str, pd.Series]:
    """Seconds per call of each: the median call of every round.

    The calls take turns, so that a busy moment meets them all, and a call during which the process
    had to wait for a core does not count. An accelerator is waited for after every call.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def seconds(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - start

    for call in calls.values():
        for _ in range(3):
            seconds(call)  # warm up
    rows = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            timings, end = [], time.perf_counter() + ROUND_SECONDS
            while not timings or time.perf_counter() < end:
                timings.append(seconds(call))
            rows[name].append(pd.Series(timings).median())
    return {name: pd.Series(medians) for name, medians in rows.items()}


def peak_bytes(variant: str, num_envs: int, device: str) -> int:
    """Peak memory of this process, or of the accelerator, over the life of an environment."""
    env, action = make(variant, num_envs, device)
    for _ in range(3):
        returned = env.step(action)  # held until the next step has been made, as a user does
    del returned
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not getrusage, whose peak a new process inherits.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure_memory(variant: str, num_envs: int, device: str) -> int:
    """`peak_bytes` of a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(peak_bytes, variant, num_envs, device).result()


def count_kernels(device: str) -> tuple[int, int]:
    """Operations of a step that is not compiled, kernels of one that is."""
    env, action = make("torch", MANUAL_SIZE, device)
    with CountOperations() as operations:
        env.step(action)
    metrics.reset()
    make("torch, compiled", MANUAL_SIZE, device)
    return operations.count, metrics.generated_kernel_count


def measure(sizes: list[int], rounds: int, device: str, threads: int) -> list[dict[str, Any]]:
    """One row per variant and size."""
    rows = []
    torch.set_num_threads(threads)
    keep_freed_memory()
    for num_envs in sizes:
        calls = {}
        for variant in VARIANTS:
            env, action = make(variant, num_envs, device)
            calls[variant] = lambda env=env, action=action: env.step(action)
        for variant, timings in time_calls(calls, rounds, device).items():
            rows.append(
                {
                    "device": device,
                    "threads": threads,
                    "variant": variant,
                    "num_envs": num_envs,
                    "ms_per_step": 1e3 * timings.median(),
                    "ms_min": 1e3 * timings.min(),
                    "ms_max": 1e3 * timings.max(),
                    "ns_per_env_step": 1e9 * timings.median() / num_envs,
                    "million_steps_per_s": num_envs / timings.median() / 1e6,
                }
            )
            print(*rows[-1].values(), flush=True)
    return rows


def add_memory(rows: list[dict[str, Any]], device: str) -> None:
    """`bytes_per_env` of the larger sizes."""
    one = {variant: measure_memory(variant, 1, device) for variant in VARIANTS}
    for row in rows:
        if row["num_envs"] >= MEMORY_FROM:
            peak = measure_memory(row["variant"], row["num_envs"], device)
            row["bytes_per_env"] = (peak - one[row["variant"]]) / (row["num_envs"] - 1)


def sync_steps_per_second(rounds: int) -> float:
    """Environment steps per second of Gymnasium's vector environment over the single one."""
    env = SyncVectorEnv([HydrogelEnv] * SYNC_ENVS, autoreset_mode="SameStep")
    env.reset(seed=0)
    action = env.action_space.sample()
    torch.set_num_threads(1)  # its tensors of one row are never shared out anyway
    return (
        SYNC_ENVS / time_calls({"sync": lambda: env.step(action)}, rounds, "cpu")["sync"].median()
    )


def hardware() -> str:
    """Processor, threads, versions and commit."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude", "*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{names[0] if names else platform.processor()}{gpu}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"gymnasium {gymnasium.__version__}; commit {commit or 'unknown'}"
    )


def summarise(table: pd.DataFrame, sync: float, counts: dict[str, tuple[int, int]]) -> str:
    """The report in Markdown."""
    note = "median of the rounds' median steps, minimum to maximum of the rounds in brackets"
    lines = [
        "The step of `HydrogelVectorEnv` (`horizon=1`, actions checked on the CPU) after "
        f"`hydrogel_gym.memory.keep_freed_memory()`; {hardware()}; {note}; made by "
        "`benchmark/environment.py`.",
        "",
        f"| {MANUAL_SIZE:,} environments | ms per step | M steps/s | times SyncVectorEnv "
        "| bytes per environment |",
        "|---|---|---|---|---|",
    ]
    largest = table["num_envs"].max()
    for (device, threads, variant), group in table.groupby(
        ["device", "threads", "variant"], sort=False
    ):
        row = group[group["num_envs"] == MANUAL_SIZE].iloc[0]
        memory = group.loc[group["num_envs"] == largest, "bytes_per_env"].iloc[0]
        name = f"{variant}, {device}, {threads} thread{'s' * (threads > 1)}"
        lines.append(
            f"| {name} | {row['ms_per_step']:.2f} "
            f"[{row['ms_min']:.2f}, {row['ms_max']:.2f}] | {row['million_steps_per_s']:.2f} "
            f"| {row['million_steps_per_s'] * 1e6 / sync:,.0f} "
            f"| {'' if pd.isna(memory) else f'{memory:,.0f}'} |"
        )
    lines += [
        f"| SyncVectorEnv of {SYNC_ENVS} `HydrogelEnv` | {1e3 * SYNC_ENVS / sync:.2f} "
        f"| {sync / 1e6:.4f} | 1 | |",
        "",
        "Nanoseconds per environment and step, and bytes per environment (peak memory of a process "
        "less that of one with a single environment; "
        f"from {MEMORY_FROM:,} environments):",
        "",
        "| device | threads | environments | " + " | ".join(VARIANTS) + " |",
        "|---|---|---|" + "---|" * len(VARIANTS),
    ]
    for (device, threads, num_envs), group in table.groupby(["device", "threads", "num_envs"]):
        cells = [
            f"{row['ns_per_env_step']:,.0f} ns"
            + ("" if pd.isna(row["bytes_per_env"]) else f", {row['bytes_per_env']:,.0f} B")
            for _, row in group.iterrows()
        ]
        lines.append(f"| {device} | {threads} | {num_envs:,} | " + " | ".join(cells) + " |")
    for device, (operations, kernels) in counts.items():
        lines += [
            "",
            f"On {device}, a step that is not compiled dispatches {operations} operations; a "
            f"compiled one is {kernels} kernels (on a CPU, loops of one function).",
        ]
    return "\n".join(lines) + "\n"


def draw(table: pd.DataFrame) -> bytes:
    """Time and memory per environment against the number of environments, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (device, threads, variant), group in table.groupby(
        ["device", "threads", "variant"], sort=False
    ):
        label = f"{variant}, {device}, {threads} thread{'s' * (threads > 1)}"
        left.plot(group["num_envs"], group["ns_per_env_step"], marker="o", ms=3, label=label)
        right.plot(group["num_envs"], group["bytes_per_env"], marker="o", ms=3, label=label)
    for axes, title in ((left, "ns per environment and step"), (right, "bytes per environment")):
        axes.set(xscale="log", yscale="log", xlabel="environments", ylabel=title)
        axes.grid(alpha=0.3, which="both")
    right.set_ylim(300, 5000)
    left.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def main() -> None:
    """Measure every size and write table, report and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="timings per size; the median counts")
    parser.add_argument("--max-power", type=int, default=20, help="largest size, as a power of 2")
    # One thread by default: where other work shares the cores, threads that wait for each other
    # at every loop of a step make it hundreds of times slower, and the figures worthless.
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="on the CPU")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.max_power < 18 or args.max_power % 2:
        parser.error(f"--max-power is {args.max_power}; allowed: 18 or more, even numbers")
    if not args.output_dir.is_dir():
        parser.error(f"--output-dir {args.output_dir}: no such folder")
    sizes = sorted([*(2**power for power in range(0, args.max_power + 1, 2)), MANUAL_SIZE])
    rows, counts = [], {}
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        counts[device] = count_kernels(device)
        for threads in args.threads if device == "cpu" else [1]:
            measured = measure(sizes, args.rounds, device, threads)
            # More threads need no more memory.
            if threads == args.threads[0]:
                add_memory(measured, device)
            rows += measured
    table = pd.DataFrame(rows)
    text = summarise(table, sync_steps_per_second(args.rounds), counts)
    csv = table.to_csv(index=False, float_format="%.6g")
    write_atomically(args.output_dir / "environment.csv", csv.encode())
    write_atomically(args.output_dir / "environment.png", draw(table))
    write_atomically(args.output_dir / "environment.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
