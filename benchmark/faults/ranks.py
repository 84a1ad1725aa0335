"""One of two ranks killed under `torchrun`, which starts both again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from faults import runs
from faults.runs import Trial

FAULT = "`kill -9` of rank {} of 2 under `torchrun --max-restarts=1`"
INTERVAL = 3


def inflict(work: Path, undisturbed: Path, seed: int, times: int) -> Iterator[Trial]:
    """Kill rank 0 and rank 1 by turns; `undisturbed` is the directory of a run of two ranks."""
    rng = random.Random(f"ranks {seed}")
    for number in range(times):
        yield kill_rank(work / "run", undisturbed, number % 2, rng)


def kill_rank(run_dir: Path, undisturbed: Path, rank: int, rng: random.Random) -> Trial:
    """Kill a rank in the middle of a run."""
    rows, delay = rng.randint(INTERVAL + 1, runs.ITERATIONS - 6), rng.uniform(0.0, 0.1)
    trial = Trial(FAULT.format(rank), f"{1e3 * delay:.0f} ms after row {rows}")
    with runs.noting(trial):
        with runs.started(runs.command(run_dir, interval=INTERVAL, ranks=2)) as process:
            runs.wait_for_rows(process, run_dir, rows)
            time.sleep(delay)
            before = processes(process.pid)
            newest = runs.iteration_of(runs.checkpoints(run_dir)[-1])
            os.kill(before[rank], signal.SIGKILL)
            killed = time.perf_counter()

            def restarted() -> bool:
                now = set(processes(process.pid).values())
                return len(now) == 2 and not now & set(before.values())

            # Until then a row may come from the ranks that were there before.
            runs.wait_until(process, restarted, "new ranks")
            old = stamp(run_dir / "metrics.csv")
            runs.wait_until(process, lambda: stamp(run_dir / "metrics.csv") != old, "a new row")
            trial.seconds = time.perf_counter() - killed
            ended = runs.end(process)
        if ended.code:
            trial.problems.append(f"exit code {ended.code}: {' / '.join(ended.said[-3:])}")
        runs.compare(trial, run_dir, undisturbed)
        if trial.same:
            resumed_at = json.loads((run_dir / "summary.json").read_text())["resumed_at_iteration"]
            trial.expect(
                resumed_at is not None and resumed_at >= newest,
                f"went on after iteration {resumed_at}, with a checkpoint of {newest} there",
            )
            trial.saw = f"restarted by itself, exit code {ended.code}"
    shutil.rmtree(run_dir, ignore_errors=True)
    return trial


def processes(launcher: int) -> dict[int, int]:
    """The process of each rank that a `torchrun` has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent != launcher:
                continue
            variables = (folder / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has just ended
        for variable in variables:
            if variable.startswith(b"RANK="):
                found[int(variable[5:])] = int(folder.name)
    return found


def stamp(path: Path) -> tuple[int, int]:
    """What changes when a file is replaced."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns
