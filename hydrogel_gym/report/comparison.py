"""The page that compares runs: those that differ by nothing but the seed are one group."""

from __future__ import annotations

import html
import json
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hydrogel_gym.report.labels import FINAL_FIGURES, final_figure
from hydrogel_gym.report.page import about, render
from hydrogel_gym.report.plots import (
    CYCLE,
    DASHES,
    FRACTION,
    REWARD,
    SAMPLES,
    Plot,
    has,
    line,
    log_regret,
    log_samples,
    new_figure,
    share_bars,
    source_curve,
)
from hydrogel_gym.report.reading import SavedRun
from hydrogel_gym.report.sections import ReportTable, Section
from hydrogel_gym.runs.identity import MAY_CHANGE, REMOVED
from hydrogel_gym.runs.options import BUILT_IN

# Of each run of a comparison; the other figures are shown of its group.
RUN_FIGURES = ("holdout_deterministic_reward", "holdout_fraction_of_oracle", "samples")
# What may differ between runs of one group.
NOT_COMPARED = {"seed", "oracle", "evaluate", "wandb_project", "wandb_entity", *MAY_CHANGE}
NOT_COMPARED -= {"cohort", "holdout_cohort", "reward_model"}


class Group(NamedTuple):
    """Runs with one configuration but for the seed."""

    label: str
    runs: list[SavedRun]
    color: str

    @property
    def finished(self) -> list[SavedRun]:
        """Those whose final figures count."""
        return [run for run in self.runs if run.is_finished]


def group_runs(runs: list[SavedRun]) -> list[Group]:
    """Put runs together that differ by nothing but the seed, and name what they differ by.

    A run whose settings are unknown is a group of its own.
    """
    by_settings: dict[str, list[SavedRun]] = {}
    for run in runs:
        settings = compared_settings(run)
        key = json.dumps(settings, sort_keys=True, default=str) if settings else str(run.path)
        by_settings.setdefault(key, []).append(run)
    groups = list(by_settings.values())
    differing = differing_settings([group[0] for group in groups])
    # A preset stands for many settings.
    naming = differing if len(differing) <= 3 else ["preset"]
    labels = []
    for first, *others in groups:
        settings = compared_settings(first)
        parts = [f"{name} {settings[name]}" for name in naming if name in settings]
        more = f" and {len(others)} more" if others else ""
        labels.append(", ".join(parts) or first.name + more)
    if len(set(labels)) < len(labels):
        labels = [f"{first.name} and {len(o)} more" if o else first.name for first, *o in groups]
    return [
        Group(label, group, CYCLE[i % len(CYCLE)])
        for i, (label, group) in enumerate(zip(labels, groups, strict=True))
    ]


def compared_settings(run: SavedRun) -> dict[str, Any]:
    """Settings by which runs are put into groups.

    A setting that earlier versions had is none of them where a run of today is as if it had it.
    """
    # Earlier versions wrote the built-in model where none was named.
    config = dict(run.config)
    if config and not config.get("reward_model"):
        config["reward_model"] = BUILT_IN
    return {
        name: value
        for name, value in config.items()
        if name not in NOT_COMPARED and (name not in REMOVED or value != REMOVED[name])
    }


def differing_settings(runs: list[SavedRun]) -> list[str]:
    """Settings, but for those that groups ignore, that are not the same in all runs."""
    known = [compared_settings(run) for run in runs if run.config]
    names = dict.fromkeys(name for settings in known for name in settings)
    return [name for name in names if len({str(settings.get(name)) for settings in known}) > 1]


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


def final_table(groups: list[Group]) -> ReportTable | None:
    """Final figures of each group; None where no run has ended."""
    rows = []
    for name, (label, *_) in FINAL_FIGURES.items():
        figures = [[run.summary.get(name) for run in group.finished] for group in groups]
        values = [[x for x in group if x is not None] for group in figures]
        if any(values):
            rows.append([label, *(spread(name, group) if group else "–" for group in values)])
    header = ["figure", *(f"{group.label} (n = {len(group.finished)})" for group in groups)]
    title = "Final figures, mean ± standard deviation over seeds"
    return ReportTable(title, header, rows) if rows else None


def runs_table(groups: list[Group]) -> ReportTable:
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
    return ReportTable("Runs", header, rows)


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
    shares: dict[str, Any] = {}
    colors = []
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


def comparison_page(runs: list[SavedRun]) -> bytes:
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
        tables.append(ReportTable("What differs between the groups", header, cells))
    sections = [
        Section("figures", "Final figures", about_seeds(groups), [], [t for t in tables if t]),
        curves_section(groups, gaps),
        compared_polymers(groups),
    ]
    return render(
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
