"""What accelerators ask of the trainer, proved without one: no host reads, no other device."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from hydrogel_gym import HydrogelVectorEnv

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
def world(ppo, request):
    """This process alone, or the second of four ranks, whose messages go nowhere."""
    if request.param == "alone":
        yield ppo.ALONE
        return
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield ppo.World(1, 4, 4, joined=True)
    dist.destroy_process_group()


@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=no_cuda)])
@pytest.mark.parametrize("step_class", ["PlainStep", "CompiledStep"])
def test_an_iteration_reads_nothing_on_the_host_and_makes_nothing_on_another_device(
    ppo, small_run, world, tmp_path, monkeypatch, step_class, device
):
    monkeypatch.setattr(ppo, "compiled", lambda function, device: function)
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
    step = getattr(ppo, step_class)(agent, args, world)
    with no_read:
        _, batch, told = ppo.rollout(envs, agent, obs, args, generator, world=world)
        losses = ppo.update(step, batch, args, 1e-3, generator, world)
        asked = ppo.Signals(world).requests(obs.device)
    assert batch.num_samples == told["reward"].numel() == args.num_envs * args.num_steps
    assert {value.device.type for value in (*losses.values(), asked)} == {device}
    assert agent.encoder[0].weight.device.type == device


def without_generator(function):
    return lambda *size, generator, device: function(*size, device=device)
