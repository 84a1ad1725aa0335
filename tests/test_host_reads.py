"""What runs once a step or a batch reads nothing on the host and makes nothing on another device.

On an accelerator a read waits for all that the device still does. On the meta device a tensor has
no values, so that a read, a shape that depends on data and a tensor left on the CPU all raise.
"""

from __future__ import annotations

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hydrogel_gym import HydrogelVectorEnv, RewardConfig, load_reward_model, oracle, runs
from hydrogel_gym.designs import sampling
from hydrogel_gym.designs.schema import NUMBERS
from hydrogel_gym.envs import wrappers
from hydrogel_gym.runs import compiled, ranks, signals

no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class NoHostRead(TorchDispatchMode):
    """Raises where a value is read on the host, also where the device is the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "masked_select"), name
        return function(*args, **(kwargs or {}))


def test_a_host_read_would_be_noticed():
    with NoHostRead(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        bool(torch.ones(1) > 0)
    with pytest.raises(RuntimeError, match="meta"):
        bool(torch.ones(1, device="meta") > 0)


def sampled(envs, device: str):
    """An action for every environment, as tensors."""
    envs.action_space.seed(0)
    return tree_map(lambda x: torch.from_numpy(x).to(device), envs.action_space.sample())


def trace(device: str, *, wrap=lambda envs: envs, **kwargs) -> list[torch.Tensor]:
    """Every tensor of resets and steps, of some environments and of all."""
    # On the CPU too, what a user sends is not looked at.
    kwargs = {"horizon": 2, "output": "torch", "validate_actions": False} | kwargs
    envs = wrap(HydrogelVectorEnv(3, device=device, **kwargs))
    action, mask = sampled(envs, device), torch.tensor([True, False, True], device=device)
    results = [envs.reset(seed=0), envs.step(action)]
    results.append(envs.reset(options={"reset_mask": mask, "patient_id": [1, 2, 3]}))
    # The first of these ends an episode in the middle.
    return tree_leaves([*results, envs.step(action), envs.step(action)])


@pytest.mark.parametrize(
    "settings",
    [
        dict(autoreset_mode="SameStep", obs_format="dict", wrap=wrappers.VectorFlattenHybridAction),
        dict(autoreset_mode="SameStep", action_format="multidiscrete"),
        dict(autoreset_mode="NextStep", action_format="tuple", horizon=5, max_episode_steps=2),
        dict(autoreset_mode="NextStep", wrap=wrappers.VectorDiscretizeHybridAction),
        dict(autoreset_mode="Disabled", action_format="box", obs_format="dict", dtype="float64"),
        dict(autoreset_mode="Disabled", wrap=wrappers.VectorRescaleFormulation),
    ],
    ids=lambda settings: "-".join(map(str, [*settings.values()][:2])),
)
def test_environments_step_and_reset_on_a_device_without_values(settings):
    settings = settings | {"observe_explored": True, "patient_assignment": "random"}
    there, here = (trace(device, **settings) for device in ("meta", "cpu"))
    assert {x.device.type for x in there} == {"meta"}
    assert [(x.shape, x.dtype) for x in there] == [(x.shape, x.dtype) for x in here]


@no_cuda
@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_step_on_cuda_equals_the_cpu_and_never_waits_for_the_device(mode):
    envs, cpu_envs = (
        HydrogelVectorEnv(3, horizon=2, device=device, output="torch", autoreset_mode=mode)
        for device in ("cuda", "cpu")
    )
    action, mask = sampled(envs, "cuda"), torch.ones(3, dtype=torch.bool, device="cuda")
    for each in (envs, cpu_envs):
        each.reset(seed=0)
        each.step(sampled(each, each.device.type))
    try:
        torch.cuda.set_sync_debug_mode("error")
        returned = envs.step(action)
        envs.reset(options={"reset_mask": mask})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = tree_leaves(cpu_envs.step(sampled(cpu_envs, "cpu")))
    for one, other in zip(tree_leaves(returned), expected, strict=True):
        assert one.is_cuda
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("stage1", ["mechanistic", "ensemble"])
def test_reward_models_predict_on_a_device_without_values(stage1, dtype, make_stage1):
    model = load_reward_model("mechanistic") if stage1 == "mechanistic" else make_stage1()
    index = torch.empty(7, dtype=torch.int64, device="meta")
    patient, formulation = (torch.empty(7, n, dtype=dtype, device="meta") for n in (11, 4))
    outcomes = model.to("meta")(patient, index, formulation, index)
    assert {(x.device.type, x.shape, x.dtype) for x in outcomes} == {("meta", (7,), dtype)}


def test_oracle_searches_on_a_device_without_values(monkeypatch):
    shorter = tuple(stage._replace(generations=1) for stage in oracle.search.ROUNDS)
    monkeypatch.setattr(oracle.search, "ROUNDS", shorter)
    model = load_reward_model("mechanistic", "meta")
    design = oracle.search.search(torch.empty(7, 11, device="meta"), model, RewardConfig(), seed=0)
    assert [tuple(part.shape) for part in design] == [(7,), (7, 4), (7,)]
    assert {part.device.type for part in design} == {"meta"}


def test_candidates_are_drawn_and_evaluated_on_a_device_without_values(ppo):
    model = load_reward_model("mechanistic", "meta")
    with torch.device("meta"):
        formulation = ppo.SquashedNormal(torch.empty(24, 4), torch.empty(24, 4), torch.empty(2, 8))
        probability, cells = torch.empty(192), torch.empty(192, dtype=torch.int64)
        cell, numbers = sampling.evaluate(
            sampling.Sampler(torch.empty(11), formulation, probability, cells),
            *(torch.empty(64), torch.empty(64, 4)),
            squash=torch.tanh,
            temperature=1.0,
            reward_model=model,
            reward_config=RewardConfig(),
        )
    assert (cell.shape, numbers.shape) == ((64,), (len(NUMBERS), 64))
    assert {x.device.type for x in (cell, numbers)} == {"meta"}


@pytest.fixture
def make_world():
    """Makes this process alone, or the second of four ranks, whose messages go nowhere."""

    def make(is_joined: bool) -> ranks.World:
        if not is_joined:
            return ranks.ALONE
        dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
        return ranks.World(1, 4, 4, joined=True)

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


def without_generator(function):
    return lambda *size, generator, **place: function(*size, **place)


def make_learner(ppo, args, world, device, compile, policy="autoregressive", state_std=True):
    """Environments, agent, first observation, gradient step and generator."""
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
        policy=policy,
        state_std=state_std,
        hidden_dim=16,
    ).to(device)
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
    # The meta device has no generators.
    generator = SimpleNamespace(device=obs.device) if device == "meta" else torch.Generator(device)
    return envs, agent, obs, step, generator


@pytest.fixture
def without_generators(monkeypatch):
    def apply():
        for name in ("rand", "randn", "randperm"):
            monkeypatch.setattr(torch, name, without_generator(getattr(torch, name)))

    return apply


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("meta", marks=pytest.mark.torch("2.10")),
        pytest.param("cuda", marks=no_cuda),
    ],
)
@pytest.mark.parametrize(
    ("compile", "is_joined", "policy", "state_std"),
    [
        (False, True, "autoregressive", True),
        (True, False, "autoregressive", True),
        (True, True, "factored", False),
    ],
    ids=["plain-one of four", "compiled-alone", "compiled-one of four-factored"],
)
def test_an_iteration_of_the_trainer_reads_nothing_on_the_host(
    compile,
    is_joined,
    policy,
    state_std,
    device,
    ppo,
    small_run,
    make_world,
    tmp_path,
    monkeypatch,
    without_generators,
):
    monkeypatch.setattr(compiled, "compile_function", lambda function, device: function)
    world, args = make_world(is_joined), small_run(tmp_path, num_steps=2)
    no_read = NoHostRead()
    if device == "meta":  # cannot be read at all
        no_read = contextlib.nullcontext()
        without_generators()
    learner = make_learner(ppo, args, world, device, compile, policy, state_std)
    envs, agent, obs, step, generator = learner
    if world.joined:
        step = functools.partial(step, average=world.average)
    with no_read:
        _, batch, infos = ppo.rollout(envs, agent, obs, args, generator, world=world)
        losses = ppo.update(step, batch, args, generator, world)
        requests = signals.Signals(world).requests(obs.device)
    assert len(batch.logprob) == infos["reward"].numel() == args.num_envs * args.num_steps
    assert {value.device.type for value in (*losses.values(), requests)} == {device}
    assert agent.encoder[0].weight.device.type == device


class Counted(TorchDispatchMode):
    """Counts operations that would launch a kernel, and the new tensors of so many rows.

    Raises where a tensor is made on the host, from where it would be copied.
    """

    def __init__(self, rows: int):
        super().__init__()
        self.rows, self.operations, self.allocations = rows, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def memory(values):
            tensors = [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
            return {x.untyped_storage()._cdata: x.shape[:1] for x in tensors}

        result = function(*args, **(kwargs or {}))
        given = memory((args, kwargs))
        new = {key: rows for key, rows in memory(result).items() if key not in given}
        leaves = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        assert {x.device.type for x in leaves if x.dim()} <= {"meta"}, function
        self.operations += bool(new) or function._schema.is_mutable
        self.allocations += sum(rows == (self.rows,) for rows in new.values())
        return result


@pytest.fixture
def replays(monkeypatch, without_generators):
    """Has the meta device record graphs as CUDA does; a line for each replay."""
    replays, capturing = [], []

    class Graph:
        def replay(self):
            replays.append(self)

        def register_generator_state(self, generator):
            assert not capturing

    @contextlib.contextmanager
    def capture(graph):
        capturing.append(graph)
        yield
        capturing.pop()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    monkeypatch.setattr(compiled, "has_graphs", lambda device: True)
    monkeypatch.setattr(compiled, "CompiledFunction", lambda function, *_: function)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda _: None)  # fused it is one operation more
    without_generators()
    return replays


@pytest.mark.torch("2.10")
def test_on_a_gpu_an_iteration_is_a_replay_of_its_rollout_and_one_of_each_epoch(
    ppo, small_run, tmp_path, replays
):
    counted = []
    for num_steps, minibatch_size in ((4, 48), (4, 24), (8, 24)):
        sizes = dict(num_steps=num_steps, num_epochs=3, minibatch_size=minibatch_size)
        args = small_run(tmp_path, patient_baseline=True, **sizes)
        envs, agent, obs, step, generator = make_learner(ppo, args, ranks.ALONE, "meta", True)
        learner = runs.Learner(envs, agent, {}, step.optimizer, generator)
        act = compiled.compile_function(functools.partial(ppo.act, agent), obs.device)
        act = functools.partial(lambda replayed, _, *inputs: replayed(*inputs), act)
        roll_out = runs.recorded_rollout(ppo.rollout, step, learner, args=args, act=act)
        for _ in range(3):  # the first runs as it is; in the second the graphs are recorded
            replays.clear()
            with Counted(args.num_envs * num_steps) as rollout:
                obs, batch, _ = roll_out(obs)
            with Counted(len(batch.logprob)) as update:
                ppo.update(step, batch, args, generator, unit=0.5)
        assert len(replays) == 1 + args.num_epochs
        assert len(set(replays)) == 2
        counted.append((rollout.operations, update.operations, update.allocations))
    assert counted[0] == counted[1] == counted[2]
    # A batch of eight parts, its unit and the rate go in; six figures of each epoch come out.
    assert counted[0][1:] == (2 + 10 + 6 * 3 + 2 * 6 + 1, 0)
