"""Draw `_static/problem.png`: a virtual patient, a design for it and what is predicted of that.

python docs/problem_picture.py

The design is the best one that the oracle finds for a held-out patient under the built-in model.
Needs `pip install -e ".[train]"`.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, Polygon, Rectangle

from hydrogel_gym import Cohort, load_cohort, load_polymers
from hydrogel_gym.envs.rendering import TEXT, TISSUES, ShortAxis, ring_sector, short_axis
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.problem.fields import (
    COVERAGE_FRACTIONS,
    COVERAGES,
    FORMULATION_FIELDS,
    PATIENT_FIELDS,
)
from hydrogel_gym.problem.polymers import WINDOWS
from hydrogel_gym.problem.reward import SAFETY, RewardConfig

PICTURE = Path(__file__).resolve().parent / "_static" / "problem.png"
PATIENT = "H0002"
PER_MM = 0.00148  # of the width of the picture
CHOSEN, FAINT, RANGE, WINDOW = TISSUES["patch"][0], "#666666", "#E6E6E6", "#9CC6E4"
FORMULATION_LABELS = {
    "youngs_modulus_kpa": "stiffness, kPa",
    "half_life_days": "half-life, days",
    "conductivity_s_per_m": "conductivity, S/m",
    "thickness_mm": "thickness, mm",
}
COVERAGE_LABELS = ("scar alone", "+ 25 % bz", "+ 50 % bz", "+ all bz")
SAFETY_LABELS = {
    "toxicity_risk": "toxicity risk",
    "structural_integrity": "integrity",
    "fibrosis_risk": "fibrosis risk",
}


def draw_heart(ax: Axes, axis: ShortAxis, x: float, y: float, per_mm: float) -> None:
    """A short axis of the ventricle around a point, to scale, with the patch where there is one."""

    def sector(tissue: str, inner: float, outer: float, start: float, stop: float) -> None:
        outline = ring_sector(inner, outer, start, stop) * (per_mm, -per_mm) + (x, y)
        ax.add_patch(Polygon(outline, facecolor=TISSUES[tissue][0], edgecolor=TEXT, linewidth=0.6))

    inside, outside = axis.cavity_mm, axis.epicardium_mm
    if axis.patch_rad > 0:
        sector("patch", outside, axis.patch_mm, -axis.patch_rad, axis.patch_rad)
    for radius, colour in ((outside, TISSUES["remote"][0]), (inside, "white")):
        ax.add_patch(Circle((x, y), radius * per_mm, facecolor=colour, edgecolor=TEXT, lw=0.8))
    for side in (-1, 1):
        ends = sorted((side * axis.scar_rad, side * axis.border_rad))
        sector("border", inside, outside, *ends)
    sector("scar", inside, axis.scar_mm, -axis.scar_rad, axis.scar_rad)


def draw_bar(
    ax: Axes, y: float, low: float, high: float, value: float, window: tuple[float, float] | None
) -> None:
    """A range from 0.37 to 0.6 of the width, what of it the polymer can be, and the choice."""

    def at(number: float) -> float:
        return 0.37 + 0.23 * (number - low) / (high - low)

    ax.add_patch(Rectangle((0.37, y - 0.011), 0.23, 0.022, color=RANGE))
    if window:
        start, stop = (at(min(max(end, low), high)) for end in window)
        ax.add_patch(Rectangle((start, y - 0.011), stop - start, 0.022, color=WINDOW))
    ax.plot([at(value)], [y], marker="o", color=CHOSEN, markersize=8)


def draw_patient(ax: Axes, patient: dict[str, float]) -> None:
    """The heart of a patient, and some of what is known of her."""
    draw_heart(ax, short_axis(patient), 0.085, 0.215, PER_MM)
    known = (
        ("LVEF", f"{patient['lvef_pct']:.0f} %"),
        ("scar", f"{patient['scar_fraction_pct']:.0f} %"),
        ("border zone", f"{patient['bz_fraction_pct']:.0f} %"),
        ("scar's depth", f"{100 * patient['transmurality']:.0f} %"),
        ("wall", f"{patient['wall_thickness_mm']:.1f} mm"),
    )
    for row, (name, value) in enumerate(known):
        y = 0.285 - 0.03 * row
        ax.text(0.163, y, name, fontsize=10.5, color=TEXT)
        ax.text(0.298, y, value, fontsize=10.5, color=TEXT, ha="right")
    ax.text(0.163, 0.135, f"{len(PATIENT_FIELDS)} numbers in all", fontsize=10.5, color=FAINT)
    legend = ("remote", "border", "scar", "patch")
    for column, tissue in enumerate(legend):
        x, y = 0.03 + 0.14 * (column % 2), 0.062 - 0.03 * (column // 2)
        ax.add_patch(Rectangle((x, y), 0.014, 0.017, color=TISSUES[tissue][0]))
        ax.text(x + 0.02, y + 0.002, TISSUES[tissue][1], fontsize=10, color=TEXT)


def draw_design(ax: Axes, best: pd.Series) -> None:
    """Which polymer, which formulation and which coverage are chosen."""
    polymers, covered = load_polymers(), COVERAGES.index(best["coverage"])
    for polymer in range(len(polymers.names)):
        x, y = 0.37 + 0.0193 * (polymer % 12), 0.302 - 0.027 * (polymer // 12)
        colour = CHOSEN if polymer == best["polymer_id"] else RANGE
        ax.add_patch(Rectangle((x, y), 0.0165, 0.022, color=colour))
    title = f"one of {len(polymers.names)} polymers: {best['polymer_name']}"
    ax.text(0.37, 0.253, title, fontsize=11, color=TEXT)
    for row, field in enumerate(FORMULATION_FIELDS):
        y, value = 0.222 - 0.043 * row, best[field.name]
        window = None
        if field.name in WINDOWS:
            window = tuple(getattr(polymers, field.name)[best["polymer_id"]].tolist())
        draw_bar(ax, y, field.low, field.high, value, window)
        label = f"{FORMULATION_LABELS[field.name]}: {value:.3g}"
        ax.text(0.37, y - 0.0265, label, fontsize=10, color=TEXT)
    for level, label in enumerate(COVERAGE_LABELS):
        x, chosen = 0.37 + 0.0585 * level, level == covered
        ax.add_patch(Rectangle((x, 0.032), 0.0545, 0.022, color=CHOSEN if chosen else RANGE))
        ax.text(
            x + 0.0272, 0.0375, label, ha="center", fontsize=9, color="white" if chosen else TEXT
        )
    ax.text(0.37, 0.012, "pale blue: what this polymer can be made at", fontsize=9, color=TEXT)


def draw_prediction(ax: Axes, patient: dict[str, float], best: pd.Series) -> None:
    """The heart with its patch, what is predicted of it, and the limits."""
    config, covered = RewardConfig(), COVERAGES.index(best["coverage"])
    thickness = best["thickness_mm"]
    treated = short_axis(patient, thickness, COVERAGE_FRACTIONS[covered])
    draw_heart(ax, treated, 0.765, 0.215, PER_MM)
    ax.text(0.842, 0.285, "LVEF*", fontsize=10.5, color=TEXT)
    ax.text(0.99, 0.285, f"{best['delta_ef_pct']:+.1f} pp", fontsize=10.5, ha="right")
    ax.text(0.842, 0.255, "wall stress", fontsize=10.5, color=TEXT)
    ax.text(0.99, 0.255, f"{-best['stress_reduction_pct']:.0f} %", fontsize=10.5, ha="right")
    for row, item in enumerate(SAFETY):
        y, value, limit = 0.212 - 0.047 * row, best[item.outcome], config.limit(item.name)
        sign = "at most" if item.is_ceiling else "at least"
        ax.text(0.842, y, SAFETY_LABELS[item.outcome], fontsize=10.5, color=TEXT)
        ax.text(0.99, y, f"{value:.3f}", fontsize=10.5, ha="right", color=TEXT)
        ax.text(0.842, y - 0.02, f"limit: {sign} {limit:.2f}", fontsize=9, color=FAINT)
    ax.text(0.71, 0.055, f"reward {best['reward']:.1f}", fontsize=15, weight="bold", color=TEXT)
    ax.text(0.842, 0.055, "the best possible here", fontsize=10.5, color=TEXT)
    ax.text(
        0.71,
        0.016,
        "* on the source's scale, 1.75 times the literature's.\n"
        "A prediction for a synthetic patient, no clinical fact.",
        fontsize=9,
        color=FAINT,
    )


def main() -> None:
    """Search the patient's best design and draw the three parts from left to right."""
    cohort = load_cohort("holdout")
    at = cohort.patient_ids.index(PATIENT)
    here = slice(at, at + 1)
    one = Cohort((PATIENT,), cohort.features[here], cohort.extra[here], "one patient")
    names = [field.name for field in PATIENT_FIELDS]
    patient = dict(zip(names, one.features[0].tolist(), strict=True))
    best = best_designs(one).to_frame().iloc[0]

    figure, ax = plt.subplots(figsize=(12, 4.4))
    figure.subplots_adjust(0, 0, 1, 1)
    ax.set(xlim=(0, 1), ylim=(0, 4.4 / 12))
    ax.axis("off")
    titles = ((0.03, "1  A virtual patient"), (0.37, "2  A design"), (0.71, "3  What is predicted"))
    for x, title in titles:
        ax.text(x, 0.338, title, fontsize=15, weight="bold", color=TEXT)
    for start in (0.305, 0.635):
        arrow = FancyArrowPatch((start, 0.2), (start + 0.035, 0.2), mutation_scale=22, color=FAINT)
        ax.add_patch(arrow)
    ax.text(0.322, 0.222, "policy", ha="center", fontsize=11, color=FAINT)
    ax.text(0.652, 0.222, "model", ha="center", fontsize=11, color=FAINT)

    draw_patient(ax, patient)
    draw_design(ax, best)
    draw_prediction(ax, patient, best)
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    main()
