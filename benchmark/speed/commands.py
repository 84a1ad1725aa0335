"""What whole commands take: importing the package, logging a run, building its report.

    python benchmark/speed/commands.py                    # an hour on two cores
    python benchmark/speed/commands.py --presets quick --rounds 3

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
import common
from common import ORACLE_CACHE, Ended, run, spread, table, verdict

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


def logging(presets: list[str], rounds: int, flags: list[str], folder: Path) -> list[str]:
    """Whole runs of the trainer with a log against without."""
    ORACLE_CACHE.mkdir(parents=True, exist_ok=True)
    (folder / "oracle").symlink_to(ORACLE_CACHE)  # searched once
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]

    rows = []
    for preset in presets:

        def measure(name: str, k: int, preset: str = preset) -> Ended:
            command = ["{python}", "train/ppo_hybrid.py", "--preset", preset, *LOGS[name], *flags]
            output_dir = folder / f"{preset}-{name}-{k}"
            return run([*command, "--output-dir", output_dir], WANDB_MODE="offline")

        measure("offline W&B", -1)  # oracle and imports
        every = common.in_turn(LOGS, rounds, measure)
        off = [[each[part] for each in every["off"]] for part in range(2)]
        rows.append([preset, "off", *(f"{statistics.median(x):.1f} s" for x in off), "–"])
        for name in list(LOGS)[1:]:
            values = [[each[part] for each in every[name]] for part in range(2)]
            pairs = [zip(*pair, strict=True) for pair in zip(values, off, strict=True)]
            more = [[100 * (a / b - 1) for a, b in pair] for pair in pairs]
            is_met = verdict(statistics.median(more[0]) <= MAX_LOG_PERCENT)
            cells = [spread(each, "+.1f", " %") for each in more]
            rows.append([preset, name, *cells, f"{MAX_LOG_PERCENT:g} %, {is_met}"])
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
    parser = common.Parser(__doc__)
    flag = parser.add_argument
    flag("--presets", nargs="+", default=["quick", "full"], help="of the runs")
    flag("--rounds", type=common.count, default=7, help="a process of each kind in every one")
    flag("flags", nargs="*", help="more flags of the trainer, after `--`")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tables = {
            "imports": imports(args.rounds),
            "tracking": logging(args.presets, args.rounds, args.flags, folder),
            "report": report(folder / f"{args.presets[0]}-off-0", args.rounds),
        }
    for name, lines in tables.items():
        common.write(args.output_dir, name, lines, made=common.made_by())


if __name__ == "__main__":
    sys.exit(run_script(main))
