"""Runs of the trainer to inflict faults on, and whether they ended as if nothing had happened."""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import ROOT

from hydrogel_gym.runs.directory import (
    METRICS_FILE,
    POLICY_FILE,
    RUN_FILES,
    SUMMARY_FILE,
    WANDB_FILE,
)
from hydrogel_gym.runs.metrics import METRICS

ITERATIONS = 20
SETTINGS = (
    f"train/ppo_hybrid.py --preset quick --no-oracle --device cpu --compile off --num-iterations "
    f"{ITERATIONS} --num-envs 200 --minibatch-size 200 --resume auto"
)
TIMINGS = {metric.name for metric in METRICS if metric.namespace == "perf"}
# Of the summary; that a run was continued is in it too.
NOT_COMPARED = TIMINGS | {"training_began", "compile_seconds", "resumed_at_iteration"}
FINISHED_FILES = set(RUN_FILES) - {WANDB_FILE}
PATIENCE_SECONDS = 300


class FaultError(RuntimeError):
    """A run did something that keeps its fault from being inflicted."""


@dataclass
class Trial:
    """One fault, inflicted once."""

    fault: str = ""  # what is done to the run; trials of one fault are one row of the report
    did: str = ""  # the particulars of this trial
    saw: str = ""  # what came of it, in words that other trials of this fault may share
    same: bool | None = None  # whether it ended, once continued, as the undisturbed run did
    problems: list[str] = field(default_factory=list)  # expectations that failed
    seconds: float | None = None  # what the report gives the median of, where there is such a thing

    def expect(self, is_so: bool, problem: str) -> None:
        """Note a problem unless something is so."""
        if not is_so:
            self.problems.append(problem)

    def resume(self, command: list[str], run_dir: Path, undisturbed: Path) -> Ended:
        """Run a command again; note whether it ends as the undisturbed run did."""
        ended = complete(command)
        if ended.code:
            last = ended.said[-1] if ended.said else "no message"
            self.problems.append(f"continued, it ended with exit code {ended.code}: {last}")
        self.compare(run_dir, undisturbed)
        return ended

    def compare(self, run_dir: Path, undisturbed: Path) -> None:
        """Note whether a run ended as the undisturbed one did."""
        differing = differences(undisturbed, run_dir)
        self.same = not differing
        self.problems += differing


class Ended(NamedTuple):
    """How a process ended: exit code, lines on its standard error other than the progress bar."""

    code: int
    said: list[str]


def command(output_dir: Path, *, interval: int = 1, keep: int = 3, ranks: int = 1) -> list[str]:
    """The command of a run, which begins it as well as it continues it.

    Several ranks are started by `torchrun` and may be restarted once; `interval` and `keep` are of
    the checkpoints.
    """
    # A port of its own, so that a launcher of somebody else on this machine is not met.
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node={ranks} --max-restarts=1"
    words = [sys.executable, *(launcher.split() if ranks > 1 else []), *SETTINGS.split()]
    words += [f"--checkpoint-interval={interval}", f"--keep-checkpoints={keep}"]
    return [*words, f"--output-dir={output_dir}"]


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen]:
    """A process with one thread per library, which does not outlive the block.

    It heeds SIGINT, which a shell that runs this in the background has it ignore.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # not killed, or a launcher would leave its ranks behind
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=60)
            process.kill()
        process.stderr.close()


def end(process: subprocess.Popen) -> Ended:
    """Wait for a process, or raise a `FaultError` if it does not end."""
    try:
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        raise FaultError(f"no end within {PATIENCE_SECONDS} s") from None
    lines = (line.strip() for line in errors.splitlines())
    return Ended(process.returncode, [x for x in lines if x and not x.startswith("training:")])


def complete(command: list[str]) -> Ended:
    """Run a command to its end."""
    with started(command) as process:
        return end(process)


def wait_until(process: subprocess.Popen, condition: Callable[[], bool], what: str) -> None:
    """Return once something is so, or raise a `FaultError` if it ends before or takes too long."""
    give_up = time.perf_counter() + PATIENCE_SECONDS
    while not condition():
        if process.poll() is not None:
            raise FaultError(f"the run ended, exit code {process.returncode}, before {what}")
        if time.perf_counter() > give_up:
            raise FaultError(f"{PATIENCE_SECONDS} s without {what}")
        time.sleep(0.002)


def rows_written(run_dir: Path) -> int:
    """Iterations that the table of metrics tells of."""
    path = run_dir / METRICS_FILE
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


def wait_for_rows(process: subprocess.Popen, run_dir: Path, count: int) -> None:
    """Return once the table of metrics has so many rows."""
    wait_until(process, lambda: rows_written(run_dir) >= count, f"row {count}")


def saved(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("checkpoint-*.pt"))


def iteration_of(checkpoint: Path) -> int:
    """The iteration that a checkpoint, or an unfinished one, was written after."""
    return int(checkpoint.name.partition("checkpoint-")[2][:6])


def unfinished(run_dir: Path) -> list[Path]:
    """Files that were being written when a run was killed."""
    return sorted(path for path in run_dir.rglob(".*") if path.is_file())


def differences(expected: Path, found: Path) -> list[str]:
    """What tells a finished run directory from another, but for times; a line each."""
    files = {path for path in found.rglob("*") if path.is_file()} - set(saved(found))
    names = {str(path.relative_to(found)) for path in files}
    if missing := FINISHED_FILES - names:
        return [f"there is no {', '.join(sorted(missing))}"]
    old, new = figures(expected), figures(found)
    every = dict.fromkeys([*old, *new])  # in their order
    problems = [f"{name} was left behind" for name in sorted(names - FINISHED_FILES)]
    if differing := [name for name in every if old.get(name) != new.get(name)]:
        problems.append(f"{len(differing)} figures differ: {', '.join(differing[:5])}")
    return problems


def figures(run_dir: Path) -> dict[str, Any]:
    """What a finished run has to end with, but for times, by name."""
    weights = torch.load(run_dir / POLICY_FILE, weights_only=True)["policy_state_dict"]
    rows = list(csv.DictReader((run_dir / METRICS_FILE).read_text().splitlines()))
    summary = json.loads((run_dir / SUMMARY_FILE).read_text())
    found = {
        f"weight {name}": (x.dtype, x.shape, x.numpy().tobytes()) for name, x in weights.items()
    }
    # Missing, repeated or out of order.
    found["iterations in metrics.csv"] = [row["iteration"] for row in rows]
    for row in rows:
        # Text, for the trainer writes floats so that they are read back to the bit.
        cells = {name: text for name, text in row.items() if name not in TIMINGS}
        found |= {f"{name} of iteration {row['iteration']}": x for name, x in cells.items()}
    compared = summary.keys() - NOT_COMPARED
    return found | {f"{name} of the summary": summary[name] for name in sorted(compared)}
