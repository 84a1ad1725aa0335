"""One HTML page about a run, or about several beside each other; opens from disk, needs no network.

    python train/report.py runs/quick-s1                    # writes runs/quick-s1/report.html
    python train/report.py runs/quick-s1 runs/quick-s2      # writes runs/comparison.html

The page of one run shows what was run, its learning curves, which designs the policy chooses for
the patients it was trained on, and each of those patients. A run directory that lacks files, that
is still being written or that was interrupted gives a page that says what it cannot show.
Runs that differ by nothing but the seed are one group of a comparison, shown as mean ± standard
deviation.
`report.html`, beside this file, is the page as a Jinja template with its style and its script.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import html
import io
import itertools
import json
import math
import os
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import itables
import jinja2
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import ppo_hybrid
import torch
import tyro
from itables.javascript import generate_init_offline_itables_html
from plotly.offline import get_plotlyjs
from ppo_hybrid import UsageError
from torch import Tensor

import hydrogel_gym
from hydrogel_gym.files import write_atomically
from hydrogel_gym.oracle import cached_best_designs
from hydrogel_gym.problem.fields import (
    COVERAGE_FRACTIONS,
    COVERAGES,
    FORMULATION_FIELDS,
    PATIENT_FIELDS,
    Outcomes,
)
from hydrogel_gym.problem.polymers import NUM_POLYMERS
from hydrogel_gym.problem.reward import RewardTerms

CONFIG_FILE = "config.json"
# What the page computes with, of both JSON files; all else is only printed.
KINDS = dict(num_iterations=int, horizon=int, env_id=str, iterations=int, versions=dict)
TEMPLATE = Path(__file__).with_name("report.html")

# Of each run of a comparison; the rest are told of its group.
RUN_FIGURES = ("holdout_deterministic_reward", "holdout_fraction_of_oracle", "samples")

SLICE_POINTS = 33  # along each parameter of the formulation, both bounds included
# A page with all of a large cohort would not open on a phone; distributions are of all patients.
PATIENTS_SHOWN = 5000
# Another processor rounds otherwise, and may tip the choice of a polymer for a few patients.
SAME_REWARD = 0.05

# What may differ between runs of one group.
NOT_COMPARED = {"seed", "oracle", *ppo_hybrid.MAY_CHANGE} - {"cohort", "holdout_cohort"}

# [Okabe2008] Okabe, Ito. Color universal design: told apart by the colour-blind.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = (
    "#000000 #E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7".split()
)
GREY = "#8C8C8C"
CYCLE = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK, GREY)
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")

REWARD = "mean reward (dimensionless)"
FRACTION = "mean / mean best reward"
SAMPLES = "samples (one design for one patient)"
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
    "entropy": ("entropy of the policy, nats", 1, 2, ""),
    "samples": ("samples", 1, 0, ""),
    "wall_seconds": ("training time, s", 1, 0, ""),
}


@dataclass
class Args:
    """Write one self-contained HTML page about a run, or one that compares several."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """run directories that the trainer wrote; more than one are compared"""
    output: Path | None = None
    """file to write; default report.html in the run directory, or comparison.html in the folder
    that holds all of them"""


class Policy(NamedTuple):
    """A policy, and where it was found."""

    agent: ppo_hybrid.Agent
    config: dict[str, Any]
    origin: str


@dataclass
class Run:
    """What could be read of a run directory; whatever is empty is named in `gaps`."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    metrics: pd.DataFrame = field(default_factory=pd.DataFrame)
    summary: dict[str, Any] = field(default_factory=dict)
    policy: Policy | None = None
    patients_digest: str | None = None
    gaps: list[str] = field(default_factory=list)
    policy_gaps: list[str] = field(default_factory=list)  # of no concern where no patient is shown

    def __post_init__(self) -> None:
        self.name = self.path.resolve().name

    @property
    def is_finished(self) -> bool:
        """Whether all iterations that were asked for are done."""
        return bool(self.summary) and not self.summary.get("interrupted")


class Slices(NamedTuple):
    """Rewards of the designs next to the chosen ones, (P, N).

    The columns are `SLICE_POINTS` along each of the four parameters from bound to bound, then each
    polymer, then each coverage; all else is as in the chosen design.
    """

    reward: np.ndarray
    is_unsafe: np.ndarray  # breaks a safety limit


class Patients(NamedTuple):
    """The deterministic policy's design for each of P patients; arrays have P rows."""

    cohort: hydrogel_gym.Cohort
    config: hydrogel_gym.RewardConfig
    polymer_id: np.ndarray
    formulation: np.ndarray  # (P, 4)
    coverage: np.ndarray
    reward: np.ndarray
    told: dict[str, np.ndarray]  # outcomes and terms of the reward, by name
    best: np.ndarray | None  # largest possible reward
    slices: Slices

    @property
    def features(self) -> dict[str, np.ndarray]:
        """Columns of the cohort by name."""
        columns = self.cohort.features.numpy().T
        return {item.name: column for item, column in zip(PATIENT_FIELDS, columns, strict=True)}

    @property
    def regret(self) -> np.ndarray:
        """How much better the best possible design is; where that was searched for."""
        # A design may beat the best that two searches found, by their precision.
        return np.maximum(self.best - self.reward, 0.0)

    @property
    def margins(self) -> dict[str, np.ndarray]:
        """Distance to each safety limit, negative where it is broken."""
        number = self.told["toxicity_risk"].dtype.type  # a limit is compared as rounded to it
        return {
            "toxicity": number(self.config.toxicity_limit) - self.told["toxicity_risk"],
            "integrity": self.told["structural_integrity"] - number(self.config.integrity_limit),
            "fibrosis": number(self.config.fibrosis_limit) - self.told["fibrosis_risk"],
        }


class Plot(NamedTuple):
    """A figure of the page."""

    name: str
    title: str
    caption: str
    figure: go.Figure


class Table(NamedTuple):
    """A small table of the page; the first cell of a row is its heading."""

    title: str
    header: list[str]
    rows: list[list[str]]


class Section(NamedTuple):
    """A part of the page under a heading."""

    name: str
    title: str
    texts: list[str]
    plots: list[Plot]
    tables: list[Table]
    legend: list[tuple[str, str]] = []  # label and colour, of all its plots


# Reading a run directory.


def read_run(path: Path) -> Run:
    """Read whatever a run directory holds.

    Raises:
        UsageError: it is no directory, or holds nothing of a run.
    """
    if not path.is_dir():
        raise UsageError(f"{path} is not a directory")
    if not any((path / name).exists() for name in (*ppo_hybrid.RUN_FILES, ppo_hybrid.CHECKPOINTS)):
        raise UsageError(f"{path} holds nothing of a run ({ppo_hybrid.METRICS_FILE} and others)")
    run = Run(path)
    run.metrics = read_metrics(path / ppo_hybrid.METRICS_FILE, run.gaps)
    run.config = read_json(path / CONFIG_FILE, run.gaps)
    checkpoint = read_newest_checkpoint(path, run.gaps)
    done = int(run.metrics["iteration"].max()) if len(run.metrics) else None
    read_status(run, done)
    read_policy(run, checkpoint)
    if checkpoint:
        run.patients_digest = checkpoint["run"].get("patients of the train cohort")
    if not run.config and run.policy:
        run.config = run.policy.config
        run.gaps.append(f"The configuration shown is the one kept in {run.policy.origin}.")
    return run


def read_json(path: Path, gaps: list[str]) -> dict[str, Any]:
    """A JSON object; empty, with a sentence in `gaps`, where there is none.

    A value that is of no use where it is needed is left out, and named there too.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not an object")
    except FileNotFoundError:
        gaps.append(f"{path.name} is missing.")
    except (OSError, ValueError) as error:  # ValueError: neither JSON nor UTF-8
        gaps.append(f"{path.name} cannot be read: {ppo_hybrid.reason(error)}.")
    else:
        useless = [name for name, value in content.items() if not is_of_use(name, value)]
        if useless:
            gaps.append(f"{path.name} has no usable value of {', '.join(useless)}.")
        return {name: value for name, value in content.items() if name not in useless}
    return {}


def is_of_use(name: str, value: Any) -> bool:
    """Whether a value is of the kind that its name promises; None is a value not had."""
    if name == "polymer_share":
        return isinstance(value, dict) and all(isinstance(x, int | float) for x in value.values())
    kind = int | float if name in FINAL_FIGURES else KINDS.get(name, object)
    return value is None or isinstance(value, kind)


def read_metrics(path: Path, gaps: list[str]) -> pd.DataFrame:
    """The rows of `metrics.csv` up to the first that is not whole; a blank cell is NaN."""
    try:
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise ValueError("it is empty")
        header, *lines = csv.reader(io.StringIO(text))
        if header.count("iteration") != 1 or header.count("global_step") != 1:
            raise ValueError("it lacks the columns iteration and global_step")
        if len(set(header)) < len(header):
            raise ValueError("two of its columns have one name")
    except FileNotFoundError:
        gaps.append(f"{path.name} is missing, so that there are no learning curves.")
        return pd.DataFrame()
    except (OSError, ValueError, csv.Error) as error:
        why = ppo_hybrid.reason(error)
        gaps.append(f"{path.name} cannot be read, so that there are no learning curves: {why}.")
        return pd.DataFrame()
    order = [header.index(name) for name in ("iteration", "global_step")]
    rows: list[list[float]] = []
    # A row that is cut off within its last number looks whole, but for the end of its line.
    for cells in lines if text.endswith("\n") else lines[:-1]:
        try:
            numbers = [float(cell) if cell else math.nan for cell in cells]
        except ValueError:
            break
        # Not `<=`: what is not a number is not in order either.
        if len(numbers) != len(header) or not all(
            (rows[-1][i] if rows else -1.0) < numbers[i] < math.inf for i in order
        ):
            break
        rows.append(numbers)
    if len(rows) < len(lines) or not rows:
        gaps.append(f"{path.name} is cut off or damaged after row {len(rows)}.")
    return pd.DataFrame(rows, columns=header, dtype=float)


def read_newest_checkpoint(path: Path, gaps: list[str]) -> dict[str, Any] | None:
    """The newest whole checkpoint of a run directory, if it has one."""
    try:
        sealed = ppo_hybrid.newest_checkpoint(path)
    except UsageError:
        gaps.append(f"None of its {ppo_hybrid.CHECKPOINTS} is whole.")
        return None
    return sealed and ppo_hybrid.unseal(sealed)


def read_status(run: Run, done: int | None) -> None:
    """Read `summary.json`, and say of a run that is not finished how far it got.

    Args:
        run: to complete.
        done: iterations in its metrics, if known.
    """
    asked = run.config.get("num_iterations")
    so_far = (
        "" if done is None else f" after {done:,}{f' of {asked:,}' if asked else ''} iterations"
    )
    path = run.path / ppo_hybrid.SUMMARY_FILE
    if not path.exists():
        run.gaps.append(f"{path.name} is missing: the run is still running, or was killed{so_far}.")
        return
    run.summary = read_json(path, run.gaps)
    summarised = run.summary.get("iterations")
    if run.summary and done and summarised and summarised < done:
        # A run that goes on leaves the summary and the policy of its interruption until it ends.
        run.summary = {}
        run.gaps.append(
            f"{path.name} is of iteration {summarised:,}, and the run went on: it is still "
            f"running, or was killed{so_far}."
        )
    elif run.summary.get("interrupted"):
        run.gaps.append(f"The run was interrupted{so_far}.")


def read_policy(run: Run, checkpoint: dict[str, Any] | None) -> None:
    """The policy that a finished run saved, or else that of its newest checkpoint."""
    path = run.path / ppo_hybrid.POLICY_FILE
    if run.summary or not checkpoint:
        try:
            agent, saved = ppo_hybrid.load_policy(path, "cpu")
            run.policy = Policy(agent, saved["training_config"], path.name)
            return
        except UsageError as error:
            run.policy_gaps.append(f"{str(error)[0].upper()}{str(error)[1:]}.")
    if not checkpoint:
        run.policy_gaps.append(
            "There is no checkpoint either, so that nothing is shown of patients."
        )
        return
    iteration = checkpoint["iteration"]
    try:
        agent = ppo_hybrid.Agent(**checkpoint["architecture"])
        agent.load_state_dict(checkpoint["policy_state_dict"])
    except (RuntimeError, TypeError, KeyError) as error:
        run.policy_gaps.append(
            f"The newest checkpoint is of another version: {ppo_hybrid.reason(error)}."
        )
        return
    origin = f"{ppo_hybrid.CHECKPOINTS}/{ppo_hybrid.checkpoint_name(iteration)}"
    run.policy = Policy(agent, checkpoint["args"], origin)
    run.policy_gaps.append(
        f"The designs are those of the policy at iteration {iteration:,} ({origin})."
    )


# What the policy does for its patients.


@torch.no_grad()
def design_patients(run: Run) -> Patients:
    """Design for every patient that a run was trained on.

    Raises:
        UsageError: the patients cannot be had again, or are not those of the run.
    """
    assert run.policy
    known = {item.name for item in dataclasses.fields(ppo_hybrid.Args)}
    values = {name: value for name, value in run.config.items() if name in known}
    try:
        args = ppo_hybrid.Args(**values)
        cohort = hydrogel_gym.load_cohort(args.cohort)
    except (hydrogel_gym.CohortError, TypeError) as error:
        raise UsageError(ppo_hybrid.reason(error)) from error
    device = torch.device("cpu")
    if run.patients_digest not in (None, ppo_hybrid.digest(cohort)):
        raise UsageError(f"{cohort.name} holds other patients than the run was trained on")
    try:
        with ppo_hybrid.fast_float32(device):
            envs = ppo_hybrid.make_envs(args, cohort, device)
            told = ppo_hybrid.policy_designs(run.policy.agent, envs)
        problem = envs.unwrapped.problem
        design = {name: told.pop(name) for name in ("polymer_id", "formulation", "coverage")}
        slices = slices_of(problem, design)
        best = cached_best_designs(
            cohort,
            problem.reward_model,
            problem.params.reward_config,
            cache_dir=run.path.resolve().parent / "oracle",
        )
    except Exception as error:  # the environment and its outcome model may be anybody's
        raise UsageError(f"{args.env_id} cannot judge them: {ppo_hybrid.reason(error)}") from error
    reward = told.pop("reward").numpy().astype(float)
    recorded = run.summary.get("train_deterministic_reward")
    if recorded is not None and args.horizon == 1 and abs(reward.mean() - recorded) > SAME_REWARD:
        raise UsageError(
            f"their designs earn {reward.mean():.2f} on average and earned {recorded:.2f} in the "
            "run: patients, outcome model or package are others now"
        )
    return Patients(
        cohort,
        problem.params.reward_config,
        **{name: value.numpy() for name, value in design.items()},
        reward=reward,
        told={name: value.numpy() for name, value in told.items()},
        best=None if best is None else best.score.numpy().astype(float),
        slices=slices,
    )


@torch.no_grad()
def slices_of(problem: Any, design: dict[str, Tensor], at_once: int = 1000) -> Slices:
    """Rewards along every part of each patient's design.

    Args:
        problem: cohort, outcome model and reward.
        design: of P patients.
        at_once: patients in one call of the outcome model.
    """
    patients, config = problem.params.patients, problem.params.reward_config
    chunks = []
    for start in range(0, len(patients), at_once):
        rows = slice(start, start + at_once)
        polymer_id, formulation, coverage = neighbours(
            *(design[name][rows] for name in ("polymer_id", "formulation", "coverage"))
        )
        shape = polymer_id.shape
        outcomes = problem.reward_model(
            patients[rows].unsqueeze(1).expand(*shape, -1).flatten(0, 1),
            polymer_id.flatten(),
            formulation.flatten(0, 1).to(patients.dtype),
            coverage.flatten(),
        )
        is_unsafe = (
            (outcomes.toxicity_risk > config.toxicity_limit)
            | (outcomes.structural_integrity < config.integrity_limit)
            | (outcomes.fibrosis_risk > config.fibrosis_limit)
        )
        reward = hydrogel_gym.compute_reward(outcomes, config=config)
        chunks.append([x.view(shape).numpy() for x in (reward.double(), is_unsafe)])
    return Slices(*map(np.concatenate, zip(*chunks, strict=True)))


def neighbours(
    polymer_id: Tensor, formulation: Tensor, coverage: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Designs that differ from given ones in one part, in the order of `Slices`.

    Args:
        polymer_id: (P,).
        formulation: (P, 4).
        coverage: (P,).

    Returns:
        (P, N), (P, N, 4) and (P, N).
    """
    num_along = SLICE_POINTS * len(FORMULATION_FIELDS)
    num_designs = num_along + NUM_POLYMERS + len(COVERAGES)
    polymers = polymer_id.unsqueeze(1).repeat(1, num_designs)
    formulations = formulation.unsqueeze(1).repeat(1, num_designs, 1)
    coverages = coverage.unsqueeze(1).repeat(1, num_designs)
    for column, item in enumerate(FORMULATION_FIELDS):
        along = slice(column * SLICE_POINTS, (column + 1) * SLICE_POINTS)
        formulations[:, along, column] = torch.linspace(
            item.low, item.high, SLICE_POINTS, dtype=formulation.dtype
        )
    polymers[:, num_along : num_along + NUM_POLYMERS] = torch.arange(NUM_POLYMERS)
    coverages[:, num_along + NUM_POLYMERS :] = torch.arange(len(COVERAGES))
    return polymers, formulations, coverages


# Figures.


def new_figure(x: str, y: str, **layout: Any) -> go.Figure:
    """An empty figure with titles on its axes, each with its unit."""
    axis = dict(
        automargin=True, gridcolor="#E3E3E3", zeroline=False, linecolor="#444", ticks="outside"
    )
    base = dict(
        template="none",
        font=dict(family="system-ui, sans-serif", size=12, color="#222"),
        height=340,
        margin=dict(l=56, r=12, t=12, b=48),
        xaxis=dict(title=dict(text=x), **axis),
        yaxis=dict(title=dict(text=y), **axis),
        legend=dict(orientation="h", x=0, yref="container", y=0, yanchor="bottom"),
        hoverlabel=dict(namelength=-1),
    )
    return go.Figure(layout=base | layout)


def has(table: pd.DataFrame, *names: str) -> bool:
    """Whether all columns are there, with a number in each."""
    return all(name in table and table[name].notna().any() for name in names)


def line(table: pd.DataFrame, name: str, label: str, color: str, **options: Any) -> go.Scatter:
    """A column of the metrics against samples."""
    style = {"color": color, "width": 2} | options.pop("style", {})
    return go.Scatter(
        x=table["global_step"], y=table[name], name=label, mode="lines", line=style, **options
    )


def log_samples(figure: go.Figure) -> None:
    """Space samples by their logarithm, so that the source's many leave room for few."""
    figure.update_xaxes(type="log", exponentformat="SI", dtick=1)


def log_regret(figure: go.Figure) -> None:
    """Space regret by its logarithm."""
    # Plotly's own ticks between powers of ten are bare digits: "2" for 20.
    ticks = [digit * 10.0**power for power in range(-5, 4) for digit in (1, 2, 5)]
    figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])


def source_curve() -> go.Scatter:
    """The source's table, of another reward model."""
    source = {
        k * ppo_hybrid.SOURCE_SAMPLES_PER_ITERATION: v
        for k, v in ppo_hybrid.SOURCE_MEAN_REWARD.items()
        if k
    }
    return go.Scatter(
        x=list(source),
        y=list(source.values()),
        name="source (another reward model)",
        mode="lines+markers",
        line=dict(color=BLACK, dash="dot", width=1),
    )


def beside_the_source(run: Run) -> Table:
    """The source's mean rewards, and this run's after as many samples."""
    table = run.metrics
    names = ("mean_reward", "train_deterministic_reward", "holdout_deterministic_reward")

    def shown(row: pd.Series, name: str) -> str:
        value = row.get(name, math.nan)
        return "–" if math.isnan(value) else f"{value:.1f}"

    rows = []
    for iteration, reward in ppo_hybrid.SOURCE_MEAN_REWARD.items():
        samples = iteration * ppo_hybrid.SOURCE_SAMPLES_PER_ITERATION
        reached = table[table["global_step"] >= samples]
        if not len(reached):
            cells = ["not reached"] * 3
        elif iteration == 0:
            # The first rollout is of the policy before any update, as is the source's row 0; what
            # is deterministic is measured after updates.
            cells = [shown(reached.iloc[0], "mean_reward"), "–", "–"]
        else:
            cells = [shown(reached.iloc[0], name) for name in names]
        rows.append([f"{iteration}", f"{samples / 1e6:g} M", f"{reward:.1f}", *cells])
    last = table.iloc[-1]
    cells = [shown(last, name) for name in names]
    rows.append(["this run's end", f"{last['global_step'] / 1e6:g} M", "–", *cells])
    header = [
        "iteration of the source",
        "samples",
        "source, mean reward",
        "this run, sampled",
        "deterministic, training",
        "deterministic, held out",
    ]
    return Table("Mean reward after as many samples as the source took", header, rows)


def learning_section(run: Run) -> Section | None:
    """Learning curves beside the source's table, and how far from the best possible."""
    table = run.metrics
    if table.empty:
        return None
    plots = []
    curves = {
        "mean_reward": ("sampled, training", GREY, "solid"),
        "train_deterministic_reward": ("deterministic, training", BLUE, "solid"),
        "holdout_deterministic_reward": ("deterministic, held out", VERMILLION, "dash"),
    }
    curves = {name: look for name, look in curves.items() if has(table, name)}
    if curves:
        figure = new_figure(SAMPLES, REWARD, height=400)
        log_samples(figure)
        for name, (label, color, dash) in curves.items():
            figure.add_trace(line(table, name, label, color, style=dict(dash=dash)))
        figure.add_trace(source_curve())
        caption = (
            "Dotted: the source's own table. Its reward model is another one, which is not "
            "public, so that only the shape of the curves and their cost can be compared. Its "
            "first value, before any sample, is in the table only."
        )
        plots.append(Plot("learning", "Learning curves", caption, figure))
    for key, title, axis, caption in (
        (
            "fraction_of_oracle",
            "Fraction of the oracle",
            FRACTION,
            "The oracle searches every patient's whole design space; 1 is the best possible.",
        ),
        (
            "regret",
            "Regret",
            "regret (reward)",
            "Best possible reward less the policy's: mean over the patients and, thin, 95th "
            "percentile.",
        ),
    ):
        figure = new_figure(SAMPLES, axis, height=400)
        for cohort, label, color, dash in (
            ("train", "training", BLUE, "solid"),
            ("holdout", "held out", VERMILLION, "dash"),
        ):
            for suffix, width, end in (("", 2, ""), ("_p95", 1, ", 95th percentile")):
                name = f"{cohort}_{key}{suffix}"
                if has(table, name):
                    style = dict(dash=dash, width=width)
                    figure.add_trace(line(table, name, label + end, color, style=style))
        if figure.data:
            if key == "regret":
                log_regret(figure)
            plots.append(Plot(key, title, caption, figure))
        else:
            run.gaps.append(f"{title}: not recorded, as of a run without an oracle, and left out.")
    return Section("learning-curves", "Learning", [], plots, [beside_the_source(run)])


def terms_section(run: Run) -> Section | None:
    """What the reward is made of, by iteration."""
    table = run.metrics
    names = [name for name in RewardTerms._fields if has(table, name)]
    if not names:
        if len(table):
            run.gaps.append("Terms of the reward are not in metrics.csv, and left out.")
        return None
    plots = []
    # The first term is ten times as large as the others.
    for title, part in (
        ("The term of the ejection fraction, and the sum", names[:1]),
        ("The other terms", names[1:]),
    ):
        figure = new_figure(SAMPLES, "reward (dimensionless)", height=400)
        if part == names[:1] and has(table, "mean_reward"):
            style = dict(dash="dot")
            figure.add_trace(line(table, "mean_reward", "sum: mean reward", BLACK, style=style))
        for i, name in enumerate(part):
            style = dict(dash=DASHES[i % len(DASHES)])
            figure.add_trace(line(table, name, TERM_LABELS[name], CYCLE[i], style=style))
        caption = "Means over the rollout, whose designs are sampled from the policy."
        plots.append(Plot(f"terms-{len(plots)}", title, caption, figure))
    breaches = [f"{name}_breach_rate" for name in ppo_hybrid.SAFETY_LIMITS]
    breaches = [name for name in breaches if has(table, name)]
    if breaches:
        figure = new_figure(SAMPLES, "designs over the limit, %")
        for i, name in enumerate(breaches):
            scaled = table.assign(**{name: 100 * table[name]})
            style = dict(dash=DASHES[i])
            label = name.removesuffix("_breach_rate")
            figure.add_trace(line(scaled, name, label, CYCLE[i], style=style))
        caption = "Share of the rollout's designs that break each safety limit."
        plots.append(Plot("breaches", "Safety limits broken while learning", caption, figure))
    return Section("reward-terms", "Reward terms over time", [], plots, [])


def share_bars(shares: dict[str, dict[str, float]], colors: list[str]) -> go.Figure:
    """Horizontal bars of the share of each polymer, %, beside the source's.

    Args:
        shares: by label, then by polymer.
        colors: of the labels.
    """
    shares = shares | {"source (another reward model)": ppo_hybrid.SOURCE_POLYMER_SHARE}
    names = hydrogel_gym.load_polymers().names
    table = pd.DataFrame(shares, index=names).fillna(0.0)
    table = table[(table >= 5e-4).any(axis=1)].sort_values(list(shares), ascending=False)
    height = 160 + len(table) * (5 + 7 * len(shares))
    figure = new_figure("share of designs, %", "", height=height, bargap=0.25, barmode="group")
    for label, color in zip(shares, [*colors, GREY], strict=True):
        figure.add_trace(
            go.Bar(
                y=list(table.index),
                x=100 * table[label],
                name=html.escape(label),
                orientation="h",
                marker=dict(color=color),
            )
        )
    # Bars are laid from the bottom up, and read, as their legend is, from the top down.
    return figure.update_yaxes(autorange="reversed")


def tertile_map(values: np.ndarray, polymer_id: np.ndarray, axis: str) -> go.Figure:
    """Share of each polymer within the lower, middle and upper third of a feature, %."""
    names = hydrogel_gym.load_polymers().names
    edges = np.quantile(values, [0.0, 1 / 3, 2 / 3, 1.0])
    third = np.searchsorted(edges[1:-1], values, side="right")
    count = np.zeros((NUM_POLYMERS, 3))
    np.add.at(count, (polymer_id, third), 1)
    share = 100 * count / np.maximum(count.sum(0), 1)
    chosen = [i for i in np.argsort(count.sum(1), kind="stable") if count[i].sum()]

    def short(value: float) -> str:
        return f"{value:.2f}" if abs(value) < 1 else f"{value:.3g}"

    labels = [
        f"{part}<br>{short(low)} to {short(high)}"
        for part, low, high in zip(("low", "middle", "high"), edges, edges[1:], strict=False)
    ]
    # Wrapped, since beside the names of polymers a phone has room for little.
    axis = "<br>".join(textwrap.wrap(axis, 30))
    figure = new_figure(axis, "", height=120 + 24 * len(chosen))
    figure.add_trace(
        go.Heatmap(
            x=labels,
            y=[names[i] for i in chosen],
            z=share[chosen],
            colorscale="Cividis",
            zmin=0,
            texttemplate="%{z:.0f}",
            showscale=False,
            hovertemplate="%{y}, %{x}: %{z:.1f} %<extra></extra>",
        )
    )
    figure.update_yaxes(showgrid=False)
    return figure.update_xaxes(showgrid=False, tickangle=0, tickfont=dict(size=10))


def polymer_section(run: Run, patients: Patients | None) -> Section | None:
    """Which polymers the policy chooses, and for whom."""
    shares, plots = {}, []
    if patients:
        names = hydrogel_gym.load_polymers().names
        count = np.bincount(patients.polymer_id, minlength=NUM_POLYMERS) / len(patients.cohort)
        shares["deterministic, one design per patient"] = dict(zip(names, count, strict=True))
    if sampled := run.summary.get("polymer_share"):
        shares["sampled designs"] = sampled
    if not shares:
        return None
    named = ppo_hybrid.SOURCE_POLYMER_SHARE
    caption = (
        "Polymers with less than 0.05 % of all designs are left out. The source names "
        f"{len(named)}; its {NUM_POLYMERS - len(named)} others have "
        f"{100 * (1 - sum(named.values())):.1f} % in all."
    )
    figure = share_bars(shares, [BLUE, VERMILLION][: len(shares)])
    plots.append(Plot("polymers", "Overall, beside the source", caption, figure))
    if patients:
        for name, title in (
            ("scar_fraction_pct", "Against scar size"),
            ("bz_fraction_pct", "Against the border zone"),
            ("transmurality", "Against transmurality"),
        ):
            axis = next(item.meaning for item in PATIENT_FIELDS if item.name == name)
            figure = tertile_map(patients.features[name], patients.polymer_id, axis)
            caption = "Share of each third of the patients that gets a polymer, %."
            plots.append(Plot(f"by-{name}", title, caption, figure))
    return Section("polymers", "Polymer selection", [], plots, [])


def formulation_section(patients: Patients) -> Section:
    """Distribution of the formulation over the patients, by polymer."""
    names = hydrogel_gym.load_polymers().names
    count = np.bincount(patients.polymer_id, minlength=NUM_POLYMERS)
    common = [i for i in np.argsort(-count, kind="stable")[:6] if count[i]]
    groups = [(names[i], patients.polymer_id == i) for i in common]
    others = ~np.isin(patients.polymer_id, common)
    if others.any():
        groups.append(("others", others))
    colors = [*CYCLE[: len(common)], GREY]
    plots = []
    for column, item in enumerate(FORMULATION_FIELDS):
        edges = np.linspace(item.low, item.high, 26)
        figure = new_figure(item.meaning, "patients", barmode="stack", bargap=0.05, height=280)
        for (name, rows), color in zip(groups, colors, strict=False):
            figure.add_trace(
                bars(patients.formulation[rows, column], edges, name=name, color=color)
            )
        figure.update_layout(showlegend=False, xaxis_range=[item.low, item.high])
        title = item.meaning.partition(",")[0].capitalize()
        plots.append(Plot(f"formulation-{column}", title, "", figure))
    legend = [(name, color) for (name, _), color in zip(groups, colors, strict=False)]
    share = np.bincount(patients.coverage, minlength=len(COVERAGES)) / len(patients.coverage)
    rows = [[label, f"{100 * x:.1f} %"] for label, x in zip(coverage_labels(), share, strict=True)]
    return Section(
        "formulations",
        "Formulations",
        ["Each axis spans the range of the design space. Colours tell the polymer."],
        plots,
        [Table("Coverage", ["covered", "patients"], rows)],
        legend,
    )


def bars(values: np.ndarray, edges: np.ndarray, *, name: str, color: str | list[str]) -> go.Bar:
    """A histogram, counted here so that the page need not carry the values."""
    counts, _ = np.histogram(values, edges)
    width = edges[1] - edges[0]
    return go.Bar(
        x=edges[:-1] + width / 2,
        y=counts,
        width=width * 0.95,
        name=name,
        marker=dict(color=color),
        hovertemplate="%{x:.3g}: %{y}",
    )


def safety_section(patients: Patients) -> Section:
    """How far the designs stay from each safety limit."""
    plots, rows = [], []
    config = patients.config
    limits = {
        "toxicity": (f"limit {config.toxicity_limit:g} less toxicity risk, 0 to 1", "≤"),
        "integrity": (f"structural integrity less limit {config.integrity_limit:g}, 0 to 1", "≥"),
        "fibrosis": (f"limit {config.fibrosis_limit:g} less fibrosis risk, 0 to 1", "≤"),
    }
    for name, margin in patients.margins.items():
        axis, sign = limits[name]
        size = max(np.ptp(np.append(margin, 0.0)), 1e-6) / 30
        # An edge at 0, so that no bar is of both kinds.
        edges = size * np.arange(
            math.floor(margin.min() / size), math.ceil(margin.max() / size) + 2
        )
        centres = edges[:-1] + size / 2
        colors = [BLUE if x > 0 else VERMILLION for x in centres]
        figure = new_figure(axis, "patients", height=280, showlegend=False)
        figure.add_trace(bars(margin, edges, name=name, color=colors))
        figure.add_vline(x=0, line=dict(color=BLACK, width=2, dash="dash"))
        broken = 100 * (margin < 0).mean()
        caption = f"{broken:.2f} % of the designs break this limit (left of the dashed line)."
        plots.append(Plot(f"margin-{name}", name.capitalize(), caption, figure))
        rows.append(
            [
                f"{name} {sign} {getattr(config, f'{name}_limit'):g}",
                f"{margin.min():.3f}",
                f"{np.quantile(margin, 0.05):.3f}",
                f"{np.median(margin):.3f}",
                f"{broken:.2f} %",
            ]
        )
    broken = 100 * (np.stack(list(patients.margins.values())) < 0).any(0).mean()
    header = ["limit", "smallest margin", "5th percentile", "median", "designs that break it"]
    text = f"{broken:.2f} % of the designs break a safety limit."
    return Section("safety", "Safety margins", [text], plots, [Table("Margins", header, rows)])


def regret_section(patients: Patients) -> Section | None:
    """How much better the best possible design of each patient is."""
    if patients.best is None:
        return None
    regret = patients.regret
    edges = np.linspace(0.0, max(np.quantile(regret, 0.99), 1e-3), 31)
    figure = new_figure("regret (reward)", "patients", height=280, showlegend=False)
    figure.add_trace(bars(np.minimum(regret, edges[-1]), edges, name="regret", color=BLUE))
    caption = (
        "Best possible reward less the policy's: "
        f"mean {regret.mean():.3f}, median {np.median(regret):.3f}, largest {regret.max():.2f}; "
        "the last bar holds all above the 99th percentile."
    )
    plot = Plot("regret-patients", "Regret over the patients", caption, figure)
    return Section("regret", "Distance to the best possible design", [], [plot], [])


# What the page is told of the patients.


def coverage_labels() -> list[str]:
    """Coverage levels in words."""
    return [
        f"scar and {100 * share:.0f} % of the border zone" if share else "scar only"
        for share in COVERAGE_FRACTIONS
    ]


def packed(values: np.ndarray, dtype: str) -> str:
    """An array as base64 of little-endian numbers, which a typed array reads."""
    return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode()


def shown_rows(num_patients: int) -> np.ndarray:
    """Rows of the patients that the page lists: all, or evenly spaced ones of a large cohort."""
    count = min(num_patients, PATIENTS_SHOWN)
    return np.arange(count) * num_patients // count


def patient_columns(patients: Patients) -> list[tuple[str, Any, int | None]]:
    """Columns of the patients' table: heading with its unit, values, decimals of numbers."""
    names = hydrogel_gym.load_polymers().names
    told, features = patients.told, patients.features
    requested = patients.formulation.T
    broken = np.stack([margin < 0 for margin in patients.margins.values()], -1)
    limits = [", ".join(itertools.compress(ppo_hybrid.SAFETY_LIMITS, row)) for row in broken]
    regret = [] if patients.best is None else [("regret", patients.regret, 2)]
    return [
        ("patient", np.array(patients.cohort.patient_ids, object), None),
        ("polymer", [names[i] for i in patients.polymer_id], None),
        ("covered border zone, %", 100 * np.array(COVERAGE_FRACTIONS)[patients.coverage], 0),
        ("stiffness, kPa", requested[0], 1),
        ("half-life, days", requested[1], 0),
        ("conductivity, S/m", requested[2], 3),
        ("thickness, mm", requested[3], 2),
        ("reward", patients.reward, 2),
        *regret,
        ("change in LVEF, points", told["delta_ef_pct"], 2),
        ("stress reduction, %", told["stress_reduction_pct"], 1),
        ("toxicity, 0–1", told["toxicity_risk"], 3),
        ("integrity, 0–1", told["structural_integrity"], 3),
        ("fibrosis, 0–1", told["fibrosis_risk"], 3),
        ("limits broken", [limit or "none" for limit in limits], None),
        ("LVEF, %", features["lvef_pct"], 1),
        ("scar, % of LV", features["scar_fraction_pct"], 1),
        ("border zone, % of LV", features["bz_fraction_pct"], 1),
        ("transmurality, 0–1", features["transmurality"], 2),
    ]


def table_html(patients: Patients) -> str:
    """The searchable table, with its library."""
    columns = patient_columns(patients)
    table = pd.DataFrame({heading: values for heading, values, _ in columns})
    table = table.iloc[shown_rows(len(table))].reset_index(drop=True)
    column_defs = []
    for i, (heading, _, decimals) in enumerate(columns):
        if decimals is not None:
            table[heading] = table[heading].astype(float).round(decimals)
            shown = f"type === 'display' ? value.toFixed({decimals}) : value"
            render = itables.JavascriptFunction(f"function(value, type) {{ return {shown}; }}")
            column_defs.append({"targets": i, "render": render})
    body = itables.to_html_datatable(
        table,
        connected=False,
        display_logo_when_loading=False,
        table_id="patient-table",
        classes="display compact nowrap",
        showIndex=False,
        allow_html=False,
        maxBytes=0,
        pageLength=10,
        columnDefs=column_defs,
    )
    return generate_init_offline_itables_html(itables.options.dt_bundle) + body


def patient_data(patients: Patients) -> dict[str, Any]:
    """What the page draws a chosen patient from."""
    rows = shown_rows(len(patients.cohort))
    reward = patients.slices.reward[rows]
    finite = np.isfinite(reward)
    largest = np.abs(reward[finite]).max(initial=0.0)
    step = max(0.01, largest / 32000.0)  # 16 bits, the lowest of which says "not a number"
    whole = np.where(finite, np.round(np.where(finite, reward, 0.0) / step), -32768)
    columns = dict(patients.features)
    columns |= {item.name: patients.formulation[:, i] for i, item in enumerate(FORMULATION_FIELDS)}
    columns |= {name: patients.told[name] for name in (*Outcomes._fields, *RewardTerms._fields)}
    columns |= {"polymer_id": patients.polymer_id, "coverage": patients.coverage}
    columns["reward"] = patients.reward
    if patients.best is not None:
        columns["best"] = patients.best
    config = patients.config
    return {
        "ids": [patients.cohort.patient_ids[i] for i in rows],
        "polymers": hydrogel_gym.load_polymers().names,
        "coverages": coverage_labels(),
        "coverageFractions": COVERAGE_FRACTIONS,
        "patientFields": [[item.name, item.meaning] for item in PATIENT_FIELDS],
        "parameters": [item._asdict() for item in FORMULATION_FIELDS],
        "outcomes": list(OUTCOME_LABELS.items()),
        "terms": list(TERM_LABELS.items()),
        "limits": {
            "toxicity_risk": ["≤", config.toxicity_limit],
            "structural_integrity": ["≥", config.integrity_limit],
            "fibrosis_risk": ["≤", config.fibrosis_limit],
        },
        "columns": {name: packed(value[rows], "<f4") for name, value in columns.items()},
        "points": SLICE_POINTS,
        "step": step,
        "slices": packed(whole, "<i2"),
        "unsafe": packed(np.packbits(patients.slices.is_unsafe[rows], axis=1), "u1"),
        # Titles and fonts of the figures that the page makes itself.
        "layout": new_figure("", "reward (dimensionless)", height=250).to_plotly_json()["layout"],
        "colors": {"line": BLUE, "unsafe": VERMILLION, "chosen": BLACK, "best": GREEN},
    }


# The pages.


def final_figure(name: str, value: float) -> str:
    """A figure of `summary.json` with its unit."""
    _, factor, decimals, unit = FINAL_FIGURES[name]
    return f"{factor * value:,.{decimals}f}{unit}"


def what_was_run(run: Run) -> Section:
    """Final figures, settings and versions."""
    tables = []
    figures = [
        [label, final_figure(name, run.summary[name])]
        for name, (label, *_) in FINAL_FIGURES.items()
        if run.summary.get(name) is not None
    ]
    if figures:
        tables.append(Table("Final figures", ["figure", "value"], figures))
    settings = [[name, "–" if x is None else str(x)] for name, x in run.config.items()]
    if settings:
        tables.append(Table("Settings", ["setting", "value"], settings))
    machine = {name: run.summary[name] for name in ("device", "threads") if name in run.summary}
    machine |= run.summary.get("versions", {})
    if machine:
        rows = [[name, str(value)] for name, value in machine.items()]
        tables.append(Table("Machine and versions", ["item", "value"], rows))
    return Section("what-was-run", "What was run", [], [], tables)


def about(runs: list[Run]) -> list[str]:
    """What a reader has to know before any figure."""
    own = sorted({str(run.config["cohort"]) for run in runs if run.config.get("cohort")})
    known = all(run.config for run in runs)
    texts = []
    if own:
        texts.append(f"Trained on the patients of {', '.join(own)}, a table given by the user.")
    if known and any(not run.config.get("cohort") for run in runs):
        texts.append(
            "The shipped patients are synthetic: drawn from published summary statistics; "
            "no row is a person."
        )
    model = " or ".join(sorted({outcome_model(run.config) for run in runs}))
    texts.append(f"Every outcome is predicted by {model}. Nothing here is clinical advice.")
    return texts


def outcome_model(config: dict[str, Any]) -> str:
    """What predicted the outcomes of a run, in words."""
    env_id, reward_model = config.get("env_id"), config.get("reward_model")
    if env_id is None:
        return "an outcome model that is not named"
    if reward_model not in (None, ppo_hybrid.BUILT_IN):
        return (
            f"the outcome model {reward_model}, whose mistakes the policy may have learned to use"
        )
    if env_id == "HydrogelDesign-v0":
        return "the built-in outcome model, an educational prior that was fitted to no patient"
    return f"the outcome model of {env_id}"


def report(run: Run) -> bytes:
    """The page of one run."""
    patients = None
    run.gaps += run.policy_gaps
    if run.policy and run.config:
        try:
            patients = design_patients(run)
        except UsageError as error:
            run.gaps.append(f"Nothing is shown of patients: {error}.")
    if run.policy and not run.config:
        run.gaps.append("Nothing is shown of patients, since the settings of the run are unknown.")
    sections = [what_was_run(run), learning_section(run), terms_section(run)]
    sections.append(polymer_section(run, patients))
    if patients:
        sections += [formulation_section(patients), safety_section(patients)]
        sections.append(regret_section(patients))
        if patients.best is None:
            run.gaps.append(
                "The best possible reward of each patient is not in the folder oracle beside the "
                "run, or is of another version; regret by patient is left out."
            )
    horizon = run.config.get("horizon", 1)
    notes = []
    if patients:
        notes.append(
            f"Designs of the deterministic policy ({run.policy.origin}): likeliest polymer and "
            "coverage, median formulation"
            + (f"; the first of the {horizon} of an episode." if horizon > 1 else ".")
        )
        if len(patients.cohort) > PATIENTS_SHOWN:
            notes.append(
                f"Listed are {PATIENTS_SHOWN:,} of the {len(patients.cohort):,} patients, evenly "
                "spaced; all distributions above are of all of them."
            )
    return page(
        title=f"Run {run.name}",
        gaps=run.gaps,
        about=about([run]),
        cards=cards(run),
        sections=[section for section in sections if section],
        patients=patients,
        notes=notes,
    )


def cards(run: Run) -> list[tuple[str, str]]:
    """The figures at the top of a page, with what each is."""
    wanted = {
        "holdout_deterministic_reward": "mean reward, held-out patients",
        "holdout_fraction_of_oracle": "of the best possible, held out",
        "holdout_deterministic_limit_breach_rate": "designs that break a limit, held out",
        "samples": "samples",
        "wall_seconds": "seconds of training",
    }
    last = run.metrics.iloc[-1].to_dict() if len(run.metrics) else {}
    figures = run.summary or last | {"samples": last.get("global_step")}
    return [
        (final_figure(name, figures[name]), label)
        for name, label in wanted.items()
        if figures.get(name) is not None and math.isfinite(figures[name])
    ]


def page(**content: Any) -> bytes:
    """Fill the template; everything that is not a library is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plots = {plot.name: plot.figure for section in content["sections"] for plot in section.plots}
    patients = content.pop("patients")
    text = environment.get_template(TEMPLATE.name).render(
        **content,
        # Plotly's own JSON: NaN becomes null, arrays are packed.
        plots={name: json.loads(figure.to_json()) for name, figure in plots.items()},
        patients=patient_data(patients) if patients else None,
        table=table_html(patients) if patients else "",
        plotly=get_plotlyjs(),
        version=hydrogel_gym.__version__,
    )
    return text.encode()


# Several runs.


class Group(NamedTuple):
    """Runs with one configuration but for the seed."""

    label: str
    runs: list[Run]
    color: str

    @property
    def finished(self) -> list[Run]:
        """Those whose final figures count."""
        return [run for run in self.runs if run.is_finished]


def group_runs(runs: list[Run]) -> list[Group]:
    """Put runs together that differ by nothing but the seed, and name what they differ by.

    A run whose settings are unknown is a group of its own.
    """
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        settings = {k: v for k, v in run.config.items() if k not in NOT_COMPARED}
        key = json.dumps(settings, sort_keys=True, default=str) if settings else str(run.path)
        by_settings.setdefault(key, []).append(run)
    groups = list(by_settings.values())
    differing = differing_settings([group[0] for group in groups])
    # A preset stands for many settings.
    naming = differing if len(differing) <= 3 else ["preset"]
    labels = []
    for first, *others in groups:
        parts = [f"{name} {first.config[name]}" for name in naming if name in first.config]
        more = f" and {len(others)} more" if others else ""
        labels.append(", ".join(parts) or first.name + more)
    if len(set(labels)) < len(labels):
        labels = [f"{first.name} and {len(o)} more" if o else first.name for first, *o in groups]
    return [
        Group(label, group, CYCLE[i % len(CYCLE)])
        for i, (label, group) in enumerate(zip(labels, groups, strict=True))
    ]


def differing_settings(runs: list[Run]) -> list[str]:
    """Settings, but for those that groups ignore, that are not the same in all runs."""
    known = [run.config for run in runs if run.config]
    names = dict.fromkeys(name for config in known for name in config if name not in NOT_COMPARED)
    return [name for name in names if len({str(config.get(name)) for config in known}) > 1]


def spread(name: str, values: list[float]) -> str:
    """Mean ± standard deviation over seeds of a final figure."""
    mean = final_figure(name, float(np.mean(values)))
    if len(values) < 2:
        return mean
    deviation = final_figure(name, float(np.std(values, ddof=1)))
    return f"{mean.removesuffix(FINAL_FIGURES[name][-1])} ± {deviation}"


def overlay(groups: list[Group], name: str, axis: str) -> go.Figure:
    """A curve of every run, thin, and the mean of each group, thick."""
    figure = new_figure(SAMPLES, axis)
    for i, group in enumerate(groups):
        shown = html.escape(group.label)  # a text of Plotly may hold tags
        tables = [run.metrics for run in group.runs if has(run.metrics, name)]
        if not tables:
            continue
        dash = DASHES[i // len(CYCLE) % len(DASHES)]
        if len(tables) > 1:
            for table in tables:
                thin = dict(width=1, dash=dash)
                options = dict(showlegend=False, opacity=0.45, legendgroup=shown)
                figure.add_trace(line(table, name, shown, group.color, style=thin, **options))
        joined = pd.concat([table.set_index("global_step")[name] for table in tables], axis=1)
        mean = joined.dropna().mean(axis=1).rename(name).reset_index()
        label = f"{shown} (mean of {len(tables)})" if len(tables) > 1 else shown
        style = dict(width=3, dash=dash)
        options = dict(legendgroup=shown)
        figure.add_trace(line(mean, name, label, group.color, style=style, **options))
    return figure


def final_table(groups: list[Group]) -> Table | None:
    """Final figures of each group; None where no run has ended."""
    rows = []
    for name, (label, *_) in FINAL_FIGURES.items():
        told = [[run.summary.get(name) for run in group.finished] for group in groups]
        values = [[x for x in group if x is not None] for group in told]
        if any(values):
            rows.append([label, *(spread(name, group) if group else "–" for group in values)])
    header = ["figure", *(f"{group.label} (n = {len(group.finished)})" for group in groups)]
    title = "Final figures, mean ± standard deviation over seeds"
    return Table(title, header, rows) if rows else None


def runs_table(groups: list[Group]) -> Table:
    """Every run on its own."""
    rows = []
    for group in groups:
        for run in group.runs:
            values = [run.summary.get(name) for name in RUN_FIGURES]
            figures = zip(RUN_FIGURES, values, strict=True)
            rows.append(
                [
                    run.name,
                    group.label,
                    str(run.config.get("seed", "unknown")),
                    "finished" if run.is_finished else "unfinished",
                    *("–" if x is None else final_figure(name, x) for name, x in figures),
                ]
            )
    header = ["run", "group", "seed", "state"]
    header += ["mean reward, held out", "of the oracle, held out", "samples"]
    return Table("Runs", header, rows)


def curves_section(groups: list[Group], gaps: list[str]) -> Section:
    """Curves of all runs; what none of them recorded is named in `gaps`."""
    plots = []
    for name, title, axis in (
        ("mean_reward", "Mean reward, sampled designs", REWARD),
        ("train_deterministic_reward", "Deterministic, training patients", REWARD),
        ("holdout_deterministic_reward", "Deterministic, held-out patients", REWARD),
        (
            "holdout_fraction_of_oracle",
            "Fraction of the oracle, held out",
            FRACTION,
        ),
        ("holdout_regret", "Regret, held out", "regret (reward)"),
        ("entropy", "Entropy of the policy", "entropy, nats"),
    ):
        figure = overlay(groups, name, axis)
        if not figure.data:
            gaps.append(f"{title}: recorded by none of the runs, and left out.")
            continue
        caption = "Thin: single runs; thick: the mean of a group, as far as all of its runs got."
        if name == "mean_reward":
            figure.add_trace(source_curve())
            log_samples(figure)
            caption += " Dotted: the source's table, of another reward model."
        if name == "holdout_regret":
            log_regret(figure)
        plots.append(Plot(name.replace("_", "-"), title, caption, figure))
    return Section("curves", "Learning curves", [], plots, [])


def compared_polymers(groups: list[Group]) -> Section | None:
    """Which polymers each group chooses; None where no run has a summary."""
    shares, colors = {}, []
    for group in groups:
        tallies = [run.summary.get("polymer_share") for run in group.runs]
        if tallies := [tally for tally in tallies if tally]:
            shares[group.label] = pd.DataFrame(tallies).fillna(0.0).mean().to_dict()
            colors.append(group.color)
    if not shares:
        return None
    caption = "Sampled designs; mean over the runs of a group that have a summary."
    plot = Plot("polymers", "Share of each polymer", caption, share_bars(shares, colors))
    return Section("polymers", "Polymer selection", [], [plot], [])


def comparison(runs: list[Run]) -> bytes:
    """The page that compares runs."""
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.path)
    groups = group_runs(runs)
    gaps = [f"{run.name}: {gap}" for run in runs for gap in run.gaps]
    tables = [final_table(groups), runs_table(groups)]
    if differing := differing_settings(runs):
        cells = [[name, *(str(g.runs[0].config.get(name)) for g in groups)] for name in differing]
        header = ["setting", *(group.label for group in groups)]
        tables.append(Table("What differs between the groups", header, cells))
    sections = [
        Section("figures", "Final figures", about_seeds(groups), [], [t for t in tables if t]),
        curves_section(groups, gaps),
        compared_polymers(groups),
    ]
    return page(
        title=f"Comparison of {len(runs)} runs",
        gaps=gaps,
        about=[*about(runs), "Patients are shown on the page of a single run."],
        cards=[],
        sections=[section for section in sections if section],
        patients=None,
        notes=[],
    )


def about_seeds(groups: list[Group]) -> list[str]:
    """How the runs were put together."""
    text = (
        "Runs that differ by nothing but the seed, and by where and how often they were saved, are "
        "one group. ± is the standard deviation over its n finished runs (n − 1 in the divisor)."
    )
    unfinished = [run.name for group in groups for run in group.runs if not run.is_finished]
    if not unfinished:
        return [text]
    return [text, f"Unfinished, in the curves only: {', '.join(unfinished)}."]


def write_report(args: Args) -> Path:
    """Write the page that is asked for; returns its path.

    Raises:
        UsageError: there is no such run, or the page cannot be written.
    """
    if not args.run_dirs:
        raise UsageError("name at least one run directory; see --help")
    resolved = [path.resolve() for path in args.run_dirs]
    for path in resolved:
        if resolved.count(path) > 1:
            raise UsageError(f"{path} is named twice")
    runs = [read_run(path) for path in args.run_dirs]
    if len(runs) == 1:
        output = args.output or args.run_dirs[0] / "report.html"
    else:
        parents = [path.parent for path in resolved]
        output = args.output or Path(os.path.commonpath(parents)) / "comparison.html"
    content = report(runs[0]) if len(runs) == 1 else comparison(runs)
    try:
        write_atomically(output, content)
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror}") from error
    return output


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        args = ppo_hybrid.read_command_line(Args, args=argv, prog="report.py")
        output = write_report(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written to {output} ({output.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
