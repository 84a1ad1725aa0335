"""What a picture of a design problem shows: the geometry, the drawing and the same in text.

The picture is a short axis of the left ventricle at end-diastole, to scale. What it assumes:

- The cavity is a sphere of the end-diastolic volume, as the data card of the cohorts has it, cut at
  its equator. A real ventricle is longer than wide, so this cavity is wider than an echo shows it.
- The wall is everywhere as thick as in the treated region.
- Scar and border zone take the same share of the circumference as of the ventricle. The scar lies
  on the inside, as deep as its transmurality; the border zone goes through the wall, half of
  it on either side of the scar.
- Where on the circumference they lie is not known; they are drawn at the top.
- The patch lies on the epicardium over what the design covers.

All colours are of a set that stays apart for colour-blind readers [Okabe2008].

References:
    [Okabe2008] Okabe, Ito. Color Universal Design. jfly.uni-koeln.de/color, 2008.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from hydrogel_gym.problem.fields import (
    COVERAGE_FRACTIONS,
    FORMULATION_FIELDS,
    OUTCOME_FIELDS,
    PATIENT_FIELDS,
    Field,
    Outcomes,
)
from hydrogel_gym.problem.reward import SAFETY, RewardConfig, SafetyLimit, breaches

RenderMode = Literal["rgb_array", "ansi"]
RENDER_MODES: tuple[RenderMode, ...] = get_args(RenderMode)
RENDER_FPS = 1  # a picture is read, not watched

WIDTH_PX, HEIGHT_PX = 640, 480
TEXT_PX = 20  # 9 pixels high where the picture is shown 300 wide
LINE_PX = 24
HEART_CENTRE_PX = (188, 212)
HEART_RADIUS_PX = 178
COLUMN_PX = (382, 632)  # left and right end of the text beside the heart
SCALE_BAR_MM = 20.0
SUPERSAMPLING = 4


def _largest(fields: tuple[Field, ...], name: str) -> float:
    return next(field.high for field in fields if field.name == name)


def cavity_radius_mm(edv_ml: float) -> float:
    """Radius of the sphere of the end-diastolic volume, mm."""
    return 10.0 * float(np.cbrt(3.0 * edv_ml / (4.0 * math.pi)))


# One scale for all patients, so that pictures can be compared: the largest ventricle that a cohort
# may have fits, with the thickest patch.
SHOWN_RADIUS_MM = (
    cavity_radius_mm(_largest(PATIENT_FIELDS, "edv_ml"))
    + _largest(PATIENT_FIELDS, "wall_thickness_mm")
    + _largest(FORMULATION_FIELDS, "thickness_mm")
)

TEXT, FAINT, BAND, ALERT = "#1A1A1A", "#666666", "#E6E6E6", "#B34700"
TISSUES = {
    "remote": ("#E8B4A0", "remote muscle"),
    "border": ("#F0E442", "border zone"),
    "scar": ("#595959", "scar (site assumed)"),
    "patch": ("#0072B2", "hydrogel patch"),
}


@dataclass(frozen=True)
class Evaluation:
    """A design and what was predicted of it.

    Attributes:
        polymer: name.
        formulation: as evaluated, order and units of `FORMULATION_FIELDS`.
        coverage: index into `COVERAGES`.
        outcomes: order and units of `OUTCOME_FIELDS`.
        reward: of the step.
        iteration: which step of the episode, from 1.
    """

    polymer: str
    formulation: tuple[float, ...]
    coverage: int
    outcomes: tuple[float, ...]
    reward: float
    iteration: int


@dataclass(frozen=True)
class Scene:
    """Everything that a picture shows.

    Attributes:
        patient_id: name of the virtual patient.
        patient: order and units of `PATIENT_FIELDS`.
        horizon: steps per episode.
        limits: the reward, whose safety limits are shown where they are broken.
        evaluation: the last design of the episode; None before the first.
    """

    patient_id: str
    patient: tuple[float, ...]
    horizon: int = 1
    limits: RewardConfig = RewardConfig()
    evaluation: Evaluation | None = None


class ShortAxis(NamedTuple):
    """Radii from the centre, mm, and angles from the middle of the scar to either side, radians."""

    cavity_mm: float
    scar_mm: float  # how far out the scar reaches
    epicardium_mm: float
    patch_mm: float  # outside of the patch; the epicardium where there is none
    scar_rad: float
    border_rad: float  # far end of the border zone
    patch_rad: float  # 0 where there is no patch


def short_axis(
    patient: Mapping[str, float], thickness_mm: float = 0.0, covered_share: float | None = None
) -> ShortAxis:
    """Geometry of a ventricle and the patch on it; see the top of this file for what it assumes.

    Args:
        patient: `edv_ml`, `wall_thickness_mm`, `scar_fraction_pct`, `bz_fraction_pct` and
            `transmurality`, in the units of `PATIENT_FIELDS`.
        thickness_mm: of the patch.
        covered_share: of the border zone, 0 to 1; None without a patch.

    Returns:
        Radii that never decrease from cavity to patch, and angles of at most pi: what would be more
        than the circumference is cut off.
    """
    cavity, wall = cavity_radius_mm(patient["edv_ml"]), patient["wall_thickness_mm"]
    epicardium = cavity + wall
    scar = math.pi * patient["scar_fraction_pct"] / 100.0
    border_each = math.pi * patient["bz_fraction_pct"] / 100.0
    return ShortAxis(
        cavity_mm=cavity,
        scar_mm=min(cavity + patient["transmurality"] * wall, epicardium),
        epicardium_mm=epicardium,
        patch_mm=epicardium + (0.0 if covered_share is None else thickness_mm),
        scar_rad=min(scar, math.pi),
        border_rad=min(scar + border_each, math.pi),
        patch_rad=0.0
        if covered_share is None
        else min(scar + covered_share * border_each, math.pi),
    )


def pixels_per_mm(axis: ShortAxis) -> float:
    """The scale all patients share, or a smaller one for a ventricle that is too large for it."""
    return HEART_RADIUS_PX / max(SHOWN_RADIUS_MM, axis.patch_mm)


def ring_sector(inner: float, outer: float, start_rad: float, stop_rad: float) -> np.ndarray:
    """Outline of the part of a ring between two angles, clockwise from the top.

    Args:
        inner: radius.
        outer: radius.
        start_rad: angle of one end.
        stop_rad: angle of the other, no smaller.

    Returns:
        (N, 2) x to the right and y downwards from the centre, in the unit of the radii.
    """
    # A chord of a degree lies within 0.01 mm of the arc of the largest patch.
    angles = np.linspace(start_rad, stop_rad, 2 + math.ceil(math.degrees(stop_rad - start_rad)))
    unit = np.stack([np.sin(angles), -np.cos(angles)], axis=-1)
    return np.concatenate([outer * unit, inner * unit[::-1]])


def scene_axis(scene: Scene) -> ShortAxis:
    """Geometry of a scene, with the patch where there is a design."""
    patient, evaluation = _named(PATIENT_FIELDS, scene.patient), scene.evaluation
    if evaluation is None:
        return short_axis(patient)
    thickness_mm = _named(FORMULATION_FIELDS, evaluation.formulation)["thickness_mm"]
    return short_axis(patient, thickness_mm, COVERAGE_FRACTIONS[evaluation.coverage])


def _named(fields: tuple[Field, ...], values: tuple[float, ...]) -> dict[str, float]:
    return {field.name: value for field, value in zip(fields, values, strict=True)}


class _Words(NamedTuple):
    """Texts of an evaluation that picture and text share."""

    title: str
    polymer: str
    formulation: tuple[str, str]
    covered: str
    # Label, value and whether a safety limit is broken.
    outcomes: tuple[tuple[str, str, bool], ...]
    reward: str


def _words(scene: Scene, evaluation: Evaluation) -> _Words:
    made = _named(FORMULATION_FIELDS, evaluation.formulation)
    predicted = _named(OUTCOME_FIELDS, evaluation.outcomes)
    share = COVERAGE_FRACTIONS[evaluation.coverage]
    broken = breaches(Outcomes._make(evaluation.outcomes), scene.limits)

    def safety(limit: SafetyLimit) -> tuple[str, str, bool]:
        is_broken = bool(broken[limit.name])
        sign, bound = ">" if limit.is_ceiling else "<", scene.limits.limit(limit.name)
        value = f"{predicted[limit.outcome]:.3f}" + f" {sign} {bound:.3f}" * is_broken
        label = limit.name.capitalize() + " risk" * limit.is_ceiling
        return label, value, is_broken

    return _Words(
        title=f"Design {evaluation.iteration} of {scene.horizon}",
        polymer=evaluation.polymer,
        formulation=(
            f"{made['youngs_modulus_kpa']:.1f} kPa, half-life {made['half_life_days']:.0f} days",
            f"{made['conductivity_s_per_m']:.2f} S/m, {made['thickness_mm']:.1f} mm thick",
        ),
        covered=f"scar + {100.0 * share:.0f} % of border zone" if share else "scar only",
        outcomes=(
            ("LVEF change", f"{predicted['delta_ef_pct']:+.1f} points", False),
            ("Stress reduction", f"{predicted['stress_reduction_pct']:.1f} %", False),
            ("P(optimal)", f"{_sigmoid(predicted['optimal_logit']):.2f}", False),
            *map(safety, SAFETY),
        ),
        reward=f"{evaluation.reward:.2f}",
    )


def _sigmoid(logit: float) -> float:
    return 0.5 + 0.5 * math.tanh(0.5 * logit)  # overflows for no logit


def describe(scene: Scene) -> str:
    """The content of a picture in a few lines of text, without a line break at the end."""
    patient, axis = _named(PATIENT_FIELDS, scene.patient), scene_axis(scene)
    lines = [
        f"Virtual patient {scene.patient_id}: LVEF {patient['lvef_pct']:.1f} %, "
        f"EDV {patient['edv_ml']:.0f} mL, wall {patient['wall_thickness_mm']:.1f} mm",
        f"Scar {patient['scar_fraction_pct']:.1f} % of the left ventricle, "
        f"{100.0 * patient['transmurality']:.0f} % of the wall deep; "
        f"border zone {patient['bz_fraction_pct']:.1f} %",
    ]
    if scene.evaluation is None:
        return "\n".join([*lines, "No design yet"])
    words = _words(scene, scene.evaluation)
    outcomes = [
        f"{label} {value}" + " (limit broken)" * is_broken
        for label, value, is_broken in words.outcomes
    ]
    return "\n".join(
        [
            *lines,
            f"{words.title}: {words.polymer}, {', '.join(words.formulation)}",
            f"Covered: {words.covered}, {100.0 * axis.patch_rad / math.pi:.1f} % of the "
            "circumference",
            f"Predicted: {'; '.join(outcomes)}",
            f"Reward {words.reward}",
        ]
    )


def draw(scene: Scene) -> np.ndarray:
    """Picture of a scene.

    Returns:
        (480, 640, 3) uint8, red, green and blue.

    Raises:
        ModuleNotFoundError: Pillow is not installed (extra `render`).
    """
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (WIDTH_PX, HEIGHT_PX), "white")
    axis = scene_axis(scene)
    heart = _draw_heart(axis)
    image.paste(heart, tuple(centre - heart.width // 2 for centre in HEART_CENTRE_PX))
    canvas = ImageDraw.Draw(image)
    # Pillow's own font, the same on every machine. It has no bold, and few signs beyond ASCII.
    _Writer(canvas, ImageFont.load_default(TEXT_PX)).write(scene, axis)
    return np.array(image)


def _draw_heart(axis: ShortAxis) -> Any:
    """Square image of the ventricle, drawn larger and reduced to smooth its edges."""
    from PIL import Image, ImageDraw

    side = 2 * (HEART_RADIUS_PX + 2)
    image = Image.new("RGB", (side * SUPERSAMPLING,) * 2, "white")
    canvas = ImageDraw.Draw(image)
    centre, scale = side * SUPERSAMPLING // 2, pixels_per_mm(axis) * SUPERSAMPLING

    # Pillow cuts what is behind the point, and counts from the middle of the first pixel.
    def sector(tissue: str, inner: float, outer: float, start: float, stop: float) -> None:
        ring = centre - 0.5 + scale * ring_sector(inner, outer, start, stop)
        points = [(x, y) for x, y in ring.round().tolist()]
        canvas.polygon(points, fill=TISSUES[tissue][0])
        if tissue != "patch":  # which would be all outline where it is thin
            canvas.line([*points, points[0]], fill=TEXT, width=SUPERSAMPLING - 1)

    def circle(radius: float, fill: str | None) -> None:
        half = round(scale * radius)
        box = (centre - half, centre - half, centre + half - 1, centre + half - 1)
        canvas.ellipse(box, fill=fill, outline=TEXT, width=SUPERSAMPLING)

    inside, outside = axis.cavity_mm, axis.epicardium_mm
    if axis.patch_rad > 0.0:
        # From the inside, so that nothing of the background is left between it and the wall.
        sector("patch", inside, axis.patch_mm, -axis.patch_rad, axis.patch_rad)
    circle(outside, TISSUES["remote"][0])
    sector("border", inside, outside, -axis.border_rad, -axis.scar_rad)
    sector("border", inside, outside, axis.scar_rad, axis.border_rad)
    sector("scar", inside, axis.scar_mm, -axis.scar_rad, axis.scar_rad)
    circle(outside, None)
    circle(inside, "white")
    return image.reduce(SUPERSAMPLING)


class _Writer:
    """Puts the text round and beside the ventricle."""

    def __init__(self, canvas: Any, font: Any) -> None:
        self.canvas, self.font = canvas, font
        self.top = 8

    def write(self, scene: Scene, axis: ShortAxis) -> None:
        """Write everything."""
        patient = _named(PATIENT_FIELDS, scene.patient)
        self._round_the_heart(patient["edv_ml"], axis)
        self._title(f"Virtual patient {scene.patient_id}")
        self._row("LVEF", f"{patient['lvef_pct']:.1f} %")
        depth = f"{100.0 * patient['transmurality']:.0f} % deep"
        self._row("Scar", f"{patient['scar_fraction_pct']:.1f} %, {depth}")
        self._row("Border zone", f"{patient['bz_fraction_pct']:.1f} %")
        self._row("Wall", f"{patient['wall_thickness_mm']:.1f} mm")
        if scene.evaluation is None:
            self._title("No design yet")
            return
        words = _words(scene, scene.evaluation)
        self._title(words.title)
        for text in (words.polymer, *words.formulation, words.covered):
            self._row(text)
        self._title("Predicted")
        for label, value, is_broken in words.outcomes:
            self._row(label, value, ALERT if is_broken else TEXT)
        self._row("Reward", words.reward)

    def _text(
        self, x: float, y: float, text: str, *, width: float, fill: str = TEXT, anchor: str = "ls"
    ) -> None:
        """Write a line on the base line y, shortened where it is wider than `width`."""
        if self.font.getlength(text) > width:
            while text and self.font.getlength(text + "...") > width:
                text = text[:-1]
            text += "..."
        self.canvas.text((x, y), text, fill=fill, font=self.font, anchor=anchor)

    def _title(self, text: str) -> None:
        left, right = COLUMN_PX
        self.canvas.rectangle((left - 6, self.top, right, self.top + LINE_PX), fill=BAND)
        self._text(left, self.top + 19, text, width=right - left)
        self.top += LINE_PX + 2

    def _row(self, label: str, value: str = "", fill: str = TEXT) -> None:
        (left, right), baseline = COLUMN_PX, self.top + 19
        self._text(left, baseline, label, width=right - left)
        self._text(right, baseline, value, width=right - left, fill=fill, anchor="rs")
        self.top += LINE_PX

    def _round_the_heart(self, edv_ml: float, axis: ShortAxis) -> None:
        (x, y), width = HEART_CENTRE_PX, COLUMN_PX[0] - 20
        self._text(10, 26, "Short axis, end-diastole, to scale", width=width)
        for shift, text in ((-4, f"EDV {edv_ml:.0f} mL"), (20, "as a sphere")):
            self._text(x, y + shift, text, width=width, fill=FAINT, anchor="ms")
        bar, low = SCALE_BAR_MM * pixels_per_mm(axis), y + HEART_RADIUS_PX
        right = x + HEART_RADIUS_PX
        for line in (
            (right - bar, low, right, low),
            (right - bar, low - 4, right - bar, low + 4),
            (right, low - 4, right, low + 4),
        ):
            self.canvas.line(line, fill=TEXT, width=2)
        self._text(right - bar / 2.0, low - 8, f"{SCALE_BAR_MM:.0f} mm", width=width, anchor="ms")
        for i, (color, name) in enumerate(TISSUES.values()):
            left, top = 10 + 202 * (i % 2), 416 + 30 * (i // 2)
            self.canvas.rectangle((left, top, left + 18, top + 18), fill=color, outline=TEXT)
            self._text(left + 25, top + 16, name, width=width)
