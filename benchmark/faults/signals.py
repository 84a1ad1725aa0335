"""Signals that ask a run to save, or to save and stop."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from faults import runs
from faults.runs import Trial

INTERVAL = 1000  # none is written but what the signal asks for, and the last


def inflict(work: Path, undisturbed: Path, seed: int, times: int) -> Iterator[Trial]:
    """Send each signal so many times, while the run trains."""
    rng = random.Random(f"signals {seed}")
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        for _ in range(times):
            yield send(work / "run", undisturbed, number, rng)


def send(run_dir: Path, undisturbed: Path, number: signal.Signals, rng: random.Random) -> Trial:
    """Send a signal at some moment."""
    rows, delay = rng.randint(1, runs.ITERATIONS - 6), rng.uniform(0.0, 0.1)
    trial = Trial(number.name, f"{1e3 * delay:.0f} ms after row {rows}")
    command = runs.command(run_dir, interval=INTERVAL)
    with runs.noting(trial):
        with runs.started(command) as process:
            runs.wait_for_rows(process, run_dir, rows)
            time.sleep(delay)
            done = runs.rows_written(run_dir)
            process.send_signal(number)
            ended = runs.end(process)
        saved = [runs.iteration_of(path) for path in runs.checkpoints(run_dir)]
        # The iteration that was under way; the next where it had just checked for signals.
        trial.expect(bool(saved) and 0 < saved[0] - done <= 2, f"row {done}, saved {saved}")
        if number == signal.SIGUSR1:
            trial.expect(ended.code == 0, f"exit code {ended.code}")
            trial.expect(len(saved) == 2, f"saved {saved}")
            trial.saw = "saved, went on to the end, exit code 0"
            runs.compare(trial, run_dir, undisturbed)
        else:
            trial.expect(ended.code == 130, f"exit code {ended.code}")
            last = runs.rows_written(run_dir)
            trial.expect(saved == [last], f"{last} rows, saved {saved}")
            trial.saw = "saved the iteration under way, exit code 130"
            runs.resume(trial, command, run_dir, undisturbed)
    shutil.rmtree(run_dir, ignore_errors=True)
    return trial
