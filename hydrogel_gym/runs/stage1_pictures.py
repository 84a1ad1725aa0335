"""Pictures of how good a Stage-1 model is on patients that it was not fitted to."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hydrogel_gym.models.outcome_table import LABEL, OUTCOME_COLUMNS, REGRESSED
from hydrogel_gym.models.quality import CALIBRATION_BINS, calibration
from hydrogel_gym.runs.directory import save_figure


def draw_quality(folder: Path, predicted: np.ndarray, observed: np.ndarray) -> None:
    """Write `reliability.png` and `predictions.png`.

    Args:
        folder: where to.
        predicted: (N, 6) in the order of `OUTCOME_COLUMNS`.
        observed: (N, 6), NaN where missing.
    """
    draw_reliability(folder / "reliability.png", predicted, observed)
    draw_predictions(folder / "predictions.png", predicted, observed)


def draw_reliability(path: Path, predicted: np.ndarray, observed: np.ndarray) -> None:
    """Picture of how often a design was optimal, by how probable that was predicted to be."""
    from matplotlib.figure import Figure

    i = OUTCOME_COLUMNS.index(LABEL)
    there = ~np.isnan(observed[:, i])
    bins = calibration(predicted[there, i], observed[there, i])
    figure = Figure(figsize=(5, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="perfectly calibrated")
    top.plot(bins["predicted"], bins["observed"], marker="o", label="unseen patients")
    top.set(ylabel="observed share of optimal designs", title="Reliability of `optimal`")
    top.legend()
    bottom.bar(bins["predicted"], bins["share"], width=0.8 / CALIBRATION_BINS)
    bottom.set(xlabel="predicted probability", ylabel="share of designs")
    save_figure(path, figure)


def draw_predictions(path: Path, predicted: np.ndarray, observed: np.ndarray) -> None:
    """Picture of predictions beside what was observed, for every outcome but the label."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(REGRESSED), 4), layout="constrained")
    axes = figure.subplots(1, len(REGRESSED))
    for ax, name in zip(axes, REGRESSED, strict=True):
        i = OUTCOME_COLUMNS.index(name)
        there = ~np.isnan(observed[:, i])
        p, y = predicted[there, i], observed[there, i]
        low, high = np.percentile(np.concatenate([p, y]), (0.1, 99.9))
        ax.hexbin(p, y, gridsize=50, bins="log", extent=(low, high, low, high), cmap="Blues")
        ax.plot([low, high], [low, high], color="0.3", linestyle="--")
        ax.set(xlabel=f"predicted {name}", ylabel="in the table, unseen patients")
    save_figure(path, figure)
