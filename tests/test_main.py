from __future__ import annotations

import hashlib
import importlib
import runpy
import sys
from importlib.resources import files

import pytest
import torch

import hydrogel_gym
from hydrogel_gym import compute_reward, load_cohort, load_reward_model
from hydrogel_gym.problem import dynamics


@pytest.fixture(scope="module")
def program():
    return importlib.import_module("hydrogel_gym.__main__")


def test_reference_rewards_are_those_of_the_model_in_double_precision(program):
    polymer_id, formulation, coverage = program.REFERENCE_DESIGN
    expected = torch.tensor(program.REFERENCE_REWARDS, dtype=torch.float64)
    count = len(expected)
    outcomes = load_reward_model("mechanistic")(
        load_cohort().features[:count],
        torch.full((count,), polymer_id),
        torch.tensor([formulation] * count, dtype=torch.float64),
        torch.full((count,), coverage),
    )
    torch.testing.assert_close(compute_reward(outcomes), expected, rtol=0.0, atol=1e-6)


def test_sound_package_says_what_it_is_and_passes_its_checks_from_an_empty_folder(
    program, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hydrogel_gym"])
    monkeypatch.delitem(sys.modules, "hydrogel_gym.__main__")
    with pytest.raises(SystemExit, match="^0$"):  # as `python -m hydrogel_gym` ends
        runpy.run_module("hydrogel_gym", run_name="__main__")
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert lines[0] == f"hydrogel_gym {hydrogel_gym.__version__}"
    assert lines[1] == (
        "environments: HydrogelDesign-v0, HydrogelDesignFlat-v0, HydrogelDesignDiscrete-v0, "
        "HydrogelAdapt-v0"
    )
    digest = hashlib.sha256((files("hydrogel_gym.patients") / "cohort.csv").read_bytes())
    assert f"cohort.csv: sha256 {digest.hexdigest()}" in lines
    assert "ok: data: 2,000 and 500 synthetic patients, 24 polymers" in lines
    verdicts = [line.partition(":")[0] for line in lines[-len(program.CHECKS) :]]
    assert verdicts == ["ok"] * len(program.CHECKS)


def test_wrong_reward_fails_the_self_check_and_a_missing_device_is_one_line(
    program, capsys, monkeypatch
):
    right = dynamics.reward_terms

    def wrong(*args, **kwargs):
        terms = right(*args, **kwargs)
        return terms._replace(reward_delta_ef=terms.reward_delta_ef * 1.01)

    monkeypatch.setattr(dynamics, "reward_terms", wrong)
    assert program.main([]) == 1
    out = capsys.readouterr().out
    assert "FAILED: rewards: AssertionError: found [" in out
    assert "expected [33.423765 25.805065 30.246383]" in out
    assert "ok: data" in out
    assert program.main(["--device", "cupboard"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("--device is 'cupboard', which is not there: ")
