"""CUDA graphs, as far as they can be tried without a GPU: by a stand-in that keeps to their rules.

What a graph does is to repeat what was recorded on the same memory, with the same numbers. The
stand-in does that with operations on the CPU.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hydrogel_gym
from hydrogel_gym import runs
from hydrogel_gym.runs import compiled, graphs, ranks

pytestmark = pytest.mark.torch("2.10")  # older ones compile nothing

# Reads on the host, shapes that depend on data, and what was made on the host.
REFUSED = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "lift_fresh")


def tensors(values):
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def memory(tensor):
    return tensor.untyped_storage()._cdata


class Graph:
    """Stands in for `torch.cuda.CUDAGraph`."""

    made: list[Graph] = []

    def __init__(self):
        self.calls, self.generators, self.replays = [], [], 0
        self.made.append(self)

    def register_generator_state(self, generator):
        self.generators.append(generator)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, results in self.calls:
            found = tensors(function(*args, **kwargs))
            for kept, value in zip(tensors(results), found, strict=True):
                if memory(kept) != memory(value):
                    kept.copy_(value)


class Recording(TorchDispatchMode):
    """Stands in for `torch.cuda.graph`: what is recorded has not happened."""

    now: Recording | None = None

    def __init__(self, graph):
        super().__init__()
        self.graph, self.new, self.before = graph, set(), {}

    def __enter__(self):
        Recording.now = self
        self.states = [generator.get_state() for generator in self.graph.generators]
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        Recording.now = None
        for storage, content in self.before.values():
            storage.copy_(content)
        for generator, state in zip(self.graph.generators, self.states, strict=True):
            generator.set_state(state)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        assert name not in REFUSED, name
        drawn_from = [x for x in tree_leaves(kwargs) if isinstance(x, torch.Generator)]
        registered = [each.initial_seed() for each in self.graph.generators]
        assert all(each.initial_seed() in registered for each in drawn_from)
        if function._schema.is_mutable:
            for each in tensors((args, kwargs)):
                if memory(each) not in self.new | self.before.keys():
                    storage = each.untyped_storage()
                    self.before[memory(each)] = storage, storage.clone()
        results = function(*args, **kwargs)
        given = {memory(each) for each in tensors((args, kwargs))}
        self.new |= {memory(each) for each in tensors(results)} - given
        self.graph.calls.append((function, args, kwargs, results))
        return results


@pytest.fixture
def recorded(monkeypatch, uncompiled):
    """Has compiled runs on the CPU record graphs as on CUDA; the graphs that were made."""
    adam_step, make_envs = torch.optim.Adam.step, runs.make_envs

    def step(self):
        (group,) = self.param_groups
        assert group["capturable"] is bool(Recording.now)  # else it refuses, or warns
        return adam_step(self)

    def make_unchecked_envs(*args, **kwargs):
        envs = make_envs(*args, **kwargs)
        envs.problem.validate = False
        return envs

    def apply():
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", Recording)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(Recording.now))
        monkeypatch.setattr(Graph, "made", made := [])
        monkeypatch.setattr(torch.optim.Adam, "step", step)
        monkeypatch.setattr(runs, "make_envs", make_unchecked_envs)
        monkeypatch.setattr(compiled, "has_graphs", lambda device: True)
        monkeypatch.setattr(compiled, "compile_function", lambda f, _: graphs.Replayed(f))
        monkeypatch.setattr(compiled, "num_workers", lambda *_: 1)
        # Another thread would not be recorded; on CUDA there is none.
        monkeypatch.setattr(compiled.CompiledStep, "in_worker", lambda self, f, *args: f(*args))
        return made

    return apply


@pytest.mark.parametrize(
    "function",
    [lambda x: x + torch.tensor(1.0), lambda x: x * float(x[0]), torch.nonzero],
    ids=["made on the host", "read", "of a shape that depends on data"],
)
def test_the_stand_in_refuses_what_cuda_does(recorded, function):
    recorded()
    replayed = graphs.Replayed(function, 0)
    with pytest.raises(AssertionError, match="|".join(REFUSED)):
        replayed(torch.ones(3))


def test_the_stand_in_repeats_what_was_recorded_with_what_its_tensors_hold_then(recorded):
    recorded()
    weight, number, generator = torch.ones(3), 2.0, torch.Generator().manual_seed(0)

    def function(x):
        weight.add_(x * number)
        return weight + torch.randperm(3, generator=generator)

    replayed = graphs.Replayed(function, 1, generator)
    expected = torch.Generator().manual_seed(0)
    for x, total in ((1.0, 3.0), (2.0, 7.0), (3.0, 13.0)):
        order = torch.randperm(3, generator=expected)
        torch.testing.assert_close(replayed(torch.full((3,), x)), total + order)
        assert weight.tolist() == [total] * 3
    number = 9.0  # recorded as 2
    replayed(torch.ones(3))
    assert weight.tolist() == [15.0] * 3


def test_what_cannot_be_recorded_goes_on_as_it_is_and_says_so(recorded, monkeypatch, capsys):
    recorded()

    def function(x):
        if Recording.now:
            raise RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")
        return x + 1

    replayed = graphs.Replayed(function, 1)
    assert [replayed(torch.tensor(float(k))).item() for k in range(4)] == [1.0, 2.0, 3.0, 4.0]
    message = "no CUDA graph, going on without: CUDA error: operation not permitted\n"
    assert capsys.readouterr().err == message  # once


CASES = [
    dict(num_epochs=3, temperature=0.3),
    dict(num_epochs=3, target_kl=0.01, minibatch_size=96, learning_rate=1e-2),
    dict(env_id=runs.ADAPTIVE, horizon=3, reward_mode="score", patient_assignment="random"),
]


@pytest.mark.parametrize("changes", CASES, ids=["temperature", "target_kl", "adaptive"])
def test_a_run_of_graphs_is_the_run_without_and_is_resumed_where_it_was(
    ppo, small_run, recorded, of_runs, tmp_path, monkeypatch, changes
):
    for name in ("learning_rate_at", "advantage_unit_at"):  # graphs have them in float32
        plain = getattr(ppo, name)

        def rounded(*args, plain=plain):
            return None if (value := plain(*args)) is None else float(np.float32(value))

        monkeypatch.setattr(ppo, name, rounded)
    args = small_run(tmp_path / "plain", compile="on", **changes)
    ppo.train(args)
    made = recorded()
    with_graphs = dataclasses.replace(args, output_dir=tmp_path / "graphs")
    ppo.train(with_graphs)
    of_runs.assert_same(with_graphs.output_dir, args.output_dir)
    # The first rollout and the first epoch run as they are.
    rollouts, epochs = sorted(1 + graph.replays for graph in made)[-2:]
    most = args.num_iterations * args.num_epochs
    assert rollouts == args.num_iterations
    assert epochs == most if args.target_kl is None else rollouts < epochs < most
    ppo.train(resumed := of_runs.killed(with_graphs, tmp_path / "resumed", at=2))
    of_runs.assert_same(resumed.output_dir, args.output_dir)


def test_rollouts_of_two_lengths_go_on_from_each_other(ppo, small_run, recorded, tmp_path):
    args = small_run(tmp_path, env_id=runs.ADAPTIVE, horizon=3, reward_mode="score")
    cohort, found = hydrogel_gym.load_cohort(args.cohort), []
    for prepare in (list, recorded):
        prepare()
        learner, act, step = ppo.make_learner(args, cohort, torch.device("cpu"), ranks.ALONE, True)
        short, long = (
            runs.recorded_rollout(
                ppo.rollout, step, learner, args=dataclasses.replace(args, num_steps=n), act=act
            )
            for n in (2, 4)
        )
        obs, _ = learner.envs.reset(seed=0)
        for roll_out in (short, long, short, long, short, long):
            obs, batch, _ = roll_out(obs)
        found.append((obs, batch, learner.envs.state_dict(), learner.generator.get_state()))
    for one, other in zip(*map(tensors, found), strict=True):
        assert torch.equal(one, other)


def test_in_float64_and_with_several_ranks_updates_are_graphs_of_their_own(
    ppo, small_run, recorded, tmp_path
):
    recorded()
    args, cpu = small_run(tmp_path), torch.device("cpu")
    cohort, two = hydrogel_gym.load_cohort(args.cohort), ranks.World(0, 2, 2, joined=True)
    double = dataclasses.replace(args, precision="fp64")
    cases = ((args, ranks.ALONE), (double, ranks.ALONE), (args, two))
    steps = [ppo.make_learner(args, cohort, cpu, world, True)[2] for args, world in cases]
    assert [step.records for step in steps] == [True, False, False]
    assert all(isinstance(step.gradient_graph, graphs.Replayed) for step in steps)
