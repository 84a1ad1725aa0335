"""Designs of one patient to look at: a table to print and a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hydrogel_gym.problem.reward import RewardConfig, safety_margins

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# Column of the printed table, and how its numbers are written.
PRINTED = {
    "polymer_name": ("polymer", "{}"),
    "stiffness_kPa": ("kPa", "{:.2f}"),
    "degradation_days": ("days", "{:.1f}"),
    "conductivity_S_m": ("S/m", "{:.3f}"),
    "thickness_mm": ("mm", "{:.2f}"),
    "coverage": ("coverage", "{}"),
    "predicted_delta_EF": ("dEF, pp", "{:+.2f}"),
    "predicted_stress_reduction": ("stress, %", "{:.1f}"),
    "optimal_probability": ("P(optimal)", "{:.3f}"),
    "reward": ("reward", "{:.3f}"),
}
AXES = {
    "polymer_name": "polymer",
    "stiffness_kPa": "stiffness\nkPa",
    "degradation_days": "half-life\ndays",
    "conductivity_S_m": "conductivity\nS/m",
    "thickness_mm": "thickness\nmm",
    "coverage": "coverage",
    "predicted_delta_EF": "predicted\nΔEF, pp",
    "predicted_stress_reduction": "predicted stress\nreduction, %",
    "toxicity_risk": "toxicity\nrisk",
    "structural_integrity": "integrity",
    "fibrosis_risk": "fibrosis\nrisk",
    "reward": "reward",
}


def printed_designs(designs: pd.DataFrame, config: RewardConfig) -> str:
    """Designs, as `load_designs` gives them, and their safety margins as lines of text."""
    import pandas as pd

    table = {
        title: designs[name].astype(object).map(written.format)
        for name, (title, written) in PRINTED.items()
    }
    outcomes: Any = designs  # whose columns of risks have the names of the outcomes
    margins: dict[str, Any] = {**safety_margins(outcomes, config)}
    for name, margin in margins.items():
        table[name.replace("_", " ")] = margin.map("{:+.4f}".format)
    frame = pd.DataFrame(table)
    frame.index += 1
    return frame.to_string()


def draw_designs(patient_id: str, designs: pd.DataFrame, diverse: pd.DataFrame) -> Figure:
    """Parallel coordinates of a patient's best designs, before the best of every other kind."""
    # Imported here: two seconds that --help should not take.
    import pandas as pd
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5), layout="constrained")
    axes = figure.subplots()
    heights = {}
    both = pd.concat([designs, diverse], ignore_index=True)
    for place, (name, label) in enumerate(AXES.items()):
        heights[name], marks = _on_axis(both[name])
        axes.axvline(place, color="0.6", lw=0.8)
        for y, text in marks.items():
            axes.annotate(text, (place, y), (3, 2), textcoords="offset points", fontsize=7)
        axes.text(place, -0.08, label, ha="center", va="top", fontsize=8)
    lines = np.stack(list(heights.values()), axis=1)
    for line in lines[len(designs) :]:
        axes.plot(line, color="0.8", lw=0.7, zorder=1)
    reward = heights["reward"][: len(designs)]
    span = max(float(np.ptp(reward)), 1e-9)
    for i in np.argsort(reward):  # the best on top
        color = colormaps["viridis"](0.9 * (reward[i] - reward.min()) / span)
        axes.plot(lines[i], color=color, lw=0.9, alpha=0.8)
    axes.set(xlim=(-0.3, len(AXES) - 0.3), ylim=(-0.05, 1.05), xticks=[], yticks=[])
    axes.set_title(
        f"{patient_id}, a virtual patient: its {len(designs)} best designs, as predicted; "
        "grey: the best of each polymer and coverage"
    )
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


def _on_axis(column: Any) -> tuple[np.ndarray, dict[float, str]]:
    """Heights of the entries of a column on its axis, 0 to 1, and what is written at which."""
    if column.dtype == "category":
        present = [c for c in column.cat.categories if (column == c).any()]
        code = column.map({c: i for i, c in enumerate(present)}).astype(float)
        height = (code + 0.5) / len(present)
        marks = {(i + 0.5) / len(present): c for i, c in enumerate(present)}
    else:
        low, high = float(column.min()), float(column.max())
        height = (column - low) / (high - low) if high > low else column * 0.0 + 0.5
        marks = {0.0: f"{low:.4g}", 1.0: f"{high:.4g}"} if high > low else {0.5: f"{low:.4g}"}
    return height.to_numpy(float), marks
