"""How fast candidates are drawn, evaluated, ranked and written, and in how much memory.

    python benchmark/speed/candidates.py                       # ten minutes on two cores
    python benchmark/speed/candidates.py --policy runs/full-s1

Each figure is of a process of its own, one at a time, with the compiled graph in the cache: seconds
from the first candidate of a patient to its last file, and the peak memory of the whole process.
Beside it the compiled arithmetic alone, in as many threads, which no bookkeeping can beat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import POLICY, Parser, count, made_by, run, spread, table, verdict, write

from hydrogel_gym.designs.sampling import BLOCK
from hydrogel_gym.problem.fields import FORMULATION_FIELDS
from hydrogel_gym.runs.command_line import run_script
from hydrogel_gym.runs.designing import begin
from hydrogel_gym.train import generate_candidates as generator
from hydrogel_gym.train.ppo_hybrid import Agent

PATIENT = "P0007"
MIN_TOP_ONLY, MIN_WRITTEN, MAX_MB = 8e6, 3e6, 700


class Measured(NamedTuple):
    """Of one process."""

    seconds: float  # drawing, evaluating, ranking and writing
    megabytes: float  # peak memory of the process
    bytes_written: int


def measure(flags: list[str], path: Path) -> None:
    """Generate in this process, and write down what it took."""
    generate, seconds, written = generator.generate, 0.0, 0

    def timed(stream: Any, store: Any, *rest: Any, **settings: Any) -> None:
        nonlocal seconds, written
        start = time.perf_counter()
        generate(stream, store, *rest, **settings)
        seconds += time.perf_counter() - start
        written = store.bytes_written

    generator.generate = timed
    if code := generator.main(flags):
        raise SystemExit(code)
    path.write_text(json.dumps([seconds, written]))


def process(flags: list[str], folder: Path) -> Measured:
    """Generate in a process of its own."""
    path = folder / "measured.json"
    with tempfile.TemporaryDirectory(dir=folder) as output:
        command = ["{python}", __file__, "--measure", path, "--", *flags]
        ended = run([*command, "--compile", "on", "--output-dir", f"{output}/designs"])
    seconds, written = json.loads(path.read_text())
    return Measured(seconds, ended.megabytes, written)


def arithmetic(policy: Path, threads: int, rounds: int) -> list[float]:
    """Million designs per second of the compiled graph alone, on numbers drawn once."""
    args = generator.Args(policy=policy, patient=(PATIENT,), compile="on")
    start = begin(args, Agent, torch.device("cpu"))
    (row,), problem = start.rows, start.problem
    torch.set_num_threads(1)
    patient = problem.params.patients[row]
    sampler = generator.policy_sampler(start.agent, start.obs[row], patient, args)
    call = generator.evaluator(problem, sampler, args, 2**24)
    numbers = torch.rand(BLOCK), torch.randn(BLOCK, len(FORMULATION_FIELDS))
    blocks = 40

    def work(_: int) -> None:
        with torch.no_grad():
            for _ in range(blocks):
                call(sampler, *numbers)

    rates = []
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in range(rounds):
            began = time.perf_counter()
            list(pool.map(work, range(threads)))
            rates.append(threads * blocks * BLOCK / (time.perf_counter() - began) / 1e6)
    torch.set_num_threads(threads)
    return rates


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the table."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--policy", type=Path, default=POLICY, help="run directory")
    flag("--num-candidates", type=count, default=13_000_000, help="of one patient")
    flag("--rounds", type=count, default=5, help="processes")
    flag("--measure", type=Path, help=argparse.SUPPRESS)
    flag("flags", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        return measure(args.flags, args.measure)

    threads, whole = torch.get_num_threads(), args.num_candidates
    policy = ["--policy", str(args.policy)]
    one = [*policy, "--patient", PATIENT, "--num-candidates"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process([*one, "1", "--top-only"], folder)  # compile
        limit = arithmetic(args.policy, threads, args.rounds)
        ceiling = statistics.median(limit)
        rows = [["compiled arithmetic alone", f"{spread(limit, '.1f')} M/s", "", "", "–"]]
        for label, flags, least in (
            ("top 100 only", ["--top-only"], MIN_TOP_ONLY),
            ("and all to Parquet", [], MIN_WRITTEN),
        ):
            for number, rounds in ((whole, args.rounds), (10 * whole, 1)):
                runs = [process([*one, str(number), *flags], folder) for _ in range(rounds)]
                rates = [number / each.seconds / 1e6 for each in runs]
                rate, peak = statistics.median(rates), max(each.megabytes for each in runs)
                rows.append(
                    [
                        f"{number / 1e6:g} M, {label}",
                        f"{spread(rates, '.1f')} M/s, {100 * rate / ceiling:.0f} % of the "
                        "arithmetic",
                        "" if flags else f"{runs[0].bytes_written / number:.1f}",
                        f"{peak:,.0f} MB",
                        f"{least / 1e6:g} M/s {verdict(1e6 * rate >= least)}; {MAX_MB} MB "
                        f"{verdict(peak <= MAX_MB)}",
                    ]
                )
        tenth = process([*policy, "--num-candidates", str(whole // 10), "--top-only"], folder)
    rows.append(
        [
            f"all 2,000 patients, {whole / 1e7:g} M each, top 100 only",
            f"{2000 * (whole // 10) / tenth.seconds / 1e6:.1f} M/s",
            "",
            f"{tenth.megabytes:,.0f} MB",
            f"{tenth.seconds / 60:.1f} min",
        ]
    )
    lines = [
        made_by(threads),
        "",
        f"Candidates of one patient: median and range of {args.rounds} processes, one at a time.",
        "",
        *table(["", "designs per second", "bytes a design", "peak memory", "bar"], rows),
    ]
    write(args.output_dir, "candidates", lines)


if __name__ == "__main__":
    sys.exit(run_script(main))
