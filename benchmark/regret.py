"""What a trained policy is worth: regret against the reward calls spent on a new patient.

    python benchmark/regret.py --policy runs/quick-s1
    python benchmark/regret.py --policy runs/quick-s1 --methods botorch   # one method again

Every method designs for the same held-out patients and is judged by the same count of calls of the
reward model; the oracle (`hydrogel_gym.oracle`) says what was possible. Writes `regret.csv`, `.png`
and `.md` in `results/`; rows of methods that are not run again are kept. All methods together take
half an hour on two cores, two thirds of it BoTorch. Needs `pip install -e ".[bench]"`.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import io
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from baselines import search, transfer
from baselines.objective import CountingModel, PatientObjective
from baselines.policy import TrainedPolicy, load_policy
from torch import Tensor
from tqdm import tqdm

from hydrogel_gym import Cohort, load_cohort
from hydrogel_gym.files import write_atomically
from hydrogel_gym.models.contract import RewardModel, load_reward_model
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.problem.fields import Design

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
ORACLE_CACHE = ROOT / "runs" / "oracle"
NUM_TIMED = 64  # patients on whom the oracle's own cost is measured
NUMBERS_OF_PATIENTS = (100, 2_000, 100_000)  # for the break-even table
REFERENCE = "policy"  # what all else is compared with


class Method(NamedTuple):
    """A way to get a design: how it is shown, what it needs and how much it is given.

    `colour` and `marker` are those of the picture; colours are of the palette of Okabe and Ito,
    which the colour-blind can tell apart.
    """

    label: str
    kind: Literal["search", "transfer", "policy"]
    budget: int
    patients: int
    colour: str
    marker: str = ""
    propose: search.Search | None = None
    library: str | None = None


METHODS = {
    "policy": Method("policy, zero-shot", "policy", 1, 100, "#D55E00", "*"),
    "policy_sample": Method("policy, one sample", "policy", 1, 100, "#D55E00", "x"),
    "policy_best_of_k": Method("policy, best of k", "policy", 1_000, 100, "#D55E00"),
    "one_size_fits_all": Method("one size fits all", "transfer", 1, 100, "#000000", "s"),
    "nearest_patient": Method(
        "nearest patient", "transfer", 1, 100, "#0072B2", "o", library="sklearn"
    ),
    "regression": Method(
        "regression onto oracle designs", "transfer", 1, 100, "#009E73", "D", library="sklearn"
    ),
    "random": Method(
        "random search", "search", 10_000, 100, "#888888", propose=search.random_search
    ),
    "sobol": Method("Sobol search", "search", 10_000, 100, "#56B4E9", propose=search.sobol_search),
    "cma_es": Method(
        "CMA-ES", "search", 10_000, 100, "#0072B2", propose=search.cma_es, library="cma"
    ),
    # The overhead of these two decides what is affordable: about 10 ms and 0.6 s a call.
    "tpe": Method("TPE", "search", 1_000, 50, "#E69F00", propose=search.tpe, library="optuna"),
    "botorch": Method(
        "BoTorch", "search", 150, 20, "#009E73", propose=search.botorch_bo, library="botorch"
    ),
}


class Runs(NamedTuple):
    """What a method reached: R runs, one per patient (and per policy, where several are pooled)."""

    calls: np.ndarray  # (C,) numbers of calls, ascending
    rewards: np.ndarray  # (R, C) best reward after so many calls
    oracle: np.ndarray  # (R,) the oracle's reward for the run's patient
    overhead_seconds: np.ndarray  # (C,) CPU seconds besides the reward model, per patient
    training_calls: float = 0.0  # reward calls before the first new patient
    training_seconds: float = 0.0


def call_grid(budget: int) -> np.ndarray:
    """Numbers of calls that are tabulated: each up to 20, then 40 per decade, and the budget."""
    if budget <= 20:
        return np.arange(1, budget + 1)
    count = 1 + math.ceil(40 * math.log10(budget / 20))
    tail = np.geomspace(20, budget, count).round().astype(int)
    return np.union1d(np.arange(1, 21), tail)


def patient_seed(seed: int, patient: int) -> int:
    """Seed of a method's random numbers for one patient."""
    return int(np.random.SeedSequence((seed, patient)).generate_state(1)[0])


@functools.cache
def mechanistic() -> RewardModel:
    """The reward model, loaded once in each process."""
    return load_reward_model("mechanistic")


def search_patient(
    name: str, features: np.ndarray, budget: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Best reward and cumulative overhead at `call_grid(budget)`, of one search for one patient."""
    method = METHODS[name]
    if method.library:
        importlib.import_module(method.library)  # its import is no overhead of the search
    objective = PatientObjective(torch.from_numpy(features), mechanistic(), budget)
    method.propose(objective, seed)
    at = call_grid(budget) - 1
    return objective.trace[at], objective.overhead_seconds[at]


def start_worker() -> None:
    """Leave one core to each process; the overhead of a search is no work for several."""
    torch.set_num_threads(1)


def run_search(
    name: str, patients: Tensor, oracle: np.ndarray, budget: int, seed: int, processes: int
) -> Runs:
    """Run a search for every patient, several at a time."""
    jobs = [(name, row, budget, patient_seed(seed, k)) for k, row in enumerate(patients.numpy())]
    results = list(
        tqdm(in_parallel(jobs, processes), METHODS[name].label, total=len(jobs), dynamic_ncols=True)
    )
    rewards, overhead = (np.stack(parts) for parts in zip(*results, strict=True))
    return Runs(call_grid(budget), rewards, oracle, overhead.mean(0))


def in_parallel(jobs: list[tuple], processes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Results of `search_patient`, in the order of the jobs."""
    if processes == 1:
        yield from (search_patient(*job) for job in jobs)
        return
    # spawn: a forked child would inherit the locks of the parent's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=start_worker) as pool:
        yield from pool.map(search_patient, *zip(*jobs, strict=True))


def run_policy(
    name: str,
    policies: list[TrainedPolicy],
    patients: Tensor,
    oracle: np.ndarray,
    budget: int,
    seed: int,
) -> Runs:
    """Let every policy design for every patient."""
    at = call_grid(budget) - 1
    rewards, overhead = [], []
    for policy in policies:
        for k, patient in enumerate(patients):
            objective = PatientObjective(patient, mechanistic(), budget)
            key = patient_seed(seed, k)
            if name == "policy_sample":
                generator = torch.Generator().manual_seed(key)
                design = policy.propose(patient[None], deterministic=False, generator=generator)
            else:
                design = policy.best_of(patient, budget, key)
            objective(design)
            rewards.append(objective.trace[at])
            overhead.append(objective.overhead_seconds[at])
    summaries = [policy.summary for policy in policies]
    return Runs(
        at + 1,
        np.stack(rewards),
        np.tile(oracle, len(policies)),
        np.mean(overhead, 0),
        float(np.mean([summary["samples"] for summary in summaries])),
        float(np.mean([summary["wall_seconds"] for summary in summaries])),
    )


def run_transfer(
    name: str,
    cohort: Cohort,
    designs: Design,
    patients: Tensor,
    oracle: np.ndarray,
    seed: int,
    cost: OracleCost,
) -> tuple[Runs, str]:
    """Carry designs over to the patients; also says how it was set up, or nothing.

    Args:
        name: of the method.
        cohort: training patients.
        designs: the oracle's for them.
        patients: (M, 11) new patients.
        oracle: (M,) the oracle's rewards for these.
        seed: of the method.
        cost: what the oracle spends per training patient.
    """
    model = CountingModel(mechanistic())
    start, note = time.process_time(), ""
    if name == "one_size_fits_all":
        one = transfer.one_size_fits_all(cohort.features, designs, model, seed)
        setup = time.process_time() - start
        proposed = Design(*(part.expand(len(patients), *part.shape[1:]) for part in one.design))
    elif name == "nearest_patient":
        setup = 0.0
        proposed = transfer.nearest_patient(cohort.features, designs, patients)
    else:
        judged = transfer.cross_validated_rewards(cohort.features, designs, model, seed)
        family = max(judged, key=judged.get)
        learner = transfer.DesignRegression(family, seed).fit(cohort.features, designs)
        setup = time.process_time() - start
        proposed = learner.predict(patients)
        note = (
            f"Regression: {family}, the best of "
            + ", ".join(f"{key} ({value:.2f})" for key, value in judged.items())
            + " by mean reward in cross-validation on the training cohort."
        )
    overhead = (time.process_time() - start - setup) / len(patients)
    rewards = []
    for k, patient in enumerate(patients):
        objective = PatientObjective(patient, mechanistic(), 1)
        objective(transfer.design_rows(proposed, torch.tensor([k])))
        rewards.append(objective.trace)
    runs = Runs(
        np.array([1]),
        np.stack(rewards),
        oracle,
        np.array([overhead]),
        len(cohort) * cost.calls + model.calls,
        len(cohort) * cost.seconds + setup,
    )
    return runs, note


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
    lines += [
        "",
        "The transfer methods use the oracle's design for every patient of the training cohort; "
        "its calls are counted. " + " ".join(filter(None, table["note"].unique())),
        "",
        "## Median regret against calls per new patient",
        "",
    ]
    shown = [1, 10, 30, 100, 300, 1_000, 3_000, 10_000]
    lines += [
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


def draw(path: Path, table: pd.DataFrame) -> None:
    """Regret against calls, and beside it the methods that make one call."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    floor, ceiling = 0.01, 30.0
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(11, 5.5), width_ratios=[1, 2.6], layout="constrained"
    )
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
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


class OracleCost(NamedTuple):
    """What the oracle spends per patient."""

    calls: float
    seconds: float  # of one core
    overhead: float  # the part of it that is not the reward model


def oracle_cost(cohort: Cohort) -> OracleCost:
    """Measure the oracle's cost on a few patients."""
    count = min(NUM_TIMED, len(cohort))
    few = Cohort(
        cohort.patient_ids[:count], cohort.features[:count], cohort.extra[:count], cohort.name
    )
    model = CountingModel(mechanistic())
    start = time.process_time()
    best_designs(few, model)
    spent = time.process_time() - start
    return OracleCost(model.calls / count, spent / count, (spent - model.cpu_seconds) / count)


def check_libraries(names: Iterable[str]) -> None:
    """Import what the methods need.

    Raises:
        ValueError: a library is missing; the message says how to get it.
    """
    for name in names:
        library = METHODS[name].library
        try:
            if library:
                importlib.import_module(library)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"method {name} needs {library} ({error}): pip install -e '.[bench]'"
            ) from error


def limits(given: list[str], flag: str, default: Callable[[Method], int]) -> dict[str, int]:
    """A number per method, from `NUMBER` (at most so many for all) and `METHOD=NUMBER` (exactly).

    Raises:
        ValueError: an entry is neither.
    """
    numbers = {name: default(method) for name, method in METHODS.items()}
    for item in sorted(given, key=lambda entry: "=" in entry):
        name, _, number = item.rpartition("=")
        if not number.isdigit() or int(number) < 1 or (name and name not in METHODS):
            raise ValueError(
                f"{flag} {item}: expected NUMBER or METHOD=NUMBER, where NUMBER is at least 1 and "
                f"METHOD one of {', '.join(METHODS)}"
            )
        if name and METHODS[name].budget == 1 and flag == "--budget":
            raise ValueError(f"{flag} {item}: {name} makes one call")
        for key in [name] if name else METHODS:
            numbers[key] = int(number) if name else min(numbers[key], int(number))
    return numbers


def run(args: argparse.Namespace) -> str:
    """Run the methods and write the table, the picture and the report, which is returned.

    Raises:
        ValueError: the request cannot be carried out; raised before any search.
    """
    budgets = limits(args.budget, "--budget", lambda method: method.budget)
    counts = limits(args.patients, "--patients", lambda method: method.patients)
    if args.processes < 1 or args.seed < 0:
        raise ValueError(
            f"--processes is {args.processes} and --seed {args.seed}; allowed: at least 1 and 0"
        )
    # The policies' rows are always made, so that no row of another policy stays.
    chosen = [name for name in METHODS if METHODS[name].kind == "policy" or name in args.methods]
    holdout = load_cohort("holdout")
    if (most := max(counts[name] for name in chosen)) > len(holdout):
        raise ValueError(f"--patients asks for {most}; the held-out cohort has {len(holdout)}")
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
    draw(args.output_dir / "regret.png", table)
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
        "--patients",
        nargs="+",
        default=[],
        metavar="[METHOD=]NUMBER",
        help="held-out patients: at most so many for all methods, or so many for one "
        "(default 100; tpe 50; botorch 20)",
    )
    parser.add_argument(
        "--budget",
        nargs="+",
        default=[],
        metavar="[METHOD=]NUMBER",
        help="reward calls per patient, likewise "
        "(default 10,000; policy_best_of_k and tpe 1,000; botorch 150)",
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
