"""What quantities are called on the page, and how they are printed."""

from __future__ import annotations

from hydrogel_gym.problem.fields import COVERAGE_FRACTIONS

TERM_LABELS = {
    "reward_delta_ef": "ejection fraction",
    "reward_stress_reduction": "stress reduction",
    "reward_optimal_prob": "probability of optimal",
    "reward_toxicity": "toxicity penalty",
    "reward_integrity": "integrity penalty",
    "reward_fibrosis": "fibrosis penalty",
    "reward_novelty": "novelty bonus",
}
OUTCOME_LABELS = {
    "delta_ef_pct": "change in ejection fraction, percentage points",
    "stress_reduction_pct": "border-zone stress reduction, %",
    "toxicity_risk": "toxicity risk, 0 to 1",
    "structural_integrity": "structural integrity, 0 to 1",
    "fibrosis_risk": "fibrosis risk, 0 to 1",
}
SIGNS = {True: "≤", False: "≥"}  # of safety limits, by whether it is a ceiling
# Of `summary.json`: label, factor, decimals, unit.
FINAL_FIGURES = {
    "mean_reward": ("mean reward, sampled designs, training patients", 1, 2, ""),
    "optimal_rate": ("designs that meet both goals, sampled", 100, 1, "\u00a0%"),
    "limit_breach_rate": ("designs that break a safety limit, sampled", 100, 2, "\u00a0%"),
    "train_deterministic_reward": ("mean reward, deterministic, training patients", 1, 2, ""),
    "train_deterministic_limit_breach_rate": (
        "designs that break a limit, deterministic, training patients",
        100,
        2,
        "\u00a0%",
    ),
    "train_fraction_of_oracle": ("fraction of the oracle, training patients", 100, 2, "\u00a0%"),
    "train_regret": ("mean regret, training patients", 1, 3, ""),
    "holdout_deterministic_reward": ("mean reward, deterministic, held-out patients", 1, 2, ""),
    "holdout_deterministic_limit_breach_rate": (
        "designs that break a limit, deterministic, held-out patients",
        100,
        2,
        "\u00a0%",
    ),
    "holdout_fraction_of_oracle": ("fraction of the oracle, held-out patients", 100, 2, "\u00a0%"),
    "holdout_regret": ("mean regret, held-out patients", 1, 3, ""),
    "holdout_regret_p95": ("95th percentile of the regret, held-out patients", 1, 3, ""),
    "holdout_predicted_regret": ("mean predicted regret, held-out patients", 1, 3, ""),
    "holdout_regret_rank_correlation": (
        "rank correlation of predicted and true regret, held-out patients",
        1,
        2,
        "",
    ),
    "holdout_regret_bound_coverage": (
        "held-out patients whose regret is below its bound",
        100,
        1,
        "\u00a0%",
    ),
    "holdout_regret_of_flagged": (
        "share of all regret in the fifth for whom most is predicted, held-out patients",
        100,
        0,
        "\u00a0%",
    ),
    "entropy": ("entropy of the policy, nats", 1, 2, ""),
    "samples": ("samples", 1, 0, ""),
    "wall_seconds": ("training time, s", 1, 0, ""),
}


def final_figure(name: str, value: float) -> str:
    """A figure of `summary.json` with its unit."""
    _, factor, decimals, unit = FINAL_FIGURES[name]
    return f"{factor * value:,.{decimals}f}{unit}"


def coverage_labels() -> list[str]:
    """Coverage levels in words."""
    return [
        f"scar and {100 * share:.0f} % of the border zone" if share else "scar only"
        for share in COVERAGE_FRACTIONS
    ]
