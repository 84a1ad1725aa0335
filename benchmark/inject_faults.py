"""Whether a run of the trainer survives kills, full disks, damaged files and signals.

    python benchmark/inject_faults.py

Inflicts real faults on real runs, continues them by their own command (`--resume auto`) and
compares what they end with to a run that nothing happened to: the weights to the bit, the rows of
`metrics.csv` but for times, the figures of `summary.json`, and that nothing else is left behind.
Linux alone; mounting small disks takes root, and without it a limit on the size of files stands
in. Writes `results/faults.csv`, a row per fault inflicted, and `.md`; exits with 1 if an
expectation failed. A quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from environment import hardware
from faults import damage, disk, kill, ranks, runs, signals
from faults.runs import FaultError, Trial

from hydrogel_gym.files import write_atomically

RESULTS = Path(__file__).parent / "results"
FAULTS = ("kill", "ranks", "disk", "damage", "signals")
REMARKS = {
    kill.AT_RANDOM: f"a checkpoint every {kill.INTERVAL} iterations; moments uniform over the run, "
    "from the interpreter's start to its exit",
    kill.IN_A_WRITE: "a checkpoint every iteration; killed when its temporary file is seen",
    **{
        ranks.FAULT.format(rank): "seconds: from the kill to the first row of the restarted ranks"
        for rank in (0, 1)
    },
    disk.SMALL: "every checkpoint kept on a small tmpfs, which was enlarged before going on",
    disk.LAST_FILES: "as above, after the last iteration",
    disk.FILLED: "a tmpfs, filled while the run trains; the filler was removed before going on",
    disk.LIMITED: "no disk could be mounted",
    damage.CUT: "lengths at random, and 0, all but one byte, in the hash; one run continued",
    damage.FLIPPED: "places at random, and first, last, before the hash; one run continued",
    "SIGUSR1": "in training",
    "SIGTERM": "in training",
    "SIGINT": "in training",
}


def undisturbed(work: Path, **options: int) -> tuple[Path, float]:
    """A run that nothing happens to: its directory, and its seconds from start to exit.

    Raises:
        FaultError: it fails.
    """
    run_dir = work / f"undisturbed-{len(list(work.iterdir()))}"
    began = time.perf_counter()
    ended = runs.complete(runs.command(run_dir, **options))
    if ended.code:
        raise FaultError(f"undisturbed, the run ended with {ended.code}: {' / '.join(ended.said)}")
    return run_dir, time.perf_counter() - began


def inflict(args: argparse.Namespace, work: Path) -> Iterator[Trial]:
    """Every fault that was requested."""
    undisturbed(work)  # what the first one takes from the disk, the others find in memory
    alone, seconds = undisturbed(work, keep=runs.ITERATIONS)
    if "kill" in args.faults:
        counts = (args.kills, args.kills_in_writes)
        yield from kill.inflict(work, alone, seconds, args.seed, *counts)
    if "ranks" in args.faults:
        pair, _ = undisturbed(work, ranks=2)
        yield from ranks.inflict(work, pair, args.seed, args.rank_kills)
    if "disk" in args.faults:
        yield from disk.inflict(work, alone, args.seed, args.full_disks)
    if "damage" in args.faults:
        yield from damage.inflict(work, alone, args.seed, args.damages)
    if "signals" in args.faults:
        yield from signals.inflict(work, alone, args.seed, args.signals)


def summarise(table: pd.DataFrame, seed: int) -> str:
    """The report in Markdown."""
    lines = [
        f"Faults inflicted on runs of {runs.ITERATIONS} iterations, seed {seed}; {hardware()}; "
        "made by `benchmark/inject_faults.py`. A run was continued by its own command and has to "
        "end with the weights of a run that nothing happened to, to the bit, with its rows of "
        "`metrics.csv` but for times, with its figures, and with no other file left.",
        "",
        "| fault | times | what was seen | continued to the undisturbed weights | remarks |",
        "|---|---|---|---|---|",
    ]
    for fault, group in table.groupby("fault", sort=False):
        seen = Counter(group["saw"]).most_common()
        remarks = [REMARKS[fault]]
        if redrawn := group["redrawn"].sum():
            remarks.append(f"{redrawn} moments fell after the run's end and were drawn again")
        if failed := group["problems"].astype(bool).sum():
            remarks.append(f"**{failed} not as expected**")
        if (seconds := group["seconds"].dropna()).size:
            seen.append((f"{seconds.median():.1f} s [{seconds.min():.1f}, {seconds.max():.1f}]", 0))
        cells = [
            fault,
            str(len(group)),
            "; ".join(f"{count} {saw}" if count else saw for saw, count in seen),
            f"{group['same'].eq(True).sum()} of {group['same'].notna().sum()}",
            "; ".join(remarks),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Inflict the faults and write table and report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of moments and places")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--kills", type=int, default=35, help="at random moments")
    parser.add_argument("--kills-in-writes", type=int, default=15, help="of a checkpoint")
    parser.add_argument("--rank-kills", type=int, default=6)
    parser.add_argument("--full-disks", type=int, default=3, help="too small, and filled; each")
    parser.add_argument("--damages", type=int, default=20, help="places, for each of two kinds")
    parser.add_argument("--signals", type=int, default=4, help="of each of three")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not args.output_dir.is_dir():
        parser.error(f"--output-dir {args.output_dir}: no such folder")
    trials = []
    with tempfile.TemporaryDirectory() as work:
        for trial in inflict(args, Path(work)):
            trials.append(trial)
            print(*vars(trial).values(), sep="; ", flush=True)
    table = pd.DataFrame(vars(trial) | {"problems": "; ".join(trial.problems)} for trial in trials)
    text = summarise(table, args.seed)
    csv = table.to_csv(index=False, float_format="%.3f")
    write_atomically(args.output_dir / "faults.csv", csv.encode())
    write_atomically(args.output_dir / "faults.md", text.encode())
    print(text)
    return 1 if any(trial.problems for trial in trials) else 0


if __name__ == "__main__":
    sys.exit(main())
