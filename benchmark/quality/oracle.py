"""What the oracle costs and how sure it is: both shipped cohorts, several pairs of seeds.

python benchmark/quality/oracle.py               # two minutes on two cores
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Parser, count, first_patients, made_by, table, write

from hydrogel_gym import RewardConfig, load_cohort
from hydrogel_gym.memory import keep_freed_memory
from hydrogel_gym.oracle.best import search_designs
from hydrogel_gym.oracle.search import CALLS_PER_SEARCH
from hydrogel_gym.problem.reward import safety_margins
from hydrogel_gym.runs.command_line import run_script

LIMIT_DISTANCE = 0.002  # of an index from 0 to 1: what counts as lying at a safety limit


def main(argv: list[str] | None = None) -> None:
    """Search both cohorts under each seed and write the table."""
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the searches")
    parser.add_argument("--num-patients", type=count, default=2000, help="at most, of each cohort")
    args = parser.parse_args(argv)
    keep_freed_memory()  # as all commands that search
    rows = []
    for name in ("train", "holdout"):
        cohort, every, seconds = first_patients(load_cohort(name), args.num_patients), [], []
        for seed in args.seeds:
            start = time.perf_counter()
            every.append(search_designs(cohort, seed=seed, progress=True))
            seconds.append(time.perf_counter() - start)
        rewards = [best.score.mean().item() for best in every]
        agreeing = min((best.seed_gap <= 0.02).float().mean().item() for best in every)
        margins = (safety_margins(best.outcomes, RewardConfig()) for best in every)
        room = torch.stack([torch.stack([*each.values()]).amin(0) for each in margins])
        at_limit = ((room >= 0) & (room < LIMIT_DISTANCE)).float().mean()
        gap = max(best.seed_gap.max().item() for best in every)
        cells = [f"{min(rewards):.3f} to {max(rewards):.3f}", f"{100 * agreeing:.2f} % or more"]
        cells += [
            f"{gap:.3f}",
            f"{100 * at_limit:.0f} %",
            f"{100 * (room < 0).float().mean():.0f} %",
        ]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        cells += [f"{statistics.median(seconds):.0f}", f"{peak:,.0f} MiB"]
        rows.append([name, f"{len(cohort):,}", *cells])
    columns = ["cohort", "patients", "mean best reward", "the two searches agree within 0.02"]
    columns += ["largest gap", "best designs at a safety limit", "that break one"]
    columns += ["seconds (median)", "peak memory of the process"]
    lines = [
        f"The oracle: two searches per patient, {2 * CALLS_PER_SEARCH:,} calls of the reward "
        f"model; seeds {args.seeds}.",
        "",
        *table(columns, rows),
    ]
    write(args.output_dir, "oracle", lines, made=made_by())


if __name__ == "__main__":
    sys.exit(run_script(main))
