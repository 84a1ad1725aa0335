"""Whether a run of the trainer survives kills, full disks, damaged files and signals.

    python benchmark/robustness/faults.py               # a quarter of an hour on two cores

Inflicts real faults on real runs, continues them by their own command (`--resume auto`) and
compares what they end with to a run that nothing happened to: the weights to the bit, the rows of
`metrics.csv` but for times, the figures of `summary.json`, and that nothing else is left behind.
Linux alone; mounting small disks takes root, and without it a limit on the size of files stands
in. Exits with 1 if an expectation failed.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Parser, made_by, spread, table, write
from robustness import inflict
from robustness.trials import ITERATIONS, Trial

from hydrogel_gym.runs.command_line import run_script

KINDS = {
    "kills": (inflict.kills, 35),
    "kills-in-writes": (inflict.kills_in_writes, 15),
    "rank-kills": (inflict.rank_kills, 6),
    "full-disks": (inflict.full_disks, 3),
    "damages": (inflict.damages, 20),
    "signals": (inflict.signals, 4),
}
REMARKS = {
    inflict.KILLED: f"a checkpoint every {inflict.INTERVAL} iterations; moments uniform over the "
    "run, from the interpreter's start to its exit",
    inflict.KILLED_IN_A_WRITE: "a checkpoint every iteration; killed when its temporary file is "
    "seen",
    inflict.DISK_SMALL: "every checkpoint kept on a small tmpfs, which was enlarged before going "
    "on; the last one was too small for the policy and the pictures",
    inflict.DISK_FILLED: "a tmpfs, filled while the run trains; the filler was removed before "
    "going on",
    inflict.DISK_LIMITED: "no disk could be mounted",
    inflict.CUT: "lengths at random, and 0, all but one byte, in the hash; one run continued",
    inflict.FLIPPED: "places at random, and first, last, before the hash; one run continued",
}


def rows_of(trials: Iterable[Trial]) -> list[list[str]]:
    """A row for each fault."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.fault, []).append(trial)
    rows = []
    for fault, group in groups.items():
        seen = [f"{n} {saw}" for saw, n in Counter(trial.saw for trial in group).most_common()]
        if seconds := [trial.seconds for trial in group if trial.seconds is not None]:
            seen.append(f"{spread(seconds, '.1f', ' s')} until the first row of the new ranks")
        remarks = [REMARKS[fault]] if fault in REMARKS else []
        if redrawn := sum(trial.redrawn for trial in group):
            remarks.append(f"{redrawn} moments fell after the run's end and were drawn again")
        if failed := sum(bool(trial.problems) for trial in group):
            remarks.append(f"**{failed} not as expected**")
        same = [trial.same for trial in group if trial.same is not None]
        cells = ["; ".join(seen), f"{sum(same)} of {len(same)}", "; ".join(remarks)]
        rows.append([fault, str(len(group)), *cells])
    return rows


def main(argv: list[str] | None = None) -> int:
    """Inflict the faults and write the table; returns the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of moments and places")
    for name, (function, times) in KINDS.items():
        help = function.__doc__.splitlines()[0]
        parser.add_argument(f"--{name}", type=int, default=times, help=help)
    args = parser.parse_args(argv)
    trials = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        inflict.undisturbed(work)  # what the first one takes from the disk, others find in memory
        alone, _ = inflict.undisturbed(work)
        for name, (function, _) in KINDS.items():
            if times := getattr(args, name.replace("-", "_")):
                for trial in function(work, alone, random.Random(f"{name} {args.seed}"), times):
                    trials.append(trial)
                    print(*vars(trial).values(), sep="; ", flush=True)
    columns = ["fault", "times", "what was seen", "continued to the undisturbed weights"]
    lines = [
        made_by(1),
        "",
        f"Faults inflicted on runs of {ITERATIONS} iterations, seed {args.seed}. A run was "
        "continued by its own command and has to end with the weights of a run that nothing "
        "happened to, to the bit, with its rows of `metrics.csv` but for times, with its figures, "
        "and with no other file left.",
        "",
        *table([*columns, "remarks"], rows_of(trials)),
    ]
    write(args.output_dir, "faults", lines)
    return 1 if any(trial.problems for trial in trials) else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
