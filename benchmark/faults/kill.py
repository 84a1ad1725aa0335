"""A run killed at any moment, and one killed while it writes a checkpoint."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from faults import runs
from faults.runs import FaultError, Trial
from hydrogel_gym.runs import checkpoints

AT_RANDOM = "`kill -9` at a random moment of the run"
IN_A_WRITE = "`kill -9` while a checkpoint is written"
INTERVAL = 3  # at random moments, so that there is something to lose


def inflict(
    work: Path, undisturbed: Path, seconds: float, seed: int, at_random: int, in_writes: int
) -> Iterator[Trial]:
    """Kill runs and continue them.

    Args:
        work: folder for the run directories.
        undisturbed: run directory to compare with.
        seconds: how long the undisturbed run took, from start to exit.
        seed: of the moments.
        at_random: kills at moments uniform over `seconds`.
        in_writes: kills when a temporary file is seen.
    """
    rng = random.Random(f"kill {seed}")
    for _ in range(at_random):
        yield kill_at_random(work / "run", undisturbed, seconds, rng)
    for _ in range(in_writes):
        yield kill_in_a_write(work / "run", undisturbed, rng)


def kill_at_random(run_dir: Path, undisturbed: Path, seconds: float, rng: random.Random) -> Trial:
    """Kill a run at a moment between its start and its exit, then continue it."""
    trial = Trial(AT_RANDOM, "")
    command = runs.command(run_dir, interval=INTERVAL)

    def wait(process: subprocess.Popen) -> None:
        moment = rng.uniform(0.0, seconds)
        trial.did = f"{moment:.2f} s after the start"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)

    with runs.noting(trial):
        kill(trial, command, run_dir, wait)
        rows = runs.rows_written(run_dir)
        trial.saw = "in training"
        if rows == 0:
            trial.saw = "before the first row"
        elif rows == runs.ITERATIONS:
            trial.saw = "after the last row"
        if runs.unfinished(run_dir):
            trial.saw += ", leaving an unfinished file"
        runs.resume(trial, command, run_dir, undisturbed)
    shutil.rmtree(run_dir, ignore_errors=True)
    return trial


def kill_in_a_write(run_dir: Path, undisturbed: Path, rng: random.Random) -> Trial:
    """Kill a run the instant that the temporary file of a checkpoint is seen, then continue it."""
    trial = Trial(IN_A_WRITE, "")
    command = runs.command(run_dir, interval=1)

    def wait(process: subprocess.Popen) -> None:
        iteration = rng.randint(1, runs.ITERATIONS)
        trial.did = f"the first seen from iteration {iteration} on"
        watch(process, run_dir / "checkpoints", iteration)

    with runs.noting(trial):
        kill(trial, command, run_dir, wait)
        trial.saw = "renamed before the kill took effect"
        for path in runs.unfinished(run_dir):
            try:
                checkpoints.unseal(path.read_bytes())
                trial.saw = "left a temporary file, whole but not renamed"
            except checkpoints.CheckpointError:
                trial.saw = "left a temporary file that is cut off"
        runs.resume(trial, command, run_dir, undisturbed)
    shutil.rmtree(run_dir, ignore_errors=True)
    return trial


def kill(
    trial: Trial, command: list[str], run_dir: Path, wait: Callable[[subprocess.Popen], None]
) -> None:
    """Start runs until one was killed before it ended by itself.

    Args:
        trial: counts those that ended.
        command: of the runs.
        run_dir: theirs.
        wait: returns when it is time to kill.

    Raises:
        FaultError: one failed by itself.
    """
    while True:
        with runs.started(command) as process:
            wait(process)
            process.kill()
            code = runs.end(process).code
        if code == -signal.SIGKILL:
            return
        if code:
            raise FaultError(f"undisturbed, the run ended with exit code {code}")
        shutil.rmtree(run_dir)
        trial.redrawn += 1


def watch(process: subprocess.Popen, folder: Path, iteration: int) -> None:
    """Return once a checkpoint of this iteration or a later one is being written."""
    while process.poll() is None:
        try:
            # As often as it can be looked at: there may be only a millisecond between first sight
            # and the rename.
            names = os.listdir(folder)
        except FileNotFoundError:
            time.sleep(0.001)
            continue
        for name in names:
            if name.startswith(".") and runs.iteration_of(Path(name)) >= iteration:
                return
