"""What a step of the vector environments costs: time and memory, compiled and not.

    python benchmark/speed/environment.py

Five minutes on two cores, most of which the compiler takes. One thread: where other work shares the
cores, threads that wait for each other at every loop of a step make it hundreds of times slower,
and the figures worthless. `benchmark/gpu.py` measures the same on a GPU.
"""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, get_args

import torch
from gymnasium.vector import SyncVectorEnv

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Parser, count, in_turn, made_by, spread, table, write

from hydrogel_gym import HydrogelAdaptVectorEnv, HydrogelEnv, HydrogelVectorEnv
from hydrogel_gym.memory import keep_freed_memory
from hydrogel_gym.problem.adaptive import SLOT_WIDTH, Observe
from hydrogel_gym.runs.command_line import run_script

VARIANTS = {
    "torch": {"output": "torch"},
    "torch, compiled": {"output": "torch", "compile": True},
    "numpy, compiled": {"output": "numpy", "compile": True},
}
DEFAULT_ENVS = 2000  # one environment per shipped patient
SYNC_ENVS = 32
MEMORY_FROM = 2**18  # fewer environments fit into what the compiler needed before them
ROUND_SECONDS = 0.1
CHECKS = 8  # of an adaptive episode
FIRST, COPIES = "`HydrogelDesign-v0`", "three copies of a history"


def stepper(env: HydrogelVectorEnv) -> Callable[[], Any]:
    """The step of a new environment."""
    env.reset(seed=0)
    env.action_space.seed(0)
    action = env.action_space.sample()
    if env.output == "torch":
        device = env.problem.device
        action = {head: torch.from_numpy(value).to(device) for head, value in action.items()}
    return lambda: env.step(action)


def milliseconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Of each call, the median of every round."""

    def measure(name: str, _: int) -> float:
        timings, end = [], time.perf_counter() + ROUND_SECONDS
        while not timings or time.perf_counter() < end:
            start = time.perf_counter()
            calls[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            timings.append(1e3 * (time.perf_counter() - start))
        return statistics.median(timings)

    # The first round warms up.
    return {name: values[1:] for name, values in in_turn(calls, 1 + rounds, measure).items()}


def copies() -> Callable[[], Any]:
    """What a step writes of histories: those of the state, of `obs` and of `final_obs`.

    Beside those of the step before, which a user may still hold.
    """
    history = torch.rand(DEFAULT_ENVS, CHECKS * SLOT_WIDTH)
    steps = itertools.cycle([[torch.empty_like(history) for _ in range(3)] for _ in range(2)])
    return lambda: [block.copy_(history) for block in next(steps)]


def adaptive_rows(rounds: int) -> list[list[str]]:
    """Milliseconds of a step for all that an adaptive problem may observe, beside the first id."""
    shown: dict[str, list[str]] = {}
    for compile in (False, True):
        same: dict[str, Any] = {"output": "torch", "compile": compile, "horizon": CHECKS}
        calls = {FIRST: stepper(HydrogelVectorEnv(DEFAULT_ENVS, **same))}
        for observe in get_args(Observe):
            env = HydrogelAdaptVectorEnv(DEFAULT_ENVS, observe=observe, **same)
            calls[f"`HydrogelAdapt-v0`, `observe={observe!r}`"] = stepper(env)
        times = milliseconds(calls | {COPIES: copies()}, rounds)
        base = statistics.median(times[FIRST])
        for name, values in times.items():
            speed = "" if name == COPIES else f"{base / statistics.median(values):.2f}"
            shown.setdefault(name, [name]).extend([spread(values), speed])
    return list(shown.values())


def peak_bytes(variant: str, num_envs: int) -> int:
    """Peak memory of this process over the life of an environment."""
    step = stepper(HydrogelVectorEnv(num_envs, **VARIANTS[variant]))
    for _ in range(3):
        returned = step()  # held until the next step has been made, as a user does
    del returned
    # Not getrusage, whose peak a new process inherits.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def bytes_per_env(variant: str, num_envs: int) -> float:
    """Beyond what a process with a single environment needs; each in a process of its own."""
    peaks = []
    for size in (1, num_envs):
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            peaks.append(pool.submit(peak_bytes, variant, size).result())
    return (peaks[1] - peaks[0]) / (num_envs - 1)


def main(argv: list[str] | None = None) -> None:
    """Measure every size and write the tables."""
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=count, default=7, help="timings per size")
    parser.add_argument("--max-power", type=int, default=20, help="largest size, a power of 2")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_freed_memory()
    sizes = sorted({DEFAULT_ENVS, *(2**power for power in range(0, args.max_power + 1, 2))})
    env = SyncVectorEnv([HydrogelEnv] * SYNC_ENVS, autoreset_mode="SameStep")
    env.reset(seed=0)
    action = env.action_space.sample()
    timings = milliseconds({"sync": lambda: env.step(action)}, args.rounds)["sync"]
    sync = statistics.median(timings) / SYNC_ENVS  # per environment
    default, every = [], []
    for size in sizes:
        calls = {name: stepper(HydrogelVectorEnv(size, **x)) for name, x in VARIANTS.items()}
        times, largest = milliseconds(calls, args.rounds), {}
        if size == DEFAULT_ENVS:
            default_times = times
        cells = [f"{1e6 * statistics.median(x) / size:,.0f} ns" for x in times.values()]
        if size >= MEMORY_FROM:
            largest = {variant: bytes_per_env(variant, size) for variant in VARIANTS}
            cells = [f"{a}, {b:,.0f} B" for a, b in zip(cells, largest.values(), strict=True)]
        every.append([f"{size:,}", *cells])
    for variant, values in default_times.items():
        per_ms, held = DEFAULT_ENVS / statistics.median(values), largest.get(variant)
        cells = [spread(values), f"{per_ms / 1e3:.2f}", f"{per_ms * sync:,.0f}"]
        default.append([variant, *cells, f"{held:,.0f}" if held else ""])
    name = f"SyncVectorEnv of {SYNC_ENVS} `HydrogelEnv`"
    default.append([name, f"{sync * SYNC_ENVS:.2f}", f"{1e-3 / sync:.4f}", "1", ""])
    adaptive = adaptive_rows(args.rounds)
    columns = ["ms per step", "M steps/s", "times SyncVectorEnv", "bytes per environment"]
    lines = [
        "The step of `HydrogelVectorEnv` (`horizon=1`, actions checked on the CPU) after "
        "`hydrogel_gym.memory.keep_freed_memory()`: median of the rounds' median steps, minimum "
        "to maximum of the rounds in brackets.",
        "",
        *table([f"{DEFAULT_ENVS:,} environments", *columns], default),
        "",
        "Nanoseconds per environment and step, and bytes per environment (peak memory of a process "
        "less that of one with a single environment; "
        f"from {MEMORY_FROM:,} environments):",
        "",
        *table(["environments", *VARIANTS], every),
        "",
        f"The adaptive problem, {DEFAULT_ENVS:,} environments, episodes of {CHECKS} steps, and "
        "how many steps a second are taken beside the first id. A step writes a history three "
        "times, which takes as long as is shown whatever else it does:",
        "",
        *table(["", "ms per step", "speed", "compiled: ms per step", "speed"], adaptive),
    ]
    write(args.output_dir, "environment", lines, made=made_by())


if __name__ == "__main__":
    sys.exit(run_script(main))
