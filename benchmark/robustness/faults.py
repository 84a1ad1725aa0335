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
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Parser, made_by, spread, table, write
from robustness import inflict
from robustness.trials import ITERATIONS, FaultError, Trial

from hydrogel_gym.runs.command_line import run_script

KINDS = {
    "kills": (inflict.kill, 35),
    "kills-in-writes": (inflict.kill_in_a_write, 15),
    "rank-kills": (inflict.kill_rank, 6),
    "full-disks": (inflict.fill_disk, 4),
    "damages": (inflict.damage, 40),
    "signals": (inflict.send_signal, 12),
}


def attempt(
    function: Callable[[Trial, inflict.Ground, int], None], ground: inflict.Ground, number: int
) -> Trial:
    """Inflict a fault once, and note it if that could not be done."""
    trial = Trial(function.__name__)
    try:
        function(trial, ground, number)
    except FaultError as error:
        trial.same = False
        trial.problems.append(str(error))
    shutil.rmtree(ground.run_dir, ignore_errors=True)
    return trial


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
        if failed := sum(bool(trial.problems) for trial in group):
            seen.append(f"**{failed} not as expected**")
        same = [trial.same for trial in group if trial.same is not None]
        rows.append([fault, str(len(group)), "; ".join(seen), f"{sum(same)} of {len(same)}"])
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
        ground = inflict.Ground(Path(folder), random.Random(args.seed))
        for name, (function, _) in KINDS.items():
            for number in range(getattr(args, name.replace("-", "_"))):
                trials.append(attempt(function, ground, number))
                print(*vars(trials[-1]).values(), sep="; ", flush=True)
    columns = ["fault", "times", "what was seen", "continued to the undisturbed weights"]
    lines = [
        f"Faults inflicted on runs of {ITERATIONS} iterations, seed {args.seed}. A run was "
        "continued by its own command and has to end with the weights of a run that nothing "
        "happened to, to the bit, with its rows of `metrics.csv` but for times, with its figures, "
        "and with no other file left.",
        "",
        *table(columns, rows_of(trials)),
    ]
    write(args.output_dir, "faults", lines, made=made_by(1))
    return 1 if any(trial.problems for trial in trials) else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
