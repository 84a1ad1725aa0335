"""How fast candidates are drawn, evaluated, ranked and written, and in how much memory.

    python benchmark/speed/candidates.py                       # ten minutes on two cores
    python benchmark/speed/candidates.py --policy runs/full-s1

Each figure is of a process of its own, one at a time, with the compiled graph in the cache: seconds
from the first candidate of a patient to its last file, and the peak memory of the whole process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import POLICY, Parser, count, made_by, run, spread, table, verdict, write

from hydrogel_gym.runs.command_line import run_script
from hydrogel_gym.train import generate_candidates as generator

PATIENT = "P0007"
MIN_TOP_ONLY, MIN_WRITTEN, MAX_MB = 9e6, 3e6, 700


class Measured(NamedTuple):
    """Of one process: seconds of drawing, evaluating, ranking and writing, and its peak memory."""

    seconds: float
    megabytes: float
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


def process(flags: list[str], folder: Path, compile: str = "on") -> Measured:
    """Generate in a process of its own."""
    path = folder / "measured.json"
    with tempfile.TemporaryDirectory(dir=folder) as output:
        command = ["{python}", __file__, "--measure", path, "--", *flags]
        ended = run([*command, "--compile", compile, "--output-dir", f"{output}/designs"])
    seconds, written = json.loads(path.read_text())
    return Measured(seconds, ended.megabytes, written)


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

    whole = args.num_candidates
    policy = ["--policy", str(args.policy.resolve())]
    one = [*policy, "--patient", PATIENT, "--num-candidates"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process([*one, "1", "--top-only"], folder)  # compile
        rows = []
        for label, flags, least in (
            ("top 100 only", ["--top-only"], MIN_TOP_ONLY),
            ("and all to Parquet", [], MIN_WRITTEN),
        ):
            for number, rounds in ((whole, args.rounds), (10 * whole, 1)):
                runs = [process([*one, str(number), *flags], folder) for _ in range(rounds)]
                rates = [number / each.seconds / 1e6 for each in runs]
                rate, peak = statistics.median(rates), max(each.megabytes for each in runs)
                is_fast, is_small = verdict(1e6 * rate >= least), verdict(peak <= MAX_MB)
                cells = [f"{number / 1e6:g} M, {label}", f"{spread(rates, '.1f')} M/s"]
                cells += ["" if flags else f"{runs[0].bytes_written / number:.1f}"]
                cells += [f"{peak:,.0f} MB"]
                rows.append([*cells, f"{least / 1e6:g} M/s {is_fast}; {MAX_MB} MB {is_small}"])
        tenth = process([*policy, "--num-candidates", str(whole // 10), "--top-only"], folder)
    rate = f"{2000 * (whole // 10) / tenth.seconds / 1e6:.1f} M/s"
    cells = [rate, "", f"{tenth.megabytes:,.0f} MB", f"{tenth.seconds / 60:.1f} min"]
    rows.append([f"all 2,000 patients, {whole / 1e7:g} M each, top 100 only", *cells])
    lines = [
        f"Candidates of one patient: median and range of {args.rounds} processes, one at a time.",
        "",
        *table(["", "designs per second", "bytes a design", "peak memory", "bar"], rows),
    ]
    write(args.output_dir, "candidates", lines, made=made_by())


if __name__ == "__main__":
    sys.exit(run_script(main))
