"""Runs trainers as processes of their own and reads what they wrote.

A trainer is a command, run from the root of the checkout, in which `{python}`, `{output}`,
`{seed}`, `{iterations}` and `{steps}` are filled in. What it leaves at `{output}` is either a file
of JSON lines, as `protocol.py` defines them, or a run directory of `train/ppo_hybrid.py`.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[2]
REWARDS = ("train_deterministic_reward", "holdout_deterministic_reward")
# Columns of the trainer's metrics.csv under the names of the lines.
METRICS = {
    "iteration": "iteration",
    "global_step": "samples",
    "rollout_seconds": "seconds_rollout",
    "update_seconds": "seconds_update",
} | {name: name for name in REWARDS}


class TrainerError(RuntimeError):
    """A trainer failed or wrote too little; the message is one line."""


def fill(command: str, **values: object) -> list[str]:
    """The words of a command with its placeholders filled in."""
    return [word.format(**values, python=sys.executable) for word in shlex.split(command)]


def environment(threads: int) -> dict[str, str]:
    """Variables of a trainer's process, which is to use `threads` threads."""
    return os.environ | {"OMP_NUM_THREADS": str(threads)}


def read_iterations(path: Path, needed: Iterable[str], launched: float) -> pd.DataFrame:
    """A row per iteration, whichever of the two forms lies at `path`.

    Args:
        path: file of JSON lines, or run directory.
        needed: columns that must be there.
        launched: when the process was, in seconds since the epoch. A run directory counts from when
            training began; and there, an evaluation per iteration is in the time.

    Raises:
        TrainerError: nothing is there, or a column is missing.
    """
    try:
        if path.is_dir():
            table = pd.read_csv(path / "metrics.csv").rename(columns=METRICS)
            summary = json.loads((path / "summary.json").read_text())
            table["seconds"] = table["wall_seconds"] + summary["training_began"] - launched
            table["seconds_iteration"] = table["seconds_rollout"] + table["seconds_update"]
        else:
            table = pd.read_json(path, lines=True)
    except (OSError, ValueError) as error:
        raise TrainerError(f"nothing to read at {path}: {error}") from error
    if missing := [name for name in needed if name not in table]:
        raise TrainerError(f"{path} lacks {', '.join(missing)}")
    return table


def resources(command: list[str]) -> tuple[float, float]:
    """Seconds that a process took, and its peak memory in megabytes.

    Raises:
        TrainerError: it failed.
    """
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise TrainerError(f"{shlex.join(command)} ended with {child.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss / 1e3


def complete(name: str, command: list[str], variables: dict[str, str]) -> str:
    """Run a command to its end, from the root of the checkout; returns what it printed.

    Args:
        name: for messages.
        command: the program and its arguments.
        variables: of its environment.

    Raises:
        TrainerError: it failed.
    """
    ended = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if ended.returncode:
        last_line = (ended.stderr.strip() or ended.stdout.strip()).splitlines()[-1:]
        raise TrainerError(f"{name}: exit code {ended.returncode}: {''.join(last_line)}")
    return ended.stdout


def train(
    name: str, command: str, needed: Iterable[str], threads: int, **values: object
) -> pd.DataFrame:
    """Run a trainer to its end; returns a row per iteration.

    Args:
        name: for messages.
        command: with placeholders.
        needed: columns that must come back.
        threads: of every trainer's OpenMP.
        values: of the placeholders but `python` and `output`.

    Raises:
        TrainerError: it failed or wrote too little.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, launched = Path(folder, "output"), time.time()
        complete(name, fill(command, output=output, **values), environment(threads))
        try:
            return read_iterations(output, needed, launched)
        except TrainerError as error:
            raise TrainerError(f"{name}: {error}") from error


def machine(threads: int) -> str:
    """Hardware, threads, commit and versions, for the foot of a table."""
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    packages = []
    for name in ("torch", "gymnasium", "stable-baselines3"):
        try:
            packages.append(f"{name} {version(name)}")
        except ModuleNotFoundError:
            packages.append(f"no {name}")
    return (
        f"{cpu or platform.machine()}, {os.cpu_count()} cores; threads of every trainer: "
        f"{threads}; commit {commit}; Python {platform.python_version()}, {', '.join(packages)}."
    )
