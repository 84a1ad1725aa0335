"""The fast path: when it is taken, what it leaves alone, and what stands in for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from hydrogel_gym import load_cohort, runs
from hydrogel_gym.compiled import CompileError
from hydrogel_gym.runs import compiled, ranks

TRAINER = Path(__file__).parents[2] / "train" / "ppo_hybrid.py"


@pytest.fixture
def make_learner(ppo, small_run, tmp_path):
    """Makes a small learner, compiled, and its gradient step."""
    args = small_run(tmp_path)
    cohort = load_cohort(args.cohort)
    return lambda: ppo.make_learner(args, cohort, torch.device("cpu"), ranks.ALONE, True)


def test_a_graph_is_made_from_inputs_that_are_not_one_tensor(make_learner, uncompiled, monkeypatch):
    seen = []

    def record(function, device):
        return lambda *inputs: (
            seen.append(tree_map(torch.Tensor.data_ptr, inputs)) or function(*inputs)
        )

    monkeypatch.setattr(compiled, "compile_function", record)
    make_learner()
    assert len(seen) == 2  # acting and learning
    for inputs in seen:
        addresses = tree_leaves(inputs)
        assert len(set(addresses)) == len(addresses) > 2


def test_the_weights_of_a_compiled_step_stay_those_of_the_agent(ppo, make_learner, uncompiled):
    learner, _, step = make_learner()
    torch.manual_seed(1)
    plain = ppo.Agent(**learner.architecture).state_dict()
    for name, value in learner.agent.named_parameters():
        assert torch.equal(plain[name], value), name  # compiling has changed nothing
    with torch.no_grad():
        step.flat.zero_()
    assert all(not parameter.any() for parameter in learner.agent.parameters())


def test_auto_goes_on_without_a_compiler(ppo, small_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compiled, "worth_compiling", lambda num_updates: True)
    make_envs = runs.make_envs

    def refuse_to_compile(*args, compile=False, **kwargs):
        if compile:
            raise CompileError("no C++ compiler")
        return make_envs(*args, **kwargs)

    monkeypatch.setattr(runs, "make_envs", refuse_to_compile)
    summary = ppo.train(small_run(tmp_path / "run", num_iterations=1))
    assert summary["compiled"] is False
    assert "going on without: no C++ compiler" in capsys.readouterr().err


@pytest.mark.slow
def test_a_machine_without_a_compiler_gets_one_line_that_names_the_fallback(tmp_path):
    command = [sys.executable, str(TRAINER), "--preset", "quick", "--compile", "on"]
    command += ["--num-envs", "50", "--minibatch-size", "50", "--no-oracle"]
    without = {"CXX": "/absent/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c")}
    result = subprocess.run(
        command, cwd=tmp_path, env=os.environ | without, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "--compile on" in error
    assert "use --compile off" in error
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()
