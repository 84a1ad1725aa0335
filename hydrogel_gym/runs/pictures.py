"""Pictures of a run, for its directory and for W&B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hydrogel_gym.problem.cohort import Cohort
from hydrogel_gym.problem.fields import COVERAGES, FORMULATION_FIELDS, PATIENT_FIELDS, Outcomes
from hydrogel_gym.problem.polymers import load_polymers
from hydrogel_gym.runs.directory import save_figure

NUM_TOP_DESIGNS = 20  # of W&B's table
# The source's own results (sections 6.1 and 6.3), drawn beside ours: another reward model, so only
# the shape of the curve and its cost can be compared.
SOURCE_MEAN_REWARD = {0: 12.4, 20: 18.7, 50: 23.1, 100: 26.8, 150: 28.4, 200: 29.2}
SOURCE_SAMPLES_PER_ITERATION = 200_000
SOURCE_POLYMER_SHARE = {
    "PEGDA_3400": 0.182,
    "GelMA_rGO": 0.151,
    "GelMA_MXene": 0.124,
    "HA_ECM": 0.118,
    "Alginate_CaCl2": 0.092,
    "PEGDA_700": 0.086,
    "GelMA_3pct": 0.073,
}
# Where proximal policy optimisation is usually run; `docs/results.md` has the reasoning.
USUAL_KL = 0.1
KL_BOUND = (
    "The method is usually run at about 0.02 for each of the four parameters of the formulation, "
    f"which have nine tenths of the divergence, and so at about {USUAL_KL} for a whole design."
)


def draw_learning_curve(path: Path, rows: list[dict[str, Any]]) -> None:
    """Reward against samples, beside the source's curve; below, divergence and clipped ratios."""
    # Imported here: two seconds that --help should not take.
    from matplotlib.figure import Figure

    table = {name: [row[name] for row in rows] for name in rows[0]}
    figure = Figure(figsize=(7, 5.6), layout="constrained")
    axes, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    axes.plot(table["global_step"], table["mean_reward"], color="0.6", label="sampled, training")
    axes.plot(
        table["global_step"],
        table["train_deterministic_reward"],
        color="#0072B2",
        label="deterministic, training cohort",
    )
    axes.plot(
        table["global_step"],
        table["holdout_deterministic_reward"],
        color="#D55E00",
        ls="--",
        label="deterministic, held-out cohort",
    )
    source = {k * SOURCE_SAMPLES_PER_ITERATION: v for k, v in SOURCE_MEAN_REWARD.items() if k}
    axes.plot(
        list(source), list(source.values()), "k.:", label="source (another reward model)", lw=1
    )
    axes.set_xscale("log")
    axes.set(ylabel="mean reward")
    for name, label, color in (
        ("approx_kl", "KL divergence, nats (median {0:.2f}, largest {1:.2f})", "#0072B2"),
        ("clipfrac", "share of ratios clipped (median {0:.2f}, largest {1:.2f})", "#D55E00"),
    ):
        values = np.array(table[name])
        label = label.format(np.median(values), values.max())
        below.plot(table["global_step"], values, color=color, label=label)
    below.axhline(USUAL_KL, color="0.3", ls=":", lw=1, label=f"usual divergence, {USUAL_KL}")
    below.set(xlabel="samples (one design for one virtual patient)")
    below.set_ylim(bottom=0.0)
    for each, place, size in ((axes, "lower right", "small"), (below, "upper right", "x-small")):
        each.grid(alpha=0.3)
        each.legend(loc=place, fontsize=size)
    save_figure(path, figure)


def draw_policy_selection(path: Path, polymer_share: dict[str, float]) -> None:
    """Share of each polymer in the learned policy, beside the source's table."""
    from matplotlib.figure import Figure

    names = sorted(polymer_share, key=lambda name: polymer_share[name])
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(names))
    axes.barh(
        rows + 0.2, [100 * polymer_share[n] for n in names], 0.4, color="#0072B2", label="this run"
    )
    axes.barh(
        rows - 0.2,
        [100 * SOURCE_POLYMER_SHARE.get(n, 0.0) for n in names],
        0.4,
        color="0.7",
        label="source (another reward model; 17 others 17.4 % in all)",
    )
    axes.set_yticks(rows, names, fontsize="small")
    axes.set_xlabel("share of sampled designs, %")
    axes.legend(loc="lower right", fontsize="small")
    save_figure(path, figure)


def polymers_by_scar_size(cohort: Cohort, polymer_id: Tensor) -> Any:
    """Heat map, for Plotly, of how often each polymer is chosen for small, medium, large scars."""
    from plotly import graph_objects

    column = [field.name for field in PATIENT_FIELDS].index("scar_fraction_pct")
    scar = cohort.features[:, column].contiguous()
    bounds = scar.quantile(torch.tensor([0.0, 1 / 3, 2 / 3, 1.0], dtype=scar.dtype))
    tertile = torch.bucketize(scar, bounds[1:3])
    names = load_polymers().names
    counts = torch.bincount(tertile * len(names) + polymer_id.cpu(), minlength=3 * len(names))
    counts = counts.view(3, -1)
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    low, high = bounds[:-1].tolist(), bounds[1:].tolist()
    heat_map = graph_objects.Heatmap(
        z=shares.T.tolist(),
        x=[f"{a:.1f} to {b:.1f} %" for a, b in zip(low, high, strict=True)],
        y=names,
        colorscale="Viridis",
        colorbar={"title": "share"},
    )
    title = "Deterministic choice of polymer by scar, % of the left ventricle (tertiles)"
    return graph_objects.Figure(heat_map, layout={"title": title, "height": 700})


def top_designs(cohort: Cohort, designs: dict[str, Tensor]) -> Any:
    """Data frame of the training patients' best designs by predicted reward."""
    import pandas as pd

    designs = {name: values.cpu() for name, values in designs.items()}
    best = designs["reward"].argsort(descending=True)[:NUM_TOP_DESIGNS]
    names = load_polymers().names
    columns = {
        "patient_id": [cohort.patient_ids[row] for row in best],
        "polymer": [names[i] for i in designs["polymer_id"][best]],
        **{f.name: designs["formulation"][best, i] for i, f in enumerate(FORMULATION_FIELDS)},
        "coverage": [COVERAGES[i] for i in designs["coverage"][best]],
        **{name: designs[name][best] for name in ("reward", *Outcomes._fields)},
    }
    return pd.DataFrame(
        {name: x.tolist() if isinstance(x, Tensor) else x for name, x in columns.items()}
    )
