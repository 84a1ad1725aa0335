"""Sweep files: W&B's schema, its search engine, and the trainer's flags agree on them."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from hydrogel_gym import runs
from hydrogel_gym.runs import metrics

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "train" / "sweeps").glob("*.yaml"))


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_parameter_is_a_flag_and_the_objective_a_metric(ppo, path):
    sweep = load(path)
    assert set(sweep["parameters"]) <= set(ppo.Args.__dataclass_fields__)
    assert sweep["metric"]["name"] in metrics.KEYS.values()
    assert (ROOT / sweep["program"]).is_file()


@pytest.mark.parametrize(
    ("words", "value"),
    [(["--anneal_lr=True"], True), (["--anneal_lr=False"], False), (["--anneal-lr=false"], False)],
)
def test_booleans_are_read_as_an_agent_writes_them(ppo, words, value):
    argv = ["--preset=quick", *words]
    args = runs.read_run_options(ppo.Args, ppo.PRESETS, argv, prog="ppo_hybrid.py")
    assert args.anneal_lr is value


def agent_command(sweep: dict, config: dict) -> list[str]:
    """What W&B's agent would run for proposed parameters."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    parts = {
        "${env}": ["/usr/bin/env"],
        "${interpreter}": [sys.executable],
        "${program}": [str(ROOT / sweep["program"])],
        "${args}": create_sweep_command_args({"args": config})["args"],
    }
    return [word for part in sweep["command"] for word in parts.get(part, [part])]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_proposed_runs_are_trained_and_logged_as_one_run_each(
    ppo, small_run, tmp_path, environ_without_wandb, path
):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pydantic, while it is imported
        sweeps = pytest.importorskip("sweeps", reason="W&B's search engine is not installed")
        from sweeps.config import schema_violations_from_proposed_config
    sweep = load(path)
    assert schema_violations_from_proposed_config(sweep) == []
    (run,) = sweeps.next_runs(sweep, [], validate=True, n=1)
    patients = small_run(tmp_path)
    short = ["--num-iterations=2", f"--cohort={patients.cohort}", "--no-oracle"]
    short += [f"--holdout-cohort={patients.holdout_cohort}"]
    agent = {"WANDB_MODE": "offline", "WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r"}
    path_to_torchrun = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        agent_command(sweep, run.config) + short,
        cwd=tmp_path,
        env=environ_without_wandb | agent | {"OMP_NUM_THREADS": "1", "PATH": path_to_torchrun},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    output_dir = tmp_path / "runs" / "sweep-s" / "r"
    assert (output_dir / "summary.json").is_file()
    assert len(list(output_dir.glob("wandb/offline-run-*-r/run-r.wandb"))) == 1, done.stderr
