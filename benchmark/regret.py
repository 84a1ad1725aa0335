"""What a trained policy is worth: regret against the reward calls spent on a new patient.

    python benchmark/regret.py --policy runs/quick-s1
    python benchmark/regret.py --policy runs/quick-s1 --methods botorch   # one method again

Every method designs for the same held-out patients and is compared by the same count of calls of
the reward model; the oracle (`hydrogel_gym.oracle`) says what was possible. Writes `regret.csv`,
`.png` and `.md` in `results/`; rows of methods that are not run again are kept. All methods take
half an hour on two cores, two thirds of it BoTorch. Needs `pip install -e ".[bench]"`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from baselines.methods import (
    METHODS,
    REFERENCE,
    Runs,
    check_libraries,
    oracle_cost,
    run_policy,
    run_search,
    run_transfer,
)
from baselines.policy import load_policy
from baselines.tables import draw, report

from hydrogel_gym import load_cohort
from hydrogel_gym.files import write_atomically
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.runs.command_line import check_ranges

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
ORACLE_CACHE = ROOT / "runs" / "oracle"


def tabulate(name: str, runs: Runs, num_patients: int, seed: int, note: str = "") -> pd.DataFrame:
    """A row per number of calls; quantiles and means are over the runs."""
    regret = runs.oracle[:, None] - runs.rewards
    fraction = runs.rewards / runs.oracle[:, None]
    columns: dict[str, Any] = {
        "method": name,
        "calls": runs.calls,
        "num_patients": num_patients,
        "num_runs": len(runs.rewards),
        "budget": runs.calls[-1],
    }
    for key, values in (
        ("reward", runs.rewards),
        ("regret", regret),
        ("oracle_fraction", fraction),
    ):
        q25, median, q75 = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
        columns |= {
            f"{key}_median": median,
            f"{key}_q25": q25,
            f"{key}_q75": q75,
            f"{key}_mean": values.mean(0),
        }
    columns |= {
        "overhead_seconds": runs.overhead_seconds,
        "training_calls": runs.training_calls,
        "training_seconds": runs.training_seconds,
        "oracle_reward_mean": runs.oracle.mean(),
        "seed": seed,
        "note": note,
    }
    return pd.DataFrame(columns)


def merge(old: pd.DataFrame | None, new: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Rows of the methods run now, and the old rows of the others, in the order of `METHODS`."""
    table = pd.concat(new, ignore_index=True)
    if old is not None:
        kept = old[~old["method"].isin(table["method"].unique())]
        table = pd.concat([kept, table], ignore_index=True)
    order = table["method"].map(list(METHODS).index)
    return (
        table.assign(order=order)
        .sort_values(["order", "num_patients", "calls"])
        .drop(columns="order")
    )


def read_old(path: Path, seed: int, oracle: np.ndarray) -> pd.DataFrame | None:
    """Rows of an earlier run for the same patients and the same oracle; the rest is dropped."""
    if not path.is_file():
        return None
    old = pd.read_csv(path, keep_default_na=False)
    means = np.cumsum(oracle) / np.arange(1, len(oracle) + 1)
    known = old["num_patients"].between(1, len(oracle)) & old["method"].isin(METHODS)
    same = known & (old["seed"] == seed)
    expected = means[old["num_patients"].clip(1, len(oracle)) - 1]
    same &= (old["oracle_reward_mean"] - expected).abs() < 1e-3
    for name in old.loc[~same, "method"].unique():
        print(f"{path.name}: rows of {name} are for other patients or another model; dropped")
    return old[same]


def run(args: argparse.Namespace) -> str:
    """Run the methods and write the table, the picture and the report, which is returned.

    Raises:
        ValueError: the request cannot be carried out; raised before any search.
    """
    check_ranges(
        args,
        ("patients budget processes", "1 or more", lambda x: x >= 1),
        ("seed", "0 or more", lambda x: x >= 0),
    )
    budgets = {name: min(method.budget, args.budget) for name, method in METHODS.items()}
    counts = {name: min(method.patients, args.patients) for name, method in METHODS.items()}
    # The policies' rows are always made, so that no row of another policy stays.
    chosen = [name for name in METHODS if METHODS[name].kind == "policy" or name in args.methods]
    holdout = load_cohort("holdout")
    check_libraries(chosen)
    policies = [load_policy(path) for path in args.policy]
    if not args.output_dir.is_dir():
        raise ValueError(f"--output-dir {args.output_dir} is not a folder")

    order = torch.from_numpy(np.random.default_rng(args.seed).permutation(len(holdout)))
    patients = holdout.features[order]
    oracle = best_designs(holdout, cache_dir=args.cache_dir).score[order].numpy().astype(float)
    cost = oracle_cost(holdout)
    cohort = designs = None
    if any(METHODS[name].kind == "transfer" for name in chosen):
        cohort = load_cohort("train")
        designs = best_designs(cohort, cache_dir=args.cache_dir, progress=True).design

    path = args.output_dir / "regret.csv"
    old = read_old(path, args.seed, oracle)
    rows: list[pd.DataFrame] = []
    # Every number of patients that some method has, so that each is compared on its own.
    wanted = {counts[name] for name in chosen} | set(() if old is None else old["num_patients"])
    for name in chosen:
        method, note = METHODS[name], ""
        for count in sorted(wanted) if name == REFERENCE else [counts[name]]:
            some, best = patients[:count], oracle[:count]
            if method.kind == "policy":
                runs = run_policy(name, policies, some, best, budgets[name], args.seed)
            elif method.kind == "transfer":
                runs, note = run_transfer(name, cohort, designs, some, best, args.seed, cost)
            else:
                runs = run_search(name, some, best, budgets[name], args.seed, args.processes)
            rows.append(tabulate(name, runs, count, args.seed, note))
        # After each method, so that stopping a long run loses one method at most.
        table = merge(old, rows)
        write_atomically(path, table.to_csv(index=False, float_format="%.6g").encode())
    text = report(table, policies, cost)
    write_atomically(args.output_dir / "regret.png", draw(table))
    write_atomically(args.output_dir / "regret.md", text.encode())
    return text


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--policy",
        type=Path,
        nargs="+",
        default=[Path("runs/quick-s1")],
        help="finished run directories of the trainer; several are pooled",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="METHOD",
        default=list(METHODS),
        help=f"to run, in addition to those of the policy: {', '.join(METHODS)}",
    )
    parser.add_argument(
        "--patients", type=int, default=100, help="held out, at most; 50 for tpe, 20 for botorch"
    )
    parser.add_argument(
        "--budget",
        type=int,
        default=10_000,
        help="reward calls per patient, at most; 1,000 for policy_best_of_k and tpe, 150 for "
        "botorch",
    )
    parser.add_argument("--processes", type=int, default=2, help="patients searched at once")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of patients and methods")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument(
        "--cache-dir", type=Path, default=ORACLE_CACHE, help="where the oracle keeps its results"
    )
    args = parser.parse_args(argv)
    # Read by the numerical libraries of the processes started below.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    try:
        print(run(args))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished methods are in regret.csv", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
