"""Draw `_static/dataflow-light.svg` and `_static/dataflow-dark.svg`: what flows where.

python docs/diagrams.py
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

STATIC = Path(__file__).resolve().parent / "_static"
WIDTH, HEIGHT, BOX_HEIGHT = 960, 400, 62
THEMES = {
    "light": {"ink": "#1b1b1b", "soft": "#5a5a5a", "data": "#e3eefb", "code": "#fdf0dc"},
    "dark": {"ink": "#eeeeee", "soft": "#a8a8a8", "data": "#1f3550", "code": "#4a3a1c"},
}


class Box(NamedTuple):
    """A box: its left upper corner, width, kind (data or code) and two lines of text."""

    x: int
    y: int
    width: int
    kind: str
    title: str
    file: str


BOXES = {
    "patients": Box(20, 20, 200, "data", "Virtual patients", "patients/*.csv"),
    "polymers": Box(20, 110, 200, "data", "24 polymers", "polymers.csv"),
    "model": Box(20, 200, 200, "code", "Reward model (Stage 1)", "mechanistic, .pt, .pt2"),
    "outcomes": Box(20, 310, 200, "data", "Table of outcomes", "train/fit_stage1.py"),
    "env": Box(300, 110, 200, "code", "Environment", "HydrogelDesign-v0"),
    "oracle": Box(300, 310, 200, "code", "Oracle", "hydrogel_gym.oracle"),
    "trainer": Box(560, 110, 170, "code", "Trainer", "train/ppo_hybrid.py"),
    "policy": Box(560, 210, 170, "data", "Policy", "stage2_policy.pt"),
    "report": Box(560, 310, 170, "data", "Regret and report", "summary.json, report"),
    "designs": Box(780, 110, 160, "code", "Candidates", "and refinement"),
    "ranking": Box(780, 210, 160, "code", "Ranking", "rank_designs.py"),
    "stage3": Box(780, 310, 160, "data", "Designs for Stage 3", "ranked_designs.parquet"),
}
# Each arrow is a line of points.
ARROWS = [
    [(220, 51), (260, 51), (260, 125), (300, 125)],  # patients to environment
    [(220, 141), (300, 141)],
    [(220, 231), (260, 231), (260, 157), (300, 157)],  # model to environment
    [(120, 310), (120, 262)],  # outcomes to model
    [(220, 246), (280, 246), (280, 341), (300, 341)],  # model to oracle
    [(500, 130), (560, 130)],
    [(560, 152), (500, 152)],
    [(645, 172), (645, 210)],
    [(645, 272), (645, 310)],
    [(500, 341), (560, 341)],
    [(730, 241), (755, 241), (755, 141), (780, 141)],  # policy to candidates
    [(860, 172), (860, 210)],
    [(860, 272), (860, 310)],
]
LABELS = [(530, 124, "reward"), (530, 168, "design")]


def svg(theme: str) -> str:
    """The drawing in the colours of a theme."""
    color = THEMES[theme]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="15" text-anchor="middle">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
        f'markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z" fill="{color["soft"]}"/>'
        "</marker></defs>",
    ]
    for points in ARROWS:
        line = " ".join(f"{x},{y}" for x, y in points)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{color["soft"]}" '
            'stroke-width="1.5" marker-end="url(#tip)"/>'
        )
    for box in BOXES.values():
        middle = box.x + box.width // 2
        parts += [
            f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{BOX_HEIGHT}" '
            f'rx="{6 if box.kind == "code" else 0}" fill="{color[box.kind]}" '
            f'stroke="{color["soft"]}"/>',
            f'<text x="{middle}" y="{box.y + 27}" fill="{color["ink"]}">{box.title}</text>',
            f'<text x="{middle}" y="{box.y + 47}" font-size="12" fill="{color["soft"]}">'
            f"{box.file}</text>",
        ]
    parts += [
        f'<text x="{x}" y="{y}" font-size="12" fill="{color["soft"]}">{text}</text>'
        for x, y, text in LABELS
    ]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    for name in THEMES:
        (STATIC / f"dataflow-{name}.svg").write_text(svg(name), encoding="utf-8")
