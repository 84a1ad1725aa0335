"""What whole commands take: importing the package, logging a run, building its report.

    python benchmark/speed/commands.py                    # a quarter of an hour on two cores
    python benchmark/speed/commands.py --preset full --rounds 3

Whole processes in turn, one at a time; what counts is the ratio within a round. Processor time is
of all threads, and of what a process starts: what it takes from others on a machine whose cores are
all busy. Needs `pip install -e ".[track,train]"`.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import (
    ORACLE_CACHE,
    Ended,
    Parser,
    count,
    in_turn,
    made_by,
    ratio,
    run,
    spread,
    table,
    verdict,
    write,
)

from hydrogel_gym.runs.command_line import run_script

LOGS = {"off": [], "offline W&B": ["--track"], "TensorBoard": ["--tensorboard"]}
MAX_IMPORT_SECONDS, MAX_LOG_PERCENT, MAX_REPORT_SECONDS, MAX_REPORT_MB = 0.4, 2.0, 20.0, 8.0
IMPORTS = """
import importlib, json, time
seconds = {}
for name in ("torch", "gymnasium", "hydrogel_gym"):
    start = time.perf_counter()
    importlib.import_module(name)
    seconds[name] = time.perf_counter() - start
print(json.dumps(seconds))
"""


def imports(rounds: int) -> list[str]:
    """Seconds of each import in a fresh process, after those before it."""
    command = ["{python}", "-c", IMPORTS]
    run(command)  # files come off the disk once
    every = [json.loads(run(command).output) for _ in range(rounds)]
    rows = [[name, spread(each[name] for each in every), "–"] for name in every[0]]
    median = statistics.median(each["hydrogel_gym"] for each in every)
    rows[-1][-1] = f"{MAX_IMPORT_SECONDS:g} s, {verdict(median <= MAX_IMPORT_SECONDS)}"
    return [
        f"Seconds of each import in a fresh process, after those above it; {rounds} rounds:",
        "",
        *table(["import", "seconds", "bar"], rows),
    ]


def percent_more(runs: list[Ended], off: list[Ended], part: str) -> tuple[float, str]:
    """By how many percent runs take more than others, and a cell that says so with the range."""
    values = [[getattr(each, part) for each in some] for some in (runs, off)]
    more = [100 * (a / b - 1) for a, b in zip(*values, strict=True)]
    return 100 * (ratio(*values) - 1), spread(more, "+.1f", " %")


def logging(preset: str, rounds: int, flags: list[str], folder: Path) -> list[str]:
    """Whole runs of the trainer with a log against without."""
    (folder / "oracle").symlink_to(ORACLE_CACHE)  # searched once
    ORACLE_CACHE.mkdir(parents=True, exist_ok=True)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]

    def measure(name: str, k: int) -> Ended:
        command = ["{python}", "train/ppo_hybrid.py", "--preset", preset, *LOGS[name], *flags]
        return run([*command, "--output-dir", folder / f"{name}-{k}"], WANDB_MODE="offline")

    measure("offline W&B", -1)  # oracle and imports
    measured = in_turn(LOGS, rounds, measure)
    rows = []
    for name, runs in measured.items():
        seconds, cells = 0.0, []
        for part in ("seconds", "processor_seconds"):
            more, cell = percent_more(runs, measured["off"], part)
            seconds = max(seconds, more) if part == "seconds" else seconds
            off = f"{statistics.median(getattr(each, part) for each in runs):.1f} s"
            cells.append(off if name == "off" else cell)
        bar = f"{MAX_LOG_PERCENT:g} %, {verdict(seconds <= MAX_LOG_PERCENT)}"
        rows.append([preset, name, *cells, "–" if name == "off" else bar])
    return [
        f"Whole runs of the trainer with a log against without; {rounds} rounds, median of the "
        "ratio within a round, and range:",
        "",
        *table(["preset", "log", "whole process", "processor time", "bar"], rows),
    ]


def report(run_dir: Path, rounds: int) -> list[str]:
    """Time and size of the report of a run."""
    page = run_dir / "report.html"
    command = ["{python}", "train/report.py", run_dir, "--output", page]
    seconds = [run(command).seconds for _ in range(rounds)]
    size, median = page.stat().st_size / 1e6, statistics.median(seconds)
    is_fast, is_small = verdict(median < MAX_REPORT_SECONDS), verdict(size < MAX_REPORT_MB)
    rows = [
        ["building it", spread(seconds, unit=" s"), f"{MAX_REPORT_SECONDS:g} s, {is_fast}"],
        ["its size", f"{size:.2f} MB", f"{MAX_REPORT_MB:g} MB, {is_small}"],
    ]
    return [
        f"The report of such a run on the 2,000 shipped patients; {rounds} rounds:",
        "",
        *table(["", "", "bar"], rows),
    ]


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the tables."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--preset", default="quick", help="of the runs")
    flag("--rounds", type=count, default=7, help="a process of each kind in every one")
    flag("flags", nargs="*", help="more flags of the trainer, after `--`")
    args = parser.parse_args(argv)
    lines = [made_by(), "", *imports(args.rounds)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines += ["", *logging(args.preset, args.rounds, args.flags, folder)]
        lines += ["", *report(folder / "off-0", args.rounds)]
    write(args.output_dir, "commands", lines)


if __name__ == "__main__":
    sys.exit(run_script(main))
