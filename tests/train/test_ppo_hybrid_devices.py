"""What accelerators ask of the trainer, proved without one: no host reads, no other device."""

from __future__ import annotations

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from hydrogel_gym import HydrogelVectorEnv
from hydrogel_gym.runs import compiled, ranks, signals

no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class NoHostRead(TorchDispatchMode):
    """Raises where a value is read on the host, which on an accelerator waits for all it does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "masked_select"), name
        return function(*args, **(kwargs or {}))


def test_a_host_read_would_be_noticed():
    with NoHostRead(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        bool(torch.ones(1) > 0)


@pytest.fixture(params=["alone", "one of four"])
def world(request):
    """This process alone, or the second of four ranks, whose messages go nowhere."""
    if request.param == "alone":
        yield ranks.ALONE
        return
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield ranks.World(1, 4, 4, joined=True)
    dist.destroy_process_group()


@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=no_cuda)])
@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
def test_an_iteration_reads_nothing_on_the_host_and_makes_nothing_on_another_device(
    ppo, small_run, world, tmp_path, monkeypatch, compile, device
):
    monkeypatch.setattr(compiled, "compile_function", lambda function, device: function)
    args = small_run(tmp_path)
    envs = HydrogelVectorEnv(
        args.num_envs // world.size, output="torch", validate_actions=False, device=device
    )
    obs, _ = envs.reset(seed=0)
    agent = ppo.Agent(
        obs_dim=13,
        num_polymers=24,
        num_coverages=4,
        formulation_low=[0.0] * 4,
        formulation_high=[1.0] * 4,
        policy="autoregressive",
        state_std=True,
        hidden_dim=16,
    ).to(device)
    no_read = NoHostRead()
    if device == "meta":  # has no generators and cannot be read at all
        generator, no_read = SimpleNamespace(device=obs.device), contextlib.nullcontext()
        for name in ("rand", "randn", "randperm"):
            monkeypatch.setattr(torch, name, without_generator(getattr(torch, name)))
    else:
        generator = torch.Generator(device)
    weights = [compiled.flatten_weights(agent)] if compile else list(agent.parameters())
    # There is no fused optimiser on the meta device.
    optimizer = torch.optim.Adam(weights, eps=1e-5, fused=device != "meta")

    def loss(forward, minibatch):
        output = forward(minibatch.obs, minibatch.action)
        return ppo.ppo_loss(output, minibatch, args, agent.return_std)

    if compile:
        step = compiled.CompiledStep(agent, optimizer, loss, args.max_grad_norm, world)
    else:
        step = functools.partial(ppo.gradient_step, agent, optimizer, args)
    if world.joined:
        step = functools.partial(step, average=world.average)
    with no_read:
        _, batch, infos = ppo.rollout(envs, agent, obs, args, generator, world=world)
        losses = ppo.update(step, batch, args, generator, world)
        requests = signals.Signals(world).requests(obs.device)
    assert len(batch.logprob) == infos["reward"].numel() == args.num_envs * args.num_steps
    assert {value.device.type for value in (*losses.values(), requests)} == {device}
    assert agent.encoder[0].weight.device.type == device


def without_generator(function):
    return lambda *size, generator, device: function(*size, device=device)
