"""What the scripts share: command line, processes, rounds in turn, medians, tables, results.

A script is run from a clone, as in `python benchmark/speed/environment.py`. It puts this folder on
its path, where it finds this module and the folders beside it (`quality`, `speed`, `robustness`).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from hydrogel_gym import Cohort
from hydrogel_gym.files import write_atomically
from hydrogel_gym.problem.fields import Design

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmark" / "results"
ORACLE_CACHE = ROOT / "runs" / "oracle"  # where the README's runs keep it too
POLICY = ROOT / "runs" / "quick-s1"  # what `python train/ppo_hybrid.py --preset quick` leaves
Measured = TypeVar("Measured")


class Parser(argparse.ArgumentParser):
    """A command line whose help begins with what is measured, and `--output-dir`."""

    def __init__(self, doc: str) -> None:
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        self.measured = doc.splitlines()[0]
        self.add_argument("--output-dir", type=Path, default=RESULTS, help="of table and picture")

    def format_help(self) -> str:
        """What is measured, then usage and flags."""
        return f"{self.measured}\n\n{super().format_help()}"


def count(text: str) -> int:
    """A number from 1 on, of a flag."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value}; allowed: 1 or more")
    return value


class Ended(NamedTuple):
    """What a process took until it ended well."""

    seconds: float
    processor_seconds: float  # of all its threads, and of what it started and waited for
    megabytes: float  # its peak memory
    output: str  # what it printed


def run(command: Sequence[object], *, threads: int | None = None, **variables: str) -> Ended:
    """Run a command (`{python}` is this interpreter) to its end, from the root of the checkout.

    Threads are those of its numerical libraries; variables are added to its environment. Raises a
    `ChildProcessError` with the last line that it wrote if it failed.
    """
    words = [sys.executable if word == "{python}" else str(word) for word in command]
    if threads is not None:
        variables["OMP_NUM_THREADS"] = str(threads)
    peak = 0
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        child = subprocess.Popen(
            words, cwd=ROOT, env=os.environ | variables, stdout=output, stderr=errors
        )
        try:
            # `ru_maxrss` would remember the parent that the process was forked from.
            while not (ended := os.wait4(child.pid, os.WNOHANG))[0]:
                with contextlib.suppress(OSError, IndexError):  # it is just ending
                    status = Path(f"/proc/{child.pid}/status").read_text()
                    peak = int(status.split("VmHWM:")[1].split()[0])
                time.sleep(0.01)
        except BaseException:
            child.terminate()
            child.wait()
            raise
        seconds, (_, code, usage) = time.perf_counter() - start, ended
        child.returncode = os.waitstatus_to_exitcode(code)
        for file in (output, errors):
            file.seek(0)
        said, complaint = output.read(), errors.read()
    if child.returncode:
        last = (complaint.strip() or said.strip()).splitlines()[-1:]
        raise ChildProcessError(f"{shlex.join(words)}: code {child.returncode}: {''.join(last)}")
    return Ended(seconds, usage.ru_utime + usage.ru_stime, peak * 1024 / 1e6, said)


def in_turn(
    names: Iterable[str], rounds: int, measure: Callable[[str, int], Measured]
) -> dict[str, list[Measured]]:
    """What was measured of each name, a figure per round; rounds are counted from 0.

    In every round each name has its turn, another one first each time, so that whatever else the
    machine does meets them all.
    """
    names = list(names)
    measured: dict[str, list[Measured]] = {name: [] for name in names}
    with tqdm(total=rounds * len(names), disable=None) as bar:
        for k in range(rounds):
            shift = k % len(names)
            for name in names[shift:] + names[:shift]:
                bar.set_description(name)
                measured[name].append(measure(name, k))
                bar.update()
    return measured


def ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round, where both met the same machine."""
    return statistics.median(a / b for a, b in zip(values, base, strict=True))


def spread(values: Iterable[float], form: str = ".2f", unit: str = "") -> str:
    """Median and range."""
    values = sorted(values)
    low, high = (f"{value:{form}}" for value in (values[0], values[-1]))
    return f"{statistics.median(values):{form}}{unit} [{low}, {high}]"


def verdict(is_met: bool) -> str:
    """Whether a bar is met."""
    return "met" if is_met else "**not met**"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table in Markdown."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (header, *rows)]
    return [lines[0], "|---" * len(header) + "|", *lines[1:]]


def made_by(threads: int | None = None, *packages: str) -> str:
    """The line that says with which command, commit, hardware and versions a table was made."""
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else Path(script.name)
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    threads = torch.get_num_threads() if threads is None else threads
    versions = [f"{name} {version(name)}" for name in ("torch", "gymnasium", *packages)]
    return (
        f"Made by `{shlex.join(['python', str(script), *sys.argv[1:]])}` at commit {commit}; "
        f"{cpu}{gpu}, {os.cpu_count()} cores, {threads} thread{'s' * (threads != 1)}; "
        f"Python {platform.python_version()}, {', '.join(versions)}."
    )


def write(
    folder: Path, name: str, lines: Sequence[str], picture: Any = None, made: str = ""
) -> None:
    """Write and print a table, what it was `made_by` first, and a figure or PNG beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join([made, "", *lines] if made else lines) + "\n"
    write_atomically(folder / f"{name}.md", text.encode())
    if picture is not None:
        if not isinstance(picture, bytes):
            buffer = io.BytesIO()
            picture.savefig(buffer, format="png", dpi=130)
            picture = buffer.getvalue()
        write_atomically(folder / f"{name}.png", picture)
    print(text)


def first_patients(cohort: Cohort, size: int, features: Tensor | None = None) -> Cohort:
    """The first patients of a cohort, with other features if any are given."""
    features = cohort.features if features is None else features
    return Cohort(cohort.patient_ids[:size], features[:size], cohort.extra.iloc[:size], cohort.name)


@torch.no_grad()
def designs_of(agent: Any, features: Tensor) -> Design:
    """Deterministic designs of a policy for patients (P, 11) in a first step."""
    patients = features.to(torch.float32)
    obs = torch.cat([patients, patients.new_zeros(len(patients), 2)], dim=-1)
    return Design(**agent.design(obs)[0])


def figure(width: float, height: float) -> Any:
    """An empty figure of Matplotlib that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
