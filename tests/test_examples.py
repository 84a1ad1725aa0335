"""Each example runs as its docstring says and ends with the line that the README's table has."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SAMPLES = 4000
# What an example needs beside the package itself.
NEEDS = {"plain_gymnasium": None, "cleanrl_continuous": None}
NEEDS |= {"stable_baselines3_ppo": "stable_baselines3", "rllib_ppo": "ray"}
NEEDS |= {f"{name}_ppo": name for name in ("torchrl", "skrl", "tianshou", "rsl_rl", "agilerl")}
LAST_LINE = re.compile(r"fraction of oracle on held-out patients: (\d\.\d+) \((\d+) samples, .*")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all of them run, so that the oracle searches once."""
    return tmp_path_factory.mktemp("examples")


def run(name, folder, samples):
    """Fraction of the oracle, and samples, that an example ends with."""
    if NEEDS[name] is not None and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"could not import {NEEDS[name]!r}")
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", "--samples", str(samples)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = LAST_LINE.fullmatch(done.stdout.splitlines()[-1])
    assert found, done.stdout
    return float(found[1]), int(found[2])


def test_every_example_is_tried():
    assert {path.stem for path in EXAMPLES.glob("*.py")} - {"shared"} == set(NEEDS)


@pytest.mark.integration
@pytest.mark.parametrize("name", NEEDS)
def test_example_ends_with_its_fraction_of_the_oracle(name, folder):
    fraction, samples = run(name, folder, SAMPLES)
    assert 0.0 < fraction <= 1.001
    assert samples >= SAMPLES


@pytest.mark.integration
def test_stable_baselines3_comes_near_the_oracle(folder):
    fraction, samples = run("stable_baselines3_ppo", folder, 100_000)
    assert samples <= 2_000_000
    assert fraction >= 0.90
