"""Rebuild the best designs of the two shipped cohorts: best_designs.csv, best_designs_holdout.csv.

    python patients/make_best_designs.py           search, rewrite both files; a minute on two cores
    python patients/make_best_designs.py --check   exit 1 unless they are what a search finds

Run it after a change of the problem, of the built-in model, of the search or of a cohort: until
then the files are passed over, and every first run searches. On the same kind of processor, with
the same torch, the files come out byte for byte. Elsewhere last digits differ, and with them which
of two equally good designs is found; `--check` then compares scores, patient by patient, with the
error bars of both searches.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hydrogel_gym.files import write_atomically
from hydrogel_gym.oracle.best import BestDesigns, cached_best_designs, key_of, search_designs
from hydrogel_gym.oracle.cache import SHIPPED_DESIGNS

FOLDER = Path(__file__).parent
SAME_REWARD = 0.02  # of what the project calls agreement of two searches


def check(cohort: str, content: bytes, found: BestDesigns) -> str | None:
    """What is wrong with the shipped designs of a cohort, or None; prints what is right.

    Args:
        cohort: its name.
        content: of the file as it comes out now.
        found: by the search behind it.
    """
    file = SHIPPED_DESIGNS[cohort]
    shipped = cached_best_designs(cohort)
    if shipped is None:
        return f"{file} is not of this code and cohort, or damaged"
    if (FOLDER / file).read_bytes() == content:
        print(f"{file}: byte for byte")
        return None
    allowed = (shipped.seed_gap + found.seed_gap).clamp_min(SAME_REWARD)
    difference = (shipped.score - found.score).abs()
    if (worse := difference > allowed).any():
        row = int(worse.nonzero()[0])
        return (
            f"{file}: the design of {found.patient_ids[row]} earns {shipped.score[row]:.4f}, "
            f"one found now {found.score[row]:.4f}; such patients: {int(worse.sum())}"
        )
    print(
        f"{file}: other digits; the rewards of {(difference <= 1e-3).float().mean():.1%} of "
        f"patients agree within 0.001, the largest difference is {difference.max():.1g}"
    )
    return None


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a file is wrong")
    args = parser.parse_args(argv)
    wrong = []
    for cohort, file in SHIPPED_DESIGNS.items():
        found = search_designs(cohort, progress=True)
        content = found.to_file(key_of(cohort))
        if args.check:
            wrong.append(check(cohort, content, found))
        else:
            write_atomically(FOLDER / file, content)
    faults = [each for each in wrong if each]
    for each in faults:
        print(f"{each}; python patients/make_best_designs.py rebuilds it", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
