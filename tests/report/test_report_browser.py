"""The report in a browser: it loads from disk alone, and does what its controls promise."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hydrogel_gym.problem.fields import COVERAGE_FRACTIONS
from hydrogel_gym.report.analysis import SLICE_POINTS, design_patients
from hydrogel_gym.train import report

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path"),
]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
ROWS = "#patient-table tbody tr"


@pytest.fixture(scope="module")
def paths(finished_run, tmp_path_factory) -> dict[str, Path]:
    """Pages of a run with an oracle, of one that is partial, and of both."""
    folder = tmp_path_factory.mktemp("runs")
    run = finished_run[0].output_dir
    shutil.copytree(run.parent / "oracle", folder / "oracle")
    one, two = (shutil.copytree(run, folder / name) for name in ("one", "two"))
    for name in ("summary.json", "stage2_policy.pt"):
        (two / name).unlink()
    shutil.rmtree(two / "checkpoints")
    for runs in ([one], [two], [one, two]):
        assert report.main([str(path) for path in runs]) == 0
    return {
        "one run": one / "report.html",
        "partial": two / "report.html",
        "comparison": folder / "comparison.html",
    }


@pytest.fixture(scope="module")
def patients(paths, read_run):
    return design_patients(read_run(paths["one run"].parent))


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, paths):
    """Opens a page, which by the end of the test has complained of nothing and fetched nothing."""
    said, pages = [], []

    def open_page(name: str = "one run", patient: str | None = None, **options):
        page = browser.new_page(**{"viewport": DESKTOP} | options)
        pages.append(page)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url))
        page.goto(paths[name].as_uri())
        page.wait_for_selector(".main-svg")
        if name == "one run":
            page.wait_for_selector(f"{ROWS} td:nth-child(3)")
        if patient:
            page.locator("#patient-input").fill(patient)
            page.keyboard.press("Enter")
        return page

    yield open_page
    for page in pages:
        page.close()
    own = {path.as_uri() for path in paths.values()}
    # A module of this file's own text has a `blob:` address.
    assert [text for text in said if text not in own and not text.startswith("blob:null/")] == []


def slice_markers(page) -> list:
    """Where the chosen design lies on each slice."""
    return page.evaluate(
        "[...document.querySelectorAll('.slice')].map((e) => e.data.at(-1))"
        ".map((chosen) => [chosen.x[0], chosen.y[0]])"
    )


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", ["one run", "partial", "comparison"])
def test_page_loads_and_is_neither_blank_nor_wider_than_the_screen(visit, name, viewport):
    page = visit(name, viewport=viewport, has_touch=viewport is PHONE, is_mobile=viewport is PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    # On a phone, buttons would lie on the plots.
    assert (page.locator(".modebar-btn").count() == 0) == (viewport is PHONE)
    for plot in page.locator(".plot").all():
        assert plot.locator(".main-svg").count() > 0
        picture = Image.open(io.BytesIO(plot.screenshot())).convert("L")
        assert np.asarray(picture, float).std() > 5


def test_patient_is_chosen_by_search_row_or_keyboard_and_an_unknown_one_refused(visit):
    page = visit()
    search, title = page.get_by_role("searchbox"), page.locator("#patient-title")
    first = page.locator(f"{ROWS} td:first-child")
    search.fill("P0003")
    assert first.all_inner_texts() == ["P0003"]
    search.fill("")
    assert page.locator(ROWS).count() == 10
    assert title.inner_text() == "Patient P0000"
    picture, markers = page.locator("#short-axis").inner_html(), slice_markers(page)
    page.locator(ROWS).nth(4).locator("td").nth(1).click()
    assert title.inner_text() == "Patient P0004"
    assert page.locator("#short-axis").inner_html() != picture
    assert all(new != old for new, old in zip(slice_markers(page)[:4], markers[:4], strict=True))
    page.locator("#patient-next").press("Enter")
    assert page.locator("#patient-input").input_value() == "P0005"
    page.locator("#patient-input").fill("P9999")
    page.keyboard.press("Enter")
    assert page.locator("#patient-error").inner_text() == "There is no patient P9999."
    assert title.inner_text() == "Patient P0005"
    # Also after sorting, and on another page of the table.
    page.locator("#patient-table thead th", has_text="reward").first.click()
    page.locator(".dt-paging button", has_text="2").first.click()
    first.first.click()
    assert title.inner_text() == f"Patient {first.first.inner_text()}"


def test_drawing_is_to_scale(visit, patients):
    row = 6
    page = visit(patient=patients.cohort.patient_ids[row])
    features = {name: column[row] for name, column in patients.features.items()}
    cavity, muscle = (
        float(page.locator(f"#short-axis .{part}").get_attribute("r"))
        for part in ("cavity", "remote")
    )
    # A prolate spheroid twice as long as wide: 8/3 pi r^3.
    volume_ml = 8.0 / 3.0 * np.pi * cavity**3 / 1000.0
    assert volume_ml == pytest.approx(features["edv_ml"], rel=1e-4)
    assert muscle - cavity == pytest.approx(features["wall_thickness_mm"], rel=1e-4)
    top, width = page.evaluate(
        "(({y, width}) => [y, width])(document.querySelector('#short-axis .patch').getBBox())"
    )
    outer = muscle + patients.formulation[row, 3]
    assert -top == pytest.approx(outer, abs=0.05)
    covered = COVERAGE_FRACTIONS[patients.coverage[row]] * features["bz_fraction_pct"]
    half = min(np.pi * (features["scar_fraction_pct"] + covered) / 100.0, np.pi / 2)
    assert width == pytest.approx(2 * outer * np.sin(half), abs=0.1)


def test_slices_of_the_page_are_those_of_the_reward_model(visit, patients):
    page = visit(patient=patients.cohort.patient_ids[9])
    drawn = page.evaluate("[...document.querySelectorAll('.slice')].map((e) => e.data[0].y)")
    np.testing.assert_allclose(np.concatenate(drawn), patients.slices.reward[9], atol=0.0051)
    unsafe = page.evaluate(
        "[...document.querySelectorAll('.slice')].slice(0, 4).map((e) => e.data[1].x.length)"
    )
    assert sum(unsafe) == patients.slices.is_unsafe[9, : 4 * SLICE_POINTS].sum()
