"""The one table of what is measured in every iteration.

`metrics.csv`, Weights & Biases, TensorBoard and the documentation derive from `METRICS`: a new
metric is a new row. What a rollout shows has its formula there too; losses, evaluations and times
are passed to `Run.record` under their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from hydrogel_gym.problem.fields import Outcomes
from hydrogel_gym.problem.reward import SAFETY_LIMITS, RewardTerms

Infos = dict[str, Tensor]  # (T, B) of every step of a rollout
COHORTS = ("train", "holdout")
# How far the mean reward of a step falls short of the best possible, of patients.
YARDSTICK = ("regret", "regret_p95", "fraction_of_oracle")
# What the logit of `is_optimal` says is said by its term of the reward.
OUTCOMES_LOGGED = tuple(name for name in Outcomes._fields if name != "optimal_logit")
# Infos of a step that a rollout keeps.
INFOS = ("is_optimal", *Outcomes._fields, *RewardTerms._fields)


class Metric(NamedTuple):
    """A column of `metrics.csv`, which is NAMESPACE/NAME in W&B and TensorBoard."""

    name: str
    namespace: str
    meaning: str
    # Of these W&B's summary shows the best of the run, of the rest the last. A sweep's objective
    # has to be a number there, so fractions of the oracle are among the rest.
    best: Literal["max", "min"] | None = None
    of_rollout: Callable[[Infos], Tensor] | None = None

    @property
    def key(self) -> str:
        """Its name in W&B and TensorBoard; `global_step` is the axis of all others."""
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


def _mean(info: str) -> Callable[[Infos], Tensor]:
    return lambda infos: infos[info].mean()


def _breach_rate(limit: str) -> Callable[[Infos], Tensor]:
    return lambda infos: (infos[f"reward_{limit}"] < 0).float().mean()


OUTCOME_MEANINGS = {
    "delta_ef_pct": "mean predicted change in ejection fraction, percentage points",
    "stress_reduction_pct": "mean predicted reduction of border-zone stress, %",
    "toxicity_risk": "mean predicted toxicity risk, 0 to 1",
    "structural_integrity": "mean predicted structural integrity, 0 to 1",
    "fibrosis_risk": "mean predicted fibrosis risk, 0 to 1",
}
TERM_MEANINGS = {
    "reward_delta_ef": "mean of the reward's term for the ejection fraction; the seven terms add "
    "up to `mean_reward`",
    "reward_stress_reduction": "of its term for stress",
    "reward_optimal_prob": "of its term for the probability that the design is optimal",
    "reward_toxicity": "of the penalty for toxicity",
    "reward_integrity": "of the penalty for structural integrity",
    "reward_fibrosis": "of the penalty for fibrosis",
    "reward_novelty": "of the bonus for a polymer that is new in the episode",
}


def _evaluated(cohort: str, patients: str) -> Iterable[Metric]:
    reward = f"deterministic policy on the {patients}, after the updates"
    yield Metric(f"{cohort}_deterministic_reward", "eval", reward, "max")
    regret = f"mean over the {patients} of the best possible reward less that reward"
    yield Metric(f"{cohort}_regret", "eval", regret, "min")
    yield Metric(f"{cohort}_regret_p95", "eval", "95th percentile of the same", "min")
    yield Metric(f"{cohort}_fraction_of_oracle", "eval", "mean reward over mean best reward")


METRICS = (
    Metric("iteration", "charts", "a rollout and its updates; from 1"),
    Metric("global_step", "", "samples taken so far, over all environments"),
    Metric(
        "mean_reward",
        "charts",
        "mean reward of the rollout, which the policy before this iteration's updates took",
        "max",
        _mean("reward"),
    ),
    Metric(
        "max_reward",
        "charts",
        "largest reward of the rollout",
        "max",
        lambda infos: infos["reward"].max(),
    ),
    Metric(
        "optimal_rate",
        "charts",
        "share of its designs with a gain of 3 points or more and stress relief of 15 % or more",
        "max",
        lambda infos: infos["is_optimal"].float().mean(),
    ),
    *(
        Metric(f"mean_{name}", "reward", OUTCOME_MEANINGS[name], None, _mean(name))
        for name in OUTCOMES_LOGGED
    ),
    *(
        Metric(name, "reward", TERM_MEANINGS[name], None, _mean(name))
        for name in RewardTerms._fields
    ),
    *(
        Metric(
            f"{name}_breach_rate",
            "charts",
            f"share of its designs that break the limit of {name}",
            None,
            _breach_rate(name),
        )
        for name in SAFETY_LIMITS
    ),
    Metric("policy_loss", "losses", "clipped surrogate loss, mean over the updates"),
    Metric(
        "value_loss",
        "losses",
        "mean squared error of the value in units of the return's standard deviation",
    ),
    Metric(
        "entropy",
        "losses",
        "joint entropy, nats; the squashed Gaussian's part is estimated by quadrature",
    ),
    Metric("approx_kl", "losses", "KL divergence from the rollout's policy, k3 estimator"),
    Metric("clipfrac", "losses", "share of probability ratios that were clipped"),
    Metric("grad_norm", "losses", "norm of the gradient before clipping"),
    Metric(
        "explained_variance",
        "losses",
        "of the returns by the value function, before the updates",
    ),
    Metric("learning_rate", "charts", "of Adam in this iteration"),
    *_evaluated("train", "training patients"),
    *_evaluated("holdout", "held-out patients"),
    Metric(
        "rollout_seconds",
        "perf",
        "of this iteration's rollout; on a GPU until it was requested, not done",
    ),
    Metric(
        "reward_model_seconds",
        "perf",
        "part of it that the frozen reward model takes: one call, timed apart and not compiled, "
        "times the steps",
    ),
    Metric("update_seconds", "perf", "of its updates, and of what a GPU still had to do"),
    Metric("wall_seconds", "perf", "since training began, evaluations included"),
    Metric("samples_per_second", "perf", "`global_step / wall_seconds`"),
)
NAMESPACES = tuple(dict.fromkeys(metric.namespace for metric in METRICS if metric.namespace))
KEYS = {metric.name: metric.key for metric in METRICS}


def rollout_metrics(infos: Infos) -> dict[str, Tensor]:
    """Every metric that is a function of a rollout."""
    return {m.name: m.of_rollout(infos) for m in METRICS if m.of_rollout is not None}


def as_row(values: dict[str, Any]) -> dict[str, Any]:
    """Values in the order of the table.

    Raises:
        KeyError: one of them is no metric of the table.
    """
    if unknown := [name for name in values if name not in KEYS]:
        raise KeyError(f"{', '.join(unknown)}: no row of hydrogel_gym.runs.metrics.METRICS")
    return {name: values[name] for name in KEYS if name in values}


def keyed(row: dict[str, Any]) -> dict[str, float]:
    """A row by W&B's names; without an oracle there is no regret."""
    return {KEYS[name]: value for name, value in row.items() if value is not None}
