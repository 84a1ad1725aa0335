"""The fast path: when it is taken, what it leaves alone, and what stands in for it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hydrogel_gym import load_cohort, runs
from hydrogel_gym.compiled import CompileError
from hydrogel_gym.errors import UsageError
from hydrogel_gym.runs import compiled, ranks


@pytest.fixture
def make_learner(ppo, small_run, tmp_path):
    """Makes a small learner, compiled, and its gradient step."""
    args = small_run(tmp_path)
    cohort = load_cohort(args.cohort)
    return lambda: ppo.make_learner(args, cohort, torch.device("cpu"), ranks.ALONE, True)


def test_the_weights_of_a_compiled_step_stay_those_of_the_agent(ppo, make_learner, uncompiled):
    learner, _, step = make_learner()
    torch.manual_seed(1)
    plain = ppo.Agent(**learner.architecture).state_dict()
    for name, value in learner.agent.named_parameters():
        assert torch.equal(plain[name], value), name  # compiling has changed nothing
    with torch.no_grad():
        step.flat.zero_()
    assert all(not parameter.any() for parameter in learner.agent.parameters())


def test_without_a_compiler_auto_goes_on_and_on_names_the_fallback(
    ppo, small_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(compiled, "worth_compiling", lambda num_updates: True)
    make_envs = runs.make_envs

    def refuse_to_compile(*args, compile=False, **kwargs):
        if compile:
            raise CompileError("no C++ compiler")
        return make_envs(*args, **kwargs)

    monkeypatch.setattr(runs, "make_envs", refuse_to_compile)
    args = small_run(tmp_path / "run", num_iterations=1)
    with pytest.raises(UsageError, match=r"--compile on: no C\+\+ compiler; use --compile off"):
        ppo.train(dataclasses.replace(args, compile="on"))
    assert not args.output_dir.exists()
    assert ppo.train(args)["compiled"] is False
    assert "going on without: no C++ compiler" in capsys.readouterr().err
