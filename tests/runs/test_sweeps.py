"""Sweep files: every run that they propose is one that the trainer understands."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hydrogel_gym import runs
from hydrogel_gym.runs import metrics

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "train" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_proposal_is_a_run_and_the_objective_a_metric(ppo, path):
    sweep = yaml.safe_load(path.read_text())
    assert sweep["metric"]["name"] in metrics.KEYS.values()
    assert (ROOT / sweep["program"]).is_file()
    assert sweep["command"][-2:] == ["${program}", "${args}"]
    proposals = {
        name: how.get("values") or ([how["value"]] if "value" in how else [how["min"], how["max"]])
        for name, how in sweep["parameters"].items()
    }
    for end in (0, -1):
        # As an agent writes them: --anneal_lr=True
        flags = [f"--{name}={values[end]}" for name, values in proposals.items()]
        args = runs.read_run_options(ppo.Args, ppo.PRESETS, flags, prog="ppo_hybrid.py")
        assert {name: getattr(args, name) for name in proposals} == {
            name: values[end] for name, values in proposals.items()
        }
        ppo.check_args(args, runs.ALONE)
    for words, value in (("--anneal_lr=False", False), ("--anneal-lr=false", False)):
        argv = ["--preset=quick", words]
        args = runs.read_run_options(ppo.Args, ppo.PRESETS, argv, prog="ppo_hybrid.py")
        assert args.anneal_lr is value
