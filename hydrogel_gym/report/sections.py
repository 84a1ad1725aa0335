"""The sections of the page of one run: settings, learning, and designs for its patients."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hydrogel_gym.problem.fields import (
    COVERAGES,
    FORMULATION_FIELDS,
    PATIENT_FIELDS,
)
from hydrogel_gym.problem.polymers import NUM_POLYMERS, load_polymers
from hydrogel_gym.problem.reward import SAFETY, SAFETY_LIMITS, RewardTerms
from hydrogel_gym.report.analysis import Patients
from hydrogel_gym.report.labels import (
    FINAL_FIGURES,
    OUTCOME_LABELS,
    SIGNS,
    TERM_LABELS,
    coverage_labels,
    final_figure,
)
from hydrogel_gym.report.plots import (
    BLACK,
    BLUE,
    CYCLE,
    DASHES,
    FRACTION,
    GREY,
    REWARD,
    SAMPLES,
    VERMILLION,
    Plot,
    bars,
    has,
    line,
    log_regret,
    log_samples,
    new_figure,
    share_bars,
    source_curve,
    tertile_map,
)
from hydrogel_gym.report.reading import SavedRun
from hydrogel_gym.runs.pictures import (
    KL_BOUND,
    SOURCE_MEAN_REWARD,
    SOURCE_POLYMER_SHARE,
    SOURCE_SAMPLES_PER_ITERATION,
)
from hydrogel_gym.runs.uncertainty import BOUND, FLAGGED


class ReportTable(NamedTuple):
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
    tables: list[ReportTable]
    legend: list[tuple[str, str]] = []  # label and colour, of all its plots


def what_was_run(run: SavedRun) -> Section:
    """Final figures, settings and versions."""
    tables = []
    figures = [
        [label, final_figure(name, run.summary[name])]
        for name, (label, *_) in FINAL_FIGURES.items()
        if run.summary.get(name) is not None
    ]
    if figures:
        tables.append(ReportTable("Final figures", ["figure", "value"], figures))
    settings = [[name, "–" if x is None else str(x)] for name, x in run.config.items()]
    if settings:
        tables.append(ReportTable("Settings", ["setting", "value"], settings))
    machine = {name: run.summary[name] for name in ("device", "threads") if name in run.summary}
    machine |= run.summary.get("versions", {})
    if machine:
        rows = [[name, str(value)] for name, value in machine.items()]
        tables.append(ReportTable("Machine and versions", ["item", "value"], rows))
    return Section("what-was-run", "What was run", [], [], tables)


def beside_the_source(run: SavedRun) -> ReportTable:
    """The source's mean rewards, and this run's after as many samples."""
    table = run.metrics
    names = ("mean_reward", "train_deterministic_reward", "holdout_deterministic_reward")

    def shown(row: pd.Series, name: str) -> str:
        value = row.get(name, math.nan)
        return "–" if math.isnan(value) else f"{value:.1f}"

    rows = []
    for iteration, reward in SOURCE_MEAN_REWARD.items():
        samples = iteration * SOURCE_SAMPLES_PER_ITERATION
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
    return ReportTable("Mean reward after as many samples as the source took", header, rows)


def learning_section(run: SavedRun) -> Section | None:
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
    plots += [*yardstick_plots(run), *divergence_plots(run)]
    return Section("learning-curves", "Learning", [], plots, [beside_the_source(run)])


def yardstick_plots(run: SavedRun) -> list[Plot]:
    """How far the policy is from the best possible; what is not recorded is named in the gaps."""
    table = run.metrics
    plots = []
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
    return plots


def divergence_plots(run: SavedRun) -> list[Plot]:
    """How far an iteration's updates take the policy, and the bound on that."""
    table = run.metrics
    if not has(table, "approx_kl", "clipfrac"):
        return []
    figure = new_figure(SAMPLES, "KL divergence, nats; share of ratios", height=400)
    figure.add_trace(line(table, "approx_kl", "approximate KL divergence", BLUE))
    figure.add_trace(line(table, "clipfrac", "share clipped", VERMILLION, style=dict(dash="dash")))
    figure.update_yaxes(rangemode="tozero")
    kl, clipped = table["approx_kl"], table["clipfrac"]
    caption = (
        f"KL divergence: median {kl.median():.3f}, largest {kl.max():.3f}; ratios clipped: median "
        f"{100 * clipped.median():.0f} %, largest {100 * clipped.max():.0f} %. {KL_BOUND}"
    )
    return [Plot("divergence", "Divergence and clipping", caption, figure)]


def terms_section(run: SavedRun) -> Section | None:
    """What the reward is made of, by iteration."""
    table = run.metrics
    names = [name for name in RewardTerms._fields if has(table, name)]
    if not names:
        if len(table):
            run.gaps.append("Terms of the reward are not in metrics.csv, and left out.")
        return None
    plots: list[Plot] = []
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
    rates = [f"{name}_breach_rate" for name in SAFETY_LIMITS]
    if rates := [name for name in rates if has(table, name)]:
        figure = new_figure(SAMPLES, "designs over the limit, %")
        for i, name in enumerate(rates):
            scaled = table.assign(**{name: 100 * table[name]})
            style = dict(dash=DASHES[i])
            label = name.removesuffix("_breach_rate")
            figure.add_trace(line(scaled, name, label, CYCLE[i], style=style))
        caption = "Share of the rollout's designs that break each safety limit."
        plots.append(Plot("breaches", "Safety limits broken while learning", caption, figure))
    return Section("reward-terms", "Reward terms over time", [], plots, [])


def polymer_section(run: SavedRun, patients: Patients | None) -> Section | None:
    """Which polymers the policy chooses, and for whom."""
    shares: dict[str, Any] = {}
    plots: list[Plot] = []
    if patients:
        names = load_polymers().names
        count = np.bincount(patients.polymer_id, minlength=NUM_POLYMERS) / len(patients.cohort)
        shares["deterministic, one design per patient"] = dict(zip(names, count, strict=True))
    if sampled := run.summary.get("polymer_share"):
        shares["sampled designs"] = sampled
    if not shares:
        return None
    named = SOURCE_POLYMER_SHARE
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
    names = load_polymers().names
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
        [ReportTable("Coverage", ["covered", "patients"], rows)],
        legend,
    )


def safety_section(patients: Patients) -> Section:
    """How far the designs stay from each safety limit."""
    plots, rows = [], []
    for item in SAFETY:
        limit, margin = patients.config.limit(item.name), patients.margins[item.name]
        outcome, _, span = OUTCOME_LABELS[item.outcome].partition(", ")
        larger, smaller = f"limit {limit:g}", outcome
        if not item.is_ceiling:
            larger, smaller = smaller, larger
        size = max(np.ptp(np.append(margin, 0.0)), 1e-6) / 30
        # An edge at 0, so that no bar is of both kinds.
        edges = size * np.arange(
            math.floor(margin.min() / size), math.ceil(margin.max() / size) + 2
        )
        centres = edges[:-1] + size / 2
        colors = [BLUE if x > 0 else VERMILLION for x in centres]
        figure = new_figure(
            f"{larger} less {smaller}, {span}", "patients", height=280, showlegend=False
        )
        figure.add_trace(bars(margin, edges, name=item.name, color=colors))
        figure.add_vline(x=0, line=dict(color=BLACK, width=2, dash="dash"))
        broken = 100 * (margin < 0).mean()
        caption = f"{broken:.2f} % of the designs break this limit (left of the dashed line)."
        plots.append(Plot(f"margin-{item.name}", item.name.capitalize(), caption, figure))
        rows.append(
            [
                f"{item.name} {SIGNS[item.is_ceiling]} {limit:g}",
                f"{margin.min():.3f}",
                f"{np.quantile(margin, 0.05):.3f}",
                f"{np.median(margin):.3f}",
                f"{broken:.2f} %",
            ]
        )
    broken = 100 * (np.stack(list(patients.margins.values())) < 0).any(0).mean()
    header = ["limit", "smallest margin", "5th percentile", "median", "designs that break it"]
    text = f"{broken:.2f} % of the designs break a safety limit."
    return Section(
        "safety", "Safety margins", [text], plots, [ReportTable("Margins", header, rows)]
    )


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


def prediction_section(patients: Patients, summary: dict[str, Any]) -> Section | None:
    """Who deserves a search: predicted regret, beside the true one where it is known."""
    if patients.prediction is None:
        return None
    expected, bound = patients.prediction
    share = f"{100 * BOUND:.0f} %"
    texts = [
        "How far from the best possible each design may be, predicted without a search: how much "
        "better the best of a hundred designs near it is, and what is usually left beyond that. "
        f"The bound is meant to hold for {share} of the patients."
    ]
    if (correlation := summary.get("holdout_regret_rank_correlation")) is not None:
        coverage, flagged = (
            final_figure(name, summary[name])
            for name in ("holdout_regret_bound_coverage", "holdout_regret_of_flagged")
        )
        texts.append(
            "On the held-out patients, who had no part in it: rank correlation with the true "
            f"regret {correlation:.2f}, {coverage} below their bound; the {100 * FLAGGED:.0f} % "
            f"for whom most is predicted have {flagged} of all regret."
        )
    order = np.argsort(-expected, kind="stable")
    groups = np.array_split(order[::-1], min(10, len(order)))
    figure = new_figure("predicted regret", "regret (reward)", height=340)
    x = [expected[rows].mean() for rows in groups]
    curves = [("bound", [bound[rows].mean() for rows in groups], VERMILLION, "dash")]
    curves.append(("predicted", x, BLACK, "dot"))
    if patients.best is not None:
        regret = patients.regret
        curves.append(("true", [regret[rows].mean() for rows in groups], BLUE, "solid"))
    for name, y, color, dash in curves:
        style = dict(color=color, dash=dash)
        figure.add_trace(go.Scatter(x=x, y=y, name=name, mode="lines+markers", line=style))
    figure.update_xaxes(type="log")
    log_regret(figure)
    caption = (
        "Means of tenths of the training patients, whom the prediction was fitted on, by "
        "predicted regret."
    )
    plot = Plot("predicted-regret", "Predicted and true regret", caption, figure)
    rows = []
    for i in order[:10]:
        known = "–" if patients.best is None else f"{patients.regret[i]:.3f}"
        name = load_polymers().names[patients.polymer_id[i]]
        cells = [f"{x[i]:.3f}" for x in (expected, bound)]
        rows.append([patients.cohort.patient_ids[i], name, *cells, known])
    header = ["patient", "polymer", "predicted regret", f"bound, {share}", "true regret"]
    table = ReportTable("Ten patients who deserve a search first", header, rows)
    return Section("predicted-regret", "Who deserves a search", texts, [plot], [table])
