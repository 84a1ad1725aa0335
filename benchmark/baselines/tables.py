"""What the comparison comes to: tables in Markdown, a picture, and when training a policy pays."""

from __future__ import annotations

import io
import math
from typing import NamedTuple

import pandas as pd

from baselines.methods import METHODS, REFERENCE, OracleCost
from baselines.policy import TrainedPolicy

NUMBERS_OF_PATIENTS = (100, 2_000, 100_000)  # for the break-even table


def calls_to_match(rows: pd.DataFrame, column: str, target: float, *, falls: bool) -> int | None:
    """Fewest tabulated calls at which a column reaches the target; None if none does."""
    reached = rows[column] <= target if falls else rows[column] >= target
    return int(rows.loc[reached, "calls"].min()) if reached.any() else None


class BreakEven(NamedTuple):
    """Costs per reward call, in seconds, between which training a policy is the cheaper way."""

    above: float
    below: float


def break_even(
    *,
    num_patients: int,
    calls: int,
    overhead_seconds: float,
    training_calls: float,
    training_seconds: float,
) -> BreakEven | None:
    """Where a policy, with one call per patient, costs less than a search as good; None: nowhere.

    At a cost c per call the policy costs N c + T + P c, the search P (n c + o).

    Args:
        num_patients: P, new patients.
        calls: n, calls per patient that the search needs.
        overhead_seconds: o, the search's own time per patient.
        training_calls: N.
        training_seconds: T.
    """
    # The search costs more where c * slope > rest.
    slope = num_patients * (calls - 1) - training_calls
    rest = training_seconds - num_patients * overhead_seconds
    if slope > 0:
        return BreakEven(max(0.0, rest / slope), math.inf)
    if rest >= 0:
        return None
    return BreakEven(0.0, math.inf if slope == 0 else rest / slope)


def seconds(value: float) -> str:
    """A duration with a unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return "0 s"


def break_even_text(result: BreakEven | None, *, reached: bool, threshold: float) -> str:
    """Cell of the break-even table; `threshold` is N / (n - 1), in patients."""
    if result is None:
        return f"never below {threshold:,.0f} patients" if reached else "not settled"
    if math.isfinite(result.below):
        return f"c < {seconds(result.below)}"
    if result.above == 0.0:
        return "at any c"
    return f"c > {seconds(result.above)}" if reached else f"c > {seconds(result.above)} or less"


def policy_reference(table: pd.DataFrame, num_patients: int) -> pd.Series:
    """The zero-shot policy's row for the first patients of the choice."""
    rows = table[(table["method"] == REFERENCE) & (table["num_patients"] == num_patients)]
    return rows.iloc[0]


def report(table: pd.DataFrame, policies: list[TrainedPolicy], oracle: OracleCost) -> str:
    """The content of `regret.md`."""
    groups = {
        name: rows[rows["num_patients"] == rows["num_patients"].max()]
        for name, rows in table.groupby("method", sort=False)
    }
    searches = [name for name in groups if METHODS[name].kind == "search"]
    policy = groups[REFERENCE].iloc[0]
    names = ", ".join(f"`{policy.run_dir.name}`" for policy in policies)
    summary = policies[0].summary
    preset = summary.get("preset", "unnamed")
    lines = [
        f"Regret (the oracle's reward minus the method's) on {policy['num_patients']} patients of "
        f"the held-out cohort; policy: {names} (preset {preset}), trained with "
        f"{policy['training_calls']:,.0f} reward calls in {policy['training_seconds']:,.0f} s "
        f"(mean; {summary.get('device')}, {summary.get('threads')} threads). Mean reward of the "
        f"oracle {policy['oracle_reward_mean']:.2f}. Made by `benchmark/regret.py`. Brackets hold "
        "the interquartile range over patients. A method on fewer patients, as its row says, is "
        "compared with the policy on those.",
        "",
        *one_call_lines(table, groups),
        "",
        *regret_lines(groups),
    ]
    if searches:
        lines += ["", *matching_lines(table, groups, searches), ""]
        lines += break_even_lines(table, groups, searches, oracle)
    lines += [
        "",
        "## The oracle's own cost",
        "",
        f"The oracle spends {oracle.calls:,.0f} reward calls and {seconds(oracle.seconds)} of one "
        f"core per patient, {seconds(oracle.seconds / oracle.calls)} a call in large batches; "
        f"{seconds(oracle.overhead)} of it is not the reward model. With a closed-form model, "
        "searching for each patient directly is cheap; a policy pays where a call is dear.",
    ]
    return "\n".join(lines) + "\n"


def one_call_lines(table: pd.DataFrame, groups: dict[str, pd.DataFrame]) -> list[str]:
    """Table of the methods that make one call."""
    lines = [
        "## One call per new patient",
        "",
        "| method | median regret | mean regret | mean reward | mean fraction of the oracle | "
        "reward calls beforehand |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in groups.items():
        if METHODS[name].budget == 1:
            row = rows.iloc[0]
            lines.append(
                f"| {METHODS[name].label} | {regret_cell(row)} | {row['regret_mean']:.2f} | "
                f"{row['reward_mean']:.2f} | {100 * row['oracle_fraction_mean']:.1f} % | "
                f"{row['training_calls']:,.0f} |"
            )
    return [
        *lines,
        "",
        "The transfer methods use the oracle's design for every patient of the training cohort; "
        "its calls are counted. " + " ".join(filter(None, table["note"].unique())),
    ]


def regret_lines(groups: dict[str, pd.DataFrame]) -> list[str]:
    """Table of the median regret by the number of calls."""
    shown = [1, 10, 30, 100, 300, 1_000, 3_000, 10_000]
    lines = [
        "## Median regret against calls per new patient",
        "",
        "| method | patients | " + " | ".join(f"{count:,}" for count in shown) + " |",
        "|---|---" + "|---" * len(shown) + "|",
    ]
    for name in [key for key in groups if METHODS[key].budget > 1]:
        rows = groups[name]
        cells = [
            regret_cell(rows[rows["calls"] <= count].iloc[-1])
            if count <= rows["budget"].max()
            else "–"
            for count in shown
        ]
        lines.append(
            f"| {METHODS[name].label} | {rows['num_patients'].iloc[0]} | {' | '.join(cells)} |"
        )
    if "policy_best_of_k" in groups:
        lines += ["", "Best of k: the deterministic design first, then k − 1 samples."]
    return lines


def regret_cell(row: pd.Series) -> str:
    """Median and interquartile range of the regret."""
    return f"{row['regret_median']:.2f} [{row['regret_q25']:.2f}, {row['regret_q75']:.2f}]"


def count_text(count: int | None, budget: int) -> str:
    """A number of calls, or more than the budget."""
    return f"{count:,}" if count else f"> {budget:,}"


def matching_lines(
    table: pd.DataFrame, groups: dict[str, pd.DataFrame], searches: list[str]
) -> list[str]:
    """Table of the calls that each search needs to equal the zero-shot policy."""
    lines = [
        "## Calls per patient to equal the zero-shot policy",
        "",
        "| search | patients | calls, equal median regret | calls, equal mean reward | "
        "overhead per call |",
        "|---|---|---|---|---|",
    ]
    for name in searches:
        rows, target = groups[name], policy_reference(table, groups[name]["num_patients"].iloc[0])
        budget = int(rows["budget"].iloc[0])
        median = calls_to_match(rows, "regret_median", target["regret_median"], falls=True)
        mean = calls_to_match(rows, "reward_mean", target["reward_mean"], falls=False)
        overhead = rows["overhead_seconds"].iloc[-1] / budget
        lines.append(
            f"| {METHODS[name].label} | {rows['num_patients'].iloc[0]} | "
            f"{count_text(median, budget)} | {count_text(mean, budget)} | {seconds(overhead)} |"
        )
    return [
        *lines,
        "",
        "Calls are tabulated in steps of 6 % (each up to 20). Overhead is CPU time of one core "
        "without the reward model, mean over the whole budget.",
    ]


def break_even_lines(
    table: pd.DataFrame,
    groups: dict[str, pd.DataFrame],
    searches: list[str],
    oracle: OracleCost,
) -> list[str]:
    """Table of the costs per call at which training the policy pays."""
    lines = [
        "## When training the policy pays",
        "",
        "For P new patients at c seconds per reward call the policy costs N c + T + P c, with the "
        "N calls and T seconds of its training given above, and a search P (n c + o), with n its "
        "calls to equal the policy's mean reward and o its overhead for these. The policy is the "
        "cheaper way where",
        "",
        "| instead of | n | o | "
        + " | ".join(f"P = {count:,}" for count in NUMBERS_OF_PATIENTS)
        + " |",
        "|---|---|---" + "|---" * len(NUMBERS_OF_PATIENTS) + "|",
    ]

    def line(label: str, calls: int, overhead: float, target: pd.Series, budget: int | None) -> str:
        cells = []
        for num_patients in NUMBERS_OF_PATIENTS:
            result = break_even(
                num_patients=num_patients,
                calls=calls,
                overhead_seconds=overhead,
                training_calls=target["training_calls"],
                training_seconds=target["training_seconds"],
            )
            threshold = target["training_calls"] / max(calls - 1, 1)
            cells.append(break_even_text(result, reached=budget is None, threshold=threshold))
        shown = count_text(calls if budget is None else None, calls)
        return f"| {label} | {shown} | {seconds(overhead)} | {' | '.join(cells)} |"

    for name in searches:
        rows, target = groups[name], policy_reference(table, groups[name]["num_patients"].iloc[0])
        found = calls_to_match(rows, "reward_mean", target["reward_mean"], falls=False)
        budget = int(rows["budget"].iloc[0])
        calls = found or budget
        overhead = rows.loc[rows["calls"] == calls, "overhead_seconds"].iloc[0]
        lines.append(line(METHODS[name].label, calls, overhead, target, None if found else budget))
    target = groups[REFERENCE].iloc[0]
    lines.append(
        line("the oracle, which is better", round(oracle.calls), oracle.overhead, target, None)
    )
    return [
        *lines,
        "",
        "*Never below P patients*: up to P = N / (n − 1) the search makes fewer calls in all than "
        "the training does, whatever a call costs. *c < x*: likewise, but the search's own time "
        "makes it the dearer way as long as calls are cheap. A search that did not equal the "
        "policy is entered with its whole budget, which favours the search (*or less*, *not "
        "settled*). N leaves out the calls that the trainer spends on its progress report. T is "
        "wall time and contains N calls of the closed-form model; o is CPU time of one core.",
    ]


def draw(table: pd.DataFrame) -> bytes:
    """PNG: regret against calls, and beside it the methods that make one call."""
    from matplotlib.figure import Figure

    floor, ceiling = 0.01, 30.0
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1, 2.6])
    names = []
    for name, rows in table.groupby("method", sort=False):
        method = METHODS[name]
        rows = rows[rows["num_patients"] == rows["num_patients"].max()]
        low, middle, high = (
            rows[f"regret_{key}"].clip(lower=floor / 2).to_numpy()
            for key in ("q25", "median", "q75")
        )
        if method.budget == 1:
            left.errorbar(
                len(names),
                middle[0],
                yerr=[[middle[0] - low[0]], [high[0] - middle[0]]],
                fmt=method.marker,
                markersize=12 if method.marker == "*" else 8,
                color=method.colour,
                capsize=4,
            )
            names.append(method.label)
        else:
            label = f"{method.label} ({rows['num_patients'].iloc[0]} patients)"
            right.plot(rows["calls"], middle, color=method.colour, label=label, linewidth=2)
            right.fill_between(
                rows["calls"], low, high, color=method.colour, alpha=0.13, linewidth=0
            )
    policy = table[table["method"] == REFERENCE]
    policy = policy.loc[policy["num_patients"].idxmax()]
    for axes in (left, right):
        axes.axhline(max(policy["regret_median"], floor), color="#D55E00", linestyle="--")
        axes.grid(alpha=0.3, which="major")
    left.set(title="one call per patient", xlim=(-0.6, len(names) - 0.4))
    left.set_xticks(range(len(names)), names, rotation=35, ha="right")
    left.set(ylabel="regret: oracle's reward − method's, median and IQR", yscale="log")
    left.set_ylim(floor, ceiling)
    right.set(xscale="log", xlabel="reward calls per new patient", xlim=(1, 10_000))
    right.set_title("searching for each patient; dashed: policy, zero-shot")
    right.legend(loc="upper right", fontsize=9, ncols=2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
