"""What it costs to log a run: offline W&B and TensorBoard on against off.

    python benchmark/tracking.py                      # an hour on two cores
    python benchmark/tracking.py --presets quick --rounds 3

Rounds of whole processes of the trainer, one at a time: without a log, with `--track` offline, with
`--tensorboard`, in an order that turns from round to round. What counts is the ratio within a
round, since the machine may be busier in another. As it may be busier within a round too, the
processor time of the thread that logs and of what it starts is counted in addition: what it takes
from training on a machine whose cores are all busy. The oracle is searched once, before the rounds.
Writes `results/tracking.md`; needs `pip install -e ".[track,train]"`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from tqdm import tqdm
from trainers.launch import machine

from hydrogel_gym.files import write_atomically
from hydrogel_gym.runs.directory import METRICS_FILE
from hydrogel_gym.runs.tracking import Logs
from hydrogel_gym.train import ppo_hybrid as trainer

HERE = Path(__file__).parent
RESULTS = HERE / "results"
MAX_PERCENT = 2.0
WAYS = {"off": [], "offline W&B": ["--track"], "TensorBoard": ["--tensorboard"]}


class Cost(NamedTuple):
    """Of one process, in seconds."""

    whole: float  # from its start to its end
    training: float  # of the loop alone
    processor: float  # of all threads, and of what it started
    logging: float  # the part of it that the thread which logs used, and what it started


def account(flags: list[str], path: Path) -> None:
    """Train in this process, and write down the processor time of logging."""
    work = Logs._work
    seconds = 0.0

    def timed_work(self: object) -> None:
        nonlocal seconds
        work(self)
        seconds = time.thread_time()

    Logs._work = timed_work
    code = trainer.main(flags)
    if code:
        raise SystemExit(code)
    children = os.times()
    seconds += children.children_user + children.children_system
    path.write_text(json.dumps(seconds))


def run(preset: str, flags: list[str], folder: Path, name: str) -> Cost:
    """Train once, in a process of its own."""
    output_dir, path = folder / name, folder / f"{name}.json"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    flags = ["--preset", preset, "--output-dir", str(output_dir), *flags]
    before, start = os.times(), time.perf_counter()
    subprocess.run(
        [sys.executable, __file__, "--account", str(path), "--", *flags],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment | {"WANDB_MODE": "offline"},
    )
    whole, after = time.perf_counter() - start, os.times()
    processor = sum(after[2:4]) - sum(before[2:4])
    training = pd.read_csv(output_dir / METRICS_FILE)["wall_seconds"].iloc[-1]
    return Cost(whole, training, processor, json.loads(path.read_text()))


def percent_more(rounds: list[dict[str, Cost]], way: str, part: str) -> list[float]:
    """By how much a way of logging lengthens a part of the run, in each round."""
    return [
        100.0 * (getattr(each[way], part) / getattr(each["off"], part) - 1.0) for each in rounds
    ]


def cell(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):+.1f} % [{min(values):+.1f}, {max(values):+.1f}]"


def table(results: dict[str, list[dict[str, Cost]]]) -> list[str]:
    """A row for each preset and way."""
    lines = [
        "| preset | log | whole process | training | processor time | of it for the log | bar |",
        "|---" * 7 + "|",
    ]
    measured = Cost._fields[:3]
    for preset, rounds in results.items():
        off = [each["off"] for each in rounds]
        medians = [statistics.median(getattr(cost, part) for cost in off) for part in measured]
        lines.append(f"| {preset} | off | {' | '.join(f'{s:.1f} s' for s in medians)} | – | – |")
        for way in list(WAYS)[1:]:
            cells = [cell(percent_more(rounds, way, part)) for part in measured]
            share = [100.0 * each[way].logging / each[way].processor for each in rounds]
            seconds = statistics.median(each[way].logging for each in rounds)
            cells.append(f"{seconds:.1f} s, {statistics.median(share):.1f} %")
            met = statistics.median(percent_more(rounds, way, "whole")) <= MAX_PERCENT
            verdict = f"{MAX_PERCENT:g} %, {'met' if met else 'missed'}"
            lines.append(f"| {preset} | {way} | {' | '.join(cells)} | {verdict} |")
    return lines


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["quick", "full"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--account", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.account:
        return account(args.flags, args.account)
    results: dict[str, list[dict[str, Cost]]] = {preset: [] for preset in args.presets}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run("quick", ["--num-iterations", "1", "--track"], folder, "warm-up")  # oracle and imports
        jobs = [(k, preset) for k in range(args.rounds) for preset in args.presets]
        for k, preset in tqdm(jobs, unit="round"):
            order = list(WAYS)[k % 3 :] + list(WAYS)[: k % 3]
            costs = {way: run(preset, WAYS[way], folder, f"{preset}-{k}-{way}") for way in order}
            results[preset].append(costs)
            tqdm.write(f"{preset}: {costs}")
    lines = [
        f"Whole runs of the trainer with a log against without, {args.rounds} rounds of each "
        "preset: median of the ratio within a round, and range; made by `benchmark/tracking.py`.",
        "",
        machine(2),
        "",
        *table(results),
    ]
    write_atomically(RESULTS / "tracking.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
