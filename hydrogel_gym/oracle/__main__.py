"""The oracle's command line: the best design for every patient of a cohort, as a table.

python -m hydrogel_gym.oracle --cohort mine.csv --output best_designs.csv
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from hydrogel_gym.files import write_atomically
from hydrogel_gym.memory import keep_freed_memory
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.output import unfailing_output
from hydrogel_gym.problem.tables import require_pyarrow


@unfailing_output()
def check_output(path: Path) -> None:
    """Refuse, before the search, what the table could not be written to.

    Raises:
        ValueError: it is no table, or in no folder.
        UsageError: pyarrow is not installed.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"--output is {str(path)!r}; allowed: a .csv or .parquet file")
    if not path.parent.is_dir():
        raise ValueError(f"--output is {str(path)!r}, in a folder that does not exist")
    if path.suffix == ".parquet":
        require_pyarrow(f"--output {path}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hydrogel_gym.oracle",
        description="Find the best design for every patient of a cohort and write them as a table.",
    )
    parser.add_argument(
        "--cohort", help="CSV or Parquet table, or train or holdout", default="train"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="table to write, .csv or .parquet"
    )
    parser.add_argument(
        "--reward-model",
        default="mechanistic",
        help="mechanistic, a .pt2 program, a .pt checkpoint or module:factory",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the two searches")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument(
        "--cache-dir", type=Path, help="folder that keeps what was searched, by content"
    )
    args = parser.parse_args(argv)
    start = time.perf_counter()
    keep_freed_memory()
    try:
        check_output(args.output)
        if args.seed < 0:
            raise ValueError(f"--seed is {args.seed}; allowed: 0 or more")
        best = best_designs(
            args.cohort,
            args.reward_model,
            seed=args.seed,
            device=args.device,
            cache_dir=args.cache_dir,
            progress=True,
        )
        frame = best.to_frame()
        if args.output.suffix == ".csv":
            content = frame.to_csv(index=False).encode()
        else:
            content = frame.to_parquet(index=False)
        write_atomically(args.output, content)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    gap = best.seed_gap
    print(
        f"{len(gap)} patients in {time.perf_counter() - start:.1f} s: mean reward "
        f"{best.score.mean():.3f}; two searches agree within 0.02 for "
        f"{100 * (gap <= 0.02).float().mean():.1f} % of them (largest gap {gap.max():.4f})"
    )
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
