"""One HTML page about a run, or about several beside each other; opens from disk, needs no network.

    python train/report.py runs/quick-s1                    # writes runs/quick-s1/report.html
    python train/report.py runs/quick-s1 runs/quick-s2      # writes runs/comparison.html

The page of one run shows what was run, its learning curves, which designs the policy chooses for
the patients it was trained on, and each of those patients; of a run in HydrogelAdapt-v0 one
patient's episode instead. A run directory that lacks files, that is still being written or that was
interrupted gives a page that says what it cannot show.
Runs that differ by nothing but the seed are one group of a comparison, shown as mean ± standard
deviation. The pages are made in `hydrogel_gym.report`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from hydrogel_gym.errors import UsageError
from hydrogel_gym.files import write_atomically
from hydrogel_gym.report.comparison import comparison_page
from hydrogel_gym.report.page import run_page
from hydrogel_gym.report.reading import read_run
from hydrogel_gym.runs.command_line import read_command_line, run_script
from hydrogel_gym.train.ppo_hybrid import Agent


@dataclass
class Args:
    """Write one self-contained HTML page about a run, or one that compares several."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """run directories that the trainer wrote; more than one are compared"""
    output: Path | None = None
    """file to write; default report.html in the run directory, or comparison.html in the folder
    that contains all of them"""


def write_report(args: Args) -> Path:
    """Write the page that is requested; returns its path.

    Raises:
        UsageError: there is no such run, or the page cannot be written.
    """
    if not args.run_dirs:
        raise UsageError("name at least one run directory; see --help")
    resolved = [Path(os.path.realpath(path)) for path in args.run_dirs]  # of a loop, itself
    for path in resolved:
        if resolved.count(path) > 1:
            raise UsageError(f"{path} is named twice")
    runs = [read_run(path, Agent) for path in args.run_dirs]
    if len(runs) == 1:
        output = args.output or args.run_dirs[0] / "report.html"
    else:
        parents = [path.parent for path in resolved]
        output = args.output or Path(os.path.commonpath(parents)) / "comparison.html"
    content = run_page(runs[0]) if len(runs) == 1 else comparison_page(runs)
    try:
        write_atomically(output, content)
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror}") from error
    return output


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""

    def body() -> None:
        output = write_report(read_command_line(Args, argv, prog="report.py"))
        print(f"written to {output} ({output.stat().st_size / 1e6:.1f} MB)")

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())
