"""What the tests of runs share: runs that were cut short, and what makes two runs the same."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from hydrogel_gym.runs import checkpoints

TIMING = "rollout_seconds reward_model_seconds update_seconds wall_seconds samples_per_second"


@pytest.fixture(autouse=True)
def _quick(without_pictures):
    """No pictures, but for those of the shared runs."""


def checkpoint(output_dir: Path, iteration: int) -> Path:
    return output_dir / "checkpoints" / f"checkpoint-{iteration:06d}.pt"


def iterations_saved(output_dir: Path) -> list[int]:
    return [int(path.stem[-6:]) for path in checkpoints.checkpoints(output_dir)]


def killed(args, output_dir: Path, *, at: int = 4):
    """What a run leaves that was killed one iteration after its newest checkpoint, of `at`."""
    shutil.copytree(args.output_dir, output_dir)
    for iteration in iterations_saved(output_dir):
        if iteration > at:
            checkpoint(output_dir, iteration).unlink()
    for name in ("summary.json", "stage2_policy.pt"):
        (output_dir / name).unlink()
    metrics = output_dir / "metrics.csv"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[: at + 2]))
    return dataclasses.replace(args, output_dir=output_dir, resume="auto")


def edit(path: Path, change) -> None:
    """Change the content of a checkpoint, and seal it again."""
    saved = checkpoints.unseal(path.read_bytes())
    change(saved)
    path.write_bytes(checkpoints.seal(saved))


def policy(output_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(output_dir / "stage2_policy.pt", weights_only=True)["policy_state_dict"]


def metrics(output_dir: Path, **options) -> pd.DataFrame:
    return pd.read_csv(output_dir / "metrics.csv", **options).drop(columns=TIMING.split())


def assert_same(output_dir: Path, expected_dir: Path, tolerance: float = 0.0) -> None:
    """Weights, buffers and every metric but times are bit-equal, or as far as rounding allows."""

    def parts(folder: Path) -> dict[str, torch.Tensor]:
        state, ends = policy(folder), ("weight", "bias", "log_std")
        weights = [state.pop(name).flatten() for name in list(state) if name.endswith(ends)]
        return state | {"weights": torch.cat(weights)}

    found, expected = parts(output_dir), parts(expected_dir)
    for name in expected:
        distance = (found[name] - expected[name]).norm() / expected[name].norm()
        assert distance <= tolerance, (name, distance)
    exact = {} if tolerance else {"dtype": str}  # to the last digit
    tables = (metrics(folder, **exact) for folder in (output_dir, expected_dir))
    pd.testing.assert_frame_equal(*tables, rtol=max(1e-6, 10 * tolerance))
    assert pd.read_csv(output_dir / "metrics.csv")["wall_seconds"].is_monotonic_increasing
    one, two = (json.loads((d / "summary.json").read_text()) for d in (output_dir, expected_dir))
    for name in ("mean_reward", "entropy", "holdout_deterministic_reward"):
        assert one[name] == pytest.approx(two[name], rel=tolerance, abs=0.0)


@pytest.fixture(scope="session")
def of_runs():
    """Functions that look at run directories, or make some that are left after a failure."""
    functions = checkpoint, iterations_saved, killed, edit, policy, metrics, assert_same
    return SimpleNamespace(**{function.__name__: function for function in functions})


@pytest.fixture
def cut(finished_run, tmp_path):
    """Arguments with which the shared run goes on that was killed in its fifth iteration."""
    folder = tmp_path / "cut"
    shutil.copytree(finished_run[0].output_dir.parent / "oracle", folder / "oracle")
    return killed(finished_run[0], folder / "run")
