"""Trainers as processes: the JSON line that each writes per iteration, and reading it back.

A trainer is a command in which `{output}`, `{seed}`, `{iterations}` and `{steps}` are filled in.
What it leaves at `{output}` is a run directory of `train/ppo_hybrid.py`, or a file of lines with
`iteration` (from 1), `samples` (so far), `seconds` (since the process started, imports and all;
what was spent on evaluation is left out), `seconds_iteration` and its parts `seconds_rollout` and
`seconds_update`, and, where the policy was evaluated, `REWARDS` on the shipped cohorts.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pandas as pd
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from common import run

import hydrogel_gym
from hydrogel_gym.errors import UsageError
from hydrogel_gym.runs.directory import METRICS_FILE, SUMMARY_FILE

COHORTS = ("train", "holdout")
REWARDS = tuple(f"{name}_deterministic_reward" for name in COHORTS)


def train(command: str, threads: int, **values: object) -> pd.DataFrame:
    """Run a trainer to its end, given the placeholders' values; returns a row per iteration."""
    with tempfile.TemporaryDirectory() as folder:
        output, launched = Path(folder, "output"), time.time()
        filled = command.format(python=sys.executable, output=output, **values)
        run(shlex.split(filled), threads=threads)
        return read_iterations(output, launched)


def read_iterations(path: Path, launched: float) -> pd.DataFrame:
    """A row per iteration of a process launched at a time in seconds since the epoch.

    A run directory counts from when training began; and there, evaluations are in the time.
    """
    if path.is_file():
        return pd.read_json(path, lines=True)
    rows = pd.read_csv(path / METRICS_FILE).rename(columns={"global_step": "samples"})
    for part in ("rollout", "update"):
        rows[f"seconds_{part}"] = rows[f"{part}_seconds"]
    began = json.loads((path / SUMMARY_FILE).read_text())["training_began"]
    rows["seconds"] = rows["wall_seconds"] + began - launched
    rows["seconds_iteration"] = rows["seconds_rollout"] + rows["seconds_update"]
    return rows


def seconds_since_process_start() -> float:
    """Age of this process (Linux), to a clock tick of 10 ms."""
    # The name, field 2, may hold spaces; field 22 is the start in ticks since the machine's.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start = int(fields[22 - 3]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start


class Recorder:
    """Writes the lines, and keeps evaluations of the deterministic policy `act` off the clock."""

    def __init__(self, args: argparse.Namespace, env_id: str, act: Callable[[Tensor], Any]) -> None:
        self.path, self.evaluate_every, self.act = args.output, args.evaluate_every, act
        self.path.write_text("")
        self._evaluation_seconds = 0.0
        self._envs = {}
        for name in COHORTS if self.evaluate_every else ():
            cohort = hydrogel_gym.load_cohort(name)
            self._envs[name] = gym.make_vec(
                env_id, num_envs=len(cohort), cohort=cohort, output="torch"
            )

    def record(
        self, iteration: int, samples: int, rollout: float, update: float, **scalars: float
    ) -> None:
        """Write the line of one iteration with its seconds, and evaluate if it is time to."""
        row = {
            "iteration": iteration,
            "samples": samples,
            "seconds": seconds_since_process_start() - self._evaluation_seconds,
            "seconds_iteration": rollout + update,
            "seconds_rollout": rollout,
            "seconds_update": update,
            **scalars,
        }
        start = time.perf_counter()
        if self.evaluate_every and iteration % self.evaluate_every == 0:
            row |= self.evaluate()
        self._evaluation_seconds += time.perf_counter() - start
        with self.path.open("a") as file:  # closed, and so flushed, at each line
            file.write(json.dumps(row) + "\n")

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean reward of one design per patient."""
        figures = {}
        for column, envs in zip(REWARDS, self._envs.values(), strict=True):
            obs, _ = envs.reset()
            figures[column] = envs.step(self.act(obs))[1].mean().item()
        return figures


def arguments(doc: str, argv: list[str] | None, **own: dict[str, Any]) -> argparse.Namespace:
    """A trainer's command line: names and defaults of our source preset, and flags of its own."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    flag = parser.add_argument
    flag("--num-envs", type=int, default=2000, help="parallel environments")
    flag("--num-steps", type=int, default=100, help="steps per environment and iteration")
    flag("--num-iterations", type=int, default=200, help="rollouts, each followed by its updates")
    flag("--num-epochs", type=int, default=10, help="passes over each batch")
    flag("--minibatch-size", type=int, default=2000, help="samples per update")
    flag("--learning-rate", type=float, default=3e-4, help="initial, of Adam; it decays linearly")
    flag("--seed", type=int, default=1, help="of weights, samples and minibatches")
    flag("--evaluate-every", type=int, default=0, help="iterations between evaluations; 0 never")
    flag("--output", type=Path, required=True, help="file of JSON lines")
    for name, settings in own.items():
        flag(f"--{name.replace('_', '-')}", **settings)
    args = parser.parse_args(argv)
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.minibatch_size:
        raise UsageError(
            f"--minibatch-size is {args.minibatch_size}, which does not divide the batch of "
            f"num_envs x num_steps = {batch_size}"
        )
    return args
