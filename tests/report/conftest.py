from __future__ import annotations

import functools
import json
import shutil

import pytest

from hydrogel_gym.report import reading
from hydrogel_gym.report.analysis import design_patients
from hydrogel_gym.report.comparison import comparison_page
from hydrogel_gym.report.page import run_page
from hydrogel_gym.train import ppo_hybrid


@pytest.fixture(scope="session")
def trained(finished_run):
    """Directory of a finished run on twelve patients, to look at."""
    return finished_run[0].output_dir


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the run, without the oracle's folder, to do harm to."""
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.fixture(scope="session")
def read_run():
    return functools.partial(reading.read_run, make_agent=ppo_hybrid.Agent)


@pytest.fixture(scope="session")
def patients(trained, read_run):
    return design_patients(read_run(trained))


@pytest.fixture
def content(monkeypatch, read_run):
    """What a page would show of one run, or of several, without filling the template."""

    def of(*paths):
        with monkeypatch.context() as patch:
            for module in ("page", "comparison"):
                patch.setattr(f"hydrogel_gym.report.{module}.render", lambda **content: content)
            runs = [read_run(path) for path in paths]
            return run_page(*runs) if len(runs) == 1 else comparison_page(runs)

    return of


@pytest.fixture(scope="session")
def edit_json():
    def edit(path, **changes):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit
