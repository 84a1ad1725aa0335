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


def test_threads_that_share_a_minibatch_update_as_one_that_has_it_whole(
    ppo, make_learner, uncompiled, monkeypatch
):
    weights, parts = [], []
    for workers in (1, 3):
        monkeypatch.setattr(compiled, "num_workers", lambda *_, n=workers: n)
        learner, act, step = make_learner()
        assert step.workers == workers
        width, generator = len(learner.agent.obs_mean), torch.Generator().manual_seed(0)
        noise = ppo.draw_noise(24, dim=4, generator=generator)
        obs = torch.linspace(-1.0, 1.0, 24 * width).view(24, width)
        with torch.no_grad():
            action, logprob, value, _ = act(learner.agent, obs, noise)
        advantage = torch.linspace(-1.0, 1.0, 24)
        batch = ppo.Batch(obs, action, logprob, advantage, value + advantage, value)
        parts.append([step(batch) for _ in range(3)][-1])
        weights.append(step.flat.detach())
    for name in parts[0]:
        torch.testing.assert_close(*(each[name] for each in parts), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_threads_are_as_many_as_torch_may_use_and_divide_a_minibatch(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    cpu = torch.device("cpu")
    assert [compiled.num_workers(rows, cpu) for rows in (2000, 6, 7, 1)] == [5, 6, 1, 1]
    assert compiled.num_workers(2000, torch.device("cuda")) == 1
