"""How long the report of a run takes, what it weighs, and how soon a browser shows it.

    python benchmark/report.py

Trains the quick preset on the 2,000 shipped patients (two minutes on two cores, of which the
oracle takes most), unless `--run` names a run directory, and writes `results/report.md` and, where
there is a Chromium, `report.png`. Needs `pip install -e ".[test]"`.
"""

from __future__ import annotations

import argparse
import io
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import itables
import plotly
import torch
from PIL import Image

from hydrogel_gym.files import write_atomically

if TYPE_CHECKING:
    from playwright.sync_api import Page

HERE = Path(__file__).parent
RESULTS, TRAIN = HERE / "results", HERE.parent / "train"
MAX_SECONDS, MAX_MB = 20.0, 8.0
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENT = "P0004"  # on the picture


def hardware() -> str:
    """Processor, versions and commit."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude", "*"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return (
        f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads; "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"plotly {plotly.__version__}, itables {itables.__version__}; commit {commit or 'unknown'}"
    )


def script(name: str, *args: str) -> None:
    """Run a script of `train/` to its end."""
    subprocess.run([sys.executable, str(TRAIN / name), *args], check=True)


def time_reports(run: Path, output: Path, rounds: int) -> list[float]:
    """Seconds of the whole process, imports included."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        script("report.py", str(run), "--output", str(output))
        seconds.append(time.perf_counter() - start)
    return seconds


def look(page_path: Path, rounds: int) -> tuple[list[float], bytes]:
    """Seconds until a browser shows table and patient, and a picture of top and patient view."""
    from playwright.sync_api import sync_playwright

    seconds = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for _ in range(rounds):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            start = time.perf_counter()
            page.goto(page_path.as_uri())
            page.wait_for_selector("#patient-table tbody td:nth-child(3)")
            seconds.append(time.perf_counter() - start)
        page.locator("#patient-input").fill(PATIENT)
        page.keyboard.press("Enter")
        page.locator("#patient-input").blur()
        shots = [
            between(page, "header", "nav"),
            between(page, "#learning-curves", "#learning-curves .tables"),
            between(page, "#patient", "#slices figure:nth-child(3)"),
        ]
        browser.close()
    return seconds, stack(shots)


def between(page: Page, first: str, last: str) -> bytes:
    """Picture from the top of one element to the top of another."""
    boxes = [page.locator(selector).bounding_box() for selector in (first, last)]
    top, bottom = (box["y"] + page.evaluate("scrollY") for box in boxes)
    clip = {"x": 0, "y": top - 8, "width": 1280, "height": bottom - top}
    return page.screenshot(full_page=True, clip=clip)


def stack(pngs: list[bytes]) -> bytes:
    """Pictures of one width under each other, in 256 colours."""
    images = [Image.open(io.BytesIO(png)).convert("RGB") for png in pngs]
    whole = Image.new("RGB", (images[0].width, sum(image.height for image in images)), "white")
    y = 0
    for image in images:
        whole.paste(image, (0, y))
        y += image.height
    buffer = io.BytesIO()
    whole.quantize(256).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def row(what: str, values: list[float], unit: str, limit: float | None = None) -> str:
    """A row of the table: median, range, and whether the limit is kept."""
    middle = statistics.median(values)
    bar = "–" if limit is None else f"{limit:g} {unit}, {'met' if middle < limit else 'missed'}"
    return f"| {what} | {middle:.2f} {unit} [{min(values):.2f}, {max(values):.2f}] | {bar} |"


def main() -> None:
    """Measure, and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="run directory of the shipped patients")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = args.run or Path(folder) / "quick-s1"
        if args.run is None:
            script("ppo_hybrid.py", "--preset", "quick", "--output-dir", str(run))
        page_path = Path(folder) / "report.html"
        seconds = time_reports(run, page_path, args.rounds)
        rows = [
            row("building it, from the start of the process", seconds, "s", MAX_SECONDS),
            row("its size", [page_path.stat().st_size / 1e6], "MB", MAX_MB),
        ]
        if CHROMIUM:
            shown, picture = look(page_path, args.rounds)
            rows.append(row("a browser shows it, from opening it", shown, "s"))
            write_atomically(RESULTS / "report.png", picture)
    lines = [
        f"The report of the quick preset on the 2,000 shipped patients, median of {args.rounds} "
        f"and range; {hardware()}; made by `benchmark/report.py`.",
        "",
        "| | | bar |",
        "|---|---|---|",
        *rows,
    ]
    write_atomically(RESULTS / "report.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
