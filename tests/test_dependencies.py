"""The versions that the package asks for, and what is said where one is too old for a feature."""

from __future__ import annotations

import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from hydrogel_gym import HydrogelVectorEnv, RewardModelError, load_reward_model
from hydrogel_gym.compiled import CompileError
from hydrogel_gym.errors import UsageError
from hydrogel_gym.runs.devices import check_precision

CHECKOUT = Path(__file__).parents[1]
CORE = {"gymnasium", "numpy", "pandas", "torch", "tqdm"}


def pins(name: str) -> dict[str, str]:
    lines = (CHECKOUT / name).read_text(encoding="utf-8").splitlines()
    found = dict(line.split("==") for line in lines if not line.startswith("#"))
    return {canonical(package): version for package, version in found.items()}


def canonical(package: str) -> str:
    return re.sub("[-_.]+", "-", package).lower()


def number(version: str) -> tuple[int, ...]:
    parts = [int(part) for part in version.split(".") if part.isdecimal()]
    return tuple(parts + [0] * (4 - len(parts)))


@pytest.fixture(scope="module")
def bounds() -> dict[str, dict[str, str]]:
    """Lowest version of each package that an extra asks for; the core is the extra ""."""
    config = ConfigParser()
    config.read(CHECKOUT / "setup.cfg", encoding="utf-8")
    wanted = {"": config["options"]["install_requires"], **config["options.extras_require"]}
    return {
        extra: {
            canonical(package): version
            for package, version in re.findall(r"^([\w-]+) >= ([\d.]+)$", lines, re.MULTILINE)
        }
        for extra, lines in wanted.items()
    }


def test_the_core_asks_for_five_packages(bounds):
    assert bounds[""].keys() == CORE


WITHOUT_EXTRAS = """
import runpy, sys
for name in "itables jinja2 matplotlib PIL plotly pyarrow rdkit sklearn tyro wandb".split():
    sys.modules[name] = None  # importing it fails
runpy.run_module("hydrogel_gym", run_name="__main__")
"""


def test_the_core_passes_its_own_checks_without_any_extra():
    run = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_the_lower_bounds_are_versions_that_the_tests_run_on(bounds):
    oldest = pins("constraints-oldest.txt")
    for extra in ("", "train", "stage1", "track", "render", "sb3"):
        for package, version in bounds[extra].items():
            assert number(oldest[package]) == number(version), package


def test_the_pinned_versions_are_within_all_bounds(bounds):
    newest = pins("constraints.txt")
    for extra in bounds.keys() - {"mutation"}:  # has an environment of its own
        wanted = bounds[extra]
        for package, version in wanted.items():
            assert number(newest[package]) >= number(version), f"{package} of {extra or 'the core'}"


@pytest.fixture
def old_torch(monkeypatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.4.1"))


def test_torch_that_is_too_old_for_a_feature_is_named_with_the_version_that_it_needs(old_torch):
    with pytest.raises(RewardModelError, match=r"^reward_model 'a\.pt2': programs need torch 2\.1"):
        load_reward_model("a.pt2")
    message = r"compiling needs torch 2\.10 or later; this is 2\.4\.1; compile=False runs the same"
    with pytest.raises(CompileError, match=message):
        HydrogelVectorEnv(2, compile=True)
    message = r"^--precision bf16 needs torch 2\.13 or later on a CPU; this is 2\.4\.1; use .*32$"
    with pytest.raises(UsageError, match=message):
        check_precision("bf16", torch.device("cpu"))
