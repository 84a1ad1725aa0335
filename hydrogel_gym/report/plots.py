"""How figures look, and those that more than one section draws."""

from __future__ import annotations

import html
import textwrap
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hydrogel_gym.problem.polymers import NUM_POLYMERS, load_polymers
from hydrogel_gym.runs.pictures import (
    SOURCE_MEAN_REWARD,
    SOURCE_POLYMER_SHARE,
    SOURCE_SAMPLES_PER_ITERATION,
)

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


class Plot(NamedTuple):
    """A figure of the page."""

    name: str
    title: str
    caption: str
    figure: go.Figure


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
    source = {k * SOURCE_SAMPLES_PER_ITERATION: v for k, v in SOURCE_MEAN_REWARD.items() if k}
    return go.Scatter(
        x=list(source),
        y=list(source.values()),
        name="source (another reward model)",
        mode="lines+markers",
        line=dict(color=BLACK, dash="dot", width=1),
    )


def share_bars(shares: dict[str, dict[str, float]], colors: list[str]) -> go.Figure:
    """Horizontal bars of the share of each polymer, %, beside the source's.

    Args:
        shares: by label, then by polymer.
        colors: of the labels.
    """
    shares = shares | {"source (another reward model)": SOURCE_POLYMER_SHARE}
    names = load_polymers().names
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
    names = load_polymers().names
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
