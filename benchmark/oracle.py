"""What the oracle costs and how sure it is: both shipped cohorts, several pairs of seeds.

    python benchmark/oracle.py

Writes `results/oracle.csv` and `.md`. About two minutes on two cores.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import pandas as pd
import torch

from hydrogel_gym import RewardConfig, load_cohort
from hydrogel_gym.files import write_atomically
from hydrogel_gym.oracle import BestDesigns, best_designs
from hydrogel_gym.oracle.search import CALLS_PER_SEARCH

RESULTS = Path(__file__).parent / "results"
LIMIT_DISTANCE = 0.002  # of an index from 0 to 1: what counts as lying at a safety limit


def room_to_limits(best: BestDesigns) -> torch.Tensor:
    """(3, P) distance to each safety limit, negative where it is broken."""
    config, outcomes = RewardConfig(), best.outcomes
    return torch.stack(
        [
            config.toxicity_limit - outcomes.toxicity_risk,
            outcomes.structural_integrity - config.integrity_limit,
            config.fibrosis_limit - outcomes.fibrosis_risk,
        ]
    )


def share_of_any(mask: torch.Tensor) -> float:
    """Share of the patients for whom a (3, P) mask is true at least once."""
    return mask.any(0).float().mean().item()


def main() -> None:
    """Search both cohorts under each seed and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    rows = []
    for name in ("train", "holdout"):
        cohort = load_cohort(name)
        for seed in args.seeds:
            start = time.perf_counter()
            best = best_designs(cohort, seed=seed, progress=True)
            room = room_to_limits(best)
            rows.append(
                {
                    "cohort": name,
                    "patients": len(cohort),
                    "seed": seed,
                    "mean_best_reward": best.score.mean().item(),
                    "agree_within_0.02": (best.seed_gap <= 0.02).float().mean().item(),
                    "largest_gap": best.seed_gap.max().item(),
                    "at_a_safety_limit": share_of_any((room >= 0) & (room < LIMIT_DISTANCE)),
                    "breaks_a_safety_limit": share_of_any(room < 0),
                    "seconds": time.perf_counter() - start,
                    "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                    "calls_per_patient": 2 * CALLS_PER_SEARCH,
                    "threads": torch.get_num_threads(),
                }
            )
    table = pd.DataFrame(rows)
    write_atomically(RESULTS / "oracle.csv", table.to_csv(index=False).encode())
    lines = [
        f"Oracle: two searches per patient, {2 * CALLS_PER_SEARCH:,} calls of the reward model; "
        f"seeds {args.seeds}, CPU with {rows[0]['threads']} threads; made by "
        "`benchmark/oracle.py`.",
        "",
        "| cohort | patients | mean best reward | the two searches agree within 0.02 | largest gap "
        "| best designs at a safety limit | that break one | seconds (median) "
        "| peak memory of the process |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, group in table.groupby("cohort", sort=False):
        lines.append(
            f"| {name} | {group['patients'].iloc[0]:,} "
            f"| {group['mean_best_reward'].min():.3f} to {group['mean_best_reward'].max():.3f} "
            f"| {100 * group['agree_within_0.02'].min():.2f} % or more "
            f"| {group['largest_gap'].max():.3f} "
            f"| {100 * group['at_a_safety_limit'].mean():.0f} % "
            f"| {100 * group['breaks_a_safety_limit'].max():.0f} % "
            f"| {group['seconds'].median():.0f} | {group['peak_memory_mib'].max():,.0f} MiB |"
        )
    write_atomically(RESULTS / "oracle.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
