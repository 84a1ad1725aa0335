"""What the trainers of this folder write: one JSON line per iteration, as it happens.

Every line has `iteration` (from 1), `samples` (so far), `seconds` (since the process started, as
the operating system says, so that the interpreter's start and all imports count; what was spent on
evaluation is left out), `seconds_iteration` (rollout and updates of this iteration) and its parts
`seconds_rollout` and `seconds_update`, and, where the policy was evaluated,
`train_deterministic_reward` and `holdout_deterministic_reward` on the shipped cohorts. A trainer
may add scalars of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

import hydrogel_gym
from hydrogel_gym.errors import UsageError

COHORTS = ("train", "holdout")


def seconds_since_process_start() -> float:
    """Age of this process (Linux), to a clock tick of 10 ms."""
    # The name, field 2, may hold spaces; field 22 is the start in ticks since the machine's.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start = int(fields[22 - 3]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start


class Recorder:
    """Writes the lines, and keeps evaluation off the clock.

    Args:
        path: file to append to; None prints instead.
        evaluate_every: iterations between evaluations; 0 for never.
        env_id: environment to evaluate in.
        act: the deterministic policy, from (B, 13) observations to the environment's action.
    """

    def __init__(
        self,
        path: Path | None,
        evaluate_every: int,
        env_id: str,
        act: Callable[[Tensor], Any],
    ) -> None:
        self.path, self.evaluate_every, self.env_id, self.act = path, evaluate_every, env_id, act
        self._evaluation_seconds = 0.0
        self._envs: dict[str, gym.vector.VectorEnv] = {}
        if path is not None:
            try:
                path.write_text("")
            except OSError as error:
                raise UsageError(f"--output {path} cannot be written to: {error}") from error

    def record(
        self, iteration: int, samples: int, rollout: float, update: float, **scalars: float
    ) -> None:
        """Write the line of one iteration, and evaluate if it is time to.

        Args:
            iteration: from 1.
            samples: so far.
            rollout: seconds spent in this iteration's rollout.
            update: seconds spent in its updates.
            scalars: more to write.
        """
        row = {
            "iteration": iteration,
            "samples": samples,
            "seconds": seconds_since_process_start() - self._evaluation_seconds,
            "seconds_iteration": rollout + update,
            "seconds_rollout": rollout,
            "seconds_update": update,
            **scalars,
        }
        if self.evaluate_every and iteration % self.evaluate_every == 0:
            start = time.perf_counter()
            row |= self.evaluate()
            self._evaluation_seconds += time.perf_counter() - start
        line = json.dumps(row)
        if self.path is None:
            print(line, flush=True)
            return
        with self.path.open("a") as file:  # closed, and so flushed, at each line
            file.write(line + "\n")

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean reward of one design per patient."""
        if not self._envs:
            for name in COHORTS:
                cohort = hydrogel_gym.load_cohort(name)
                self._envs[name] = gym.make_vec(
                    self.env_id, num_envs=len(cohort), cohort=cohort, output="torch"
                )
        figures = {}
        for name, envs in self._envs.items():
            obs, _ = envs.reset()
            reward = envs.step(self.act(obs))[1]
            figures[f"{name}_deterministic_reward"] = reward.mean().item()
        return figures


def check_sizes(args: argparse.Namespace, names: Iterable[str]) -> None:
    """Refuse sizes that cannot be.

    Raises:
        UsageError: names the flag, its value and what is allowed.
    """
    for name in names:
        if (value := getattr(args, name)) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; allowed: 1 or more")
    if args.evaluate_every < 0:
        raise UsageError(f"--evaluate-every is {args.evaluate_every}; allowed: 0 or more")
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.minibatch_size:
        raise UsageError(
            f"--minibatch-size is {args.minibatch_size}, which does not divide the batch of "
            f"num_envs x num_steps = {batch_size}"
        )


def run(train: Callable[[argparse.Namespace], None], parse: Callable[..., Any], argv: Any) -> int:
    """Train as a command line asks; returns the exit code, after one line on a bad request."""
    try:
        train(parse(argv))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
