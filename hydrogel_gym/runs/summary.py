"""What is printed of a policy's figures when a script ends."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from hydrogel_gym.runs.command_line import INTERRUPTED

SHOWN = (
    "mean_reward",
    "optimal_rate",
    "train_deterministic_reward",
    "holdout_deterministic_reward",
    "holdout_regret",
    "holdout_fraction_of_oracle",
    "holdout_deterministic_limit_breach_rate",
)
# Of an adaptive problem: after each check, and of the best predicted design.
REGRETS = ("regret_after_checks", "no_learning_regret")


def print_figures(figures: dict[str, Any], written_to: str) -> None:
    """Print the figures that matter most."""
    for name in SHOWN:
        if figures.get(name) is not None:
            print(f"{name:>40}  {figures[name]:.3f}")
    for name in REGRETS:
        for statistic, values in figures.get(name, {}).items():
            row = " ".join(f"{value:.2f}" for value in np.atleast_1d(values))
            print(f"{f'{name}, {statistic}':>40}  {row}")
    print(f"{'written to':>40}  {written_to}")


def print_summary(summary: dict[str, Any]) -> int:
    """Print the figures that matter most; returns the exit code."""
    interrupted = summary.get("interrupted", False)
    if "output_dir" in summary:  # not on ranks other than 0
        print_figures(summary, summary["output_dir"])
        if interrupted:
            print(
                "interrupted: what was trained so far is saved; --resume auto continues",
                file=sys.stderr,
            )
    return INTERRUPTED if interrupted else 0
