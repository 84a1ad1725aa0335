"""How good predictions of outcomes are, beside a table of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch

from hydrogel_gym.models.contract import RewardModel
from hydrogel_gym.models.ensemble import Stage1Ensemble
from hydrogel_gym.models.outcome_table import LABEL, OUTCOME_COLUMNS, OutcomeTable
from hydrogel_gym.problem.fields import Outcomes

CALIBRATION_BINS = 15
BATCH_ROWS = 16_384  # predicted at a time


def in_batches(
    predict: Callable[..., Outcomes], table: OutcomeTable, device: torch.device
) -> np.ndarray:
    """(N, 6): the outcomes that a function of designs returns for the rows of a table."""
    parts = []
    for begin in range(0, len(table.group), BATCH_ROWS):
        rows = table.rows(slice(begin, begin + BATCH_ROWS))
        design = (rows.patient, rows.polymer_id, rows.formulation, rows.coverage)
        with torch.no_grad():
            parts.append(torch.stack(list(predict(*(x.to(device) for x in design))), -1).cpu())
    return torch.cat(parts).numpy()


def as_in_table(outcomes: Outcomes) -> Outcomes:
    """Outcomes as a table has them, the label as a probability."""
    return outcomes._replace(optimal_logit=outcomes.optimal_logit.sigmoid())


def evaluate_ensemble(
    ensemble: Stage1Ensemble, table: OutcomeTable, truth: RewardModel | None, device: torch.device
) -> tuple[dict[str, Any], np.ndarray]:
    """How good an ensemble is on the rows of a table.

    Args:
        ensemble: whose mean is evaluated, without pessimism.
        table: of patients that it was not fitted to.
        truth: what the table was made from, if that is known.
        device: of both models.

    Returns:
        `held_out`, the quality by outcome, and `members_std`, the mean spread of the members; with
        a truth also `ceiling`, the quality that the noise of the table leaves to it, and
        `against_truth`, errors without that noise. And the (N, 6) predictions.
    """
    observed = table.outcome.numpy()
    predicted = in_batches(lambda *d: as_in_table(ensemble.predict(*d).mean), table, device)
    spread = in_batches(lambda *d: ensemble.predict(*d).std, table, device).mean(0)
    figures: dict[str, Any] = {
        "held_out": quality(predicted, observed),
        "members_std": dict(zip(OUTCOME_COLUMNS, spread.tolist(), strict=True)),
    }
    if truth is not None:
        exact = in_batches(lambda *d: as_in_table(truth(*d)), table, device)
        errors = np.abs(predicted - exact).mean(0).tolist()
        figures["ceiling"] = quality(exact, observed)
        figures["against_truth"] = {
            name: {"mae": error, "members_std": figures["members_std"][name]}
            for name, error in zip(OUTCOME_COLUMNS, errors, strict=True)
            if name != LABEL
        }
    return figures, predicted


def quality(predicted: np.ndarray, observed: np.ndarray) -> dict[str, dict[str, float]]:
    """Errors of predictions, by outcome.

    Args:
        predicted: (N, 6) in the order of `OUTCOME_COLUMNS`.
        observed: (N, 6), NaN where missing.

    Returns:
        `mae`, `rmse` and `r2` of each outcome; of the label `auroc`, `f1` (at even odds),
        `calibration_error` (expected, `CALIBRATION_BINS` bins of equal width) and `share`.
    """
    from sklearn import metrics

    result: dict[str, dict[str, float]] = {}
    for i, name in enumerate(OUTCOME_COLUMNS):
        there = ~np.isnan(observed[:, i])
        p, y = predicted[there, i].astype(np.float64), observed[there, i].astype(np.float64)
        if name != LABEL:
            result[name] = {
                "mae": metrics.mean_absolute_error(y, p),
                "rmse": metrics.root_mean_squared_error(y, p),
                "r2": metrics.r2_score(y, p),
            }
            continue
        both = len(np.unique(y)) == 2  # else there is no order of the two
        bins = calibration(p, y)
        result[name] = {
            "auroc": metrics.roc_auc_score(y, p) if both else math.nan,
            "f1": metrics.f1_score(y, p > 0.5, zero_division=0.0),
            "calibration_error": float(
                (bins["share"] * (bins["predicted"] - bins["observed"]).abs()).sum()
            ),
            "share": float(y.mean()),
        }
    return {name: {k: float(v) for k, v in each.items()} for name, each in result.items()}


def calibration(probability: np.ndarray, label: np.ndarray) -> pd.DataFrame:
    """Mean prediction, observed share and share of all rows, of each bin that has rows."""
    bins = np.minimum((probability * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    frame = pd.DataFrame({"predicted": probability, "observed": label})
    grouped = frame.groupby(bins)
    return grouped.mean().assign(share=grouped.size() / len(frame))


def quality_text(report: dict[str, Any]) -> str:
    """A report on unseen patients as lines: of each outcome, with its ceiling where it has one."""
    lines = [
        f"unseen: {report['held_out_patients']} of {report['patients']} patients, "
        f"{report['held_out_rows']:,} rows; the ceiling is what the noise of the table leaves"
    ]
    for name, of_model in report["held_out"].items():
        rows = {name: of_model}
        if "ceiling" in report:
            rows["ceiling"] = report["ceiling"][name]
        for title, row in rows.items():
            values = "  ".join(f"{key} {value:.3f}" for key, value in row.items())
            lines.append(f"{title:>22}  {values}")
    return "\n".join(lines)
