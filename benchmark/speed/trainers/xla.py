"""PPO for HydrogelDesign-v0 in PureJaxRL's manner: a whole iteration is one program of XLA.

    python benchmark/speed/trainers/xla.py --num-iterations 30 --output run.jsonl

Environment, rollout, advantages and all epochs are JAX, compiled together, so that the seconds of a
rollout are not known: all are told as those of the updates. The equations of the built-in model and
the reward are put into `jax.numpy` operation by operation; outcomes that nobody asks for are not
computed. Network, coefficients and amount of work are those of `cleanrl_manner.py`; `--precision
bf16` has the two large products in bfloat16, as `train/ppo_hybrid.py` does. `protocol.py` says what
`--output` receives. Needs `pip install -e ".[bench]"`.
"""

from __future__ import annotations

import argparse
import math
import operator
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
import torch
from jax import Array, lax, nn, random
from jax import numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[2]))
from speed.trainers import cleanrl_manner as manner
from speed.trainers.protocol import Recorder, arguments

from hydrogel_gym import compute_reward, load_cohort, load_reward_model
from hydrogel_gym.problem.fields import COVERAGES, FORMULATION_HIGH, FORMULATION_LOW
from hydrogel_gym.problem.polymers import NUM_POLYMERS
from hydrogel_gym.runs.command_line import run_script

WIDTHS = (128, 128, 64, 128)  # hidden units for polymer, formulation, coverage, value
PRECISIONS = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
Params = dict[str, Any]
Action = tuple[Array, Array, Array]  # polymers (B,), formulation before tanh (B, 4), coverages (B,)
# Torch's operations whose names or arguments are others in JAX and in Python.
OPERATIONS: dict[str, Callable[..., Any]] = {
    "div": operator.truediv,
    "rsub": lambda x, y: y - x,
    "clamp": lambda x, low=None, high=None: jnp.clip(x, low, high),
    "softplus": nn.softplus,
    "sigmoid": nn.sigmoid,
    "embedding": lambda rows, index: rows[index],
    "unbind": lambda x, dim=0: jnp.moveaxis(x, dim, 0),
    "select": lambda x, dim, index: jnp.take(x, index, dim),
    "slice": lambda x, dim, start, end: x[(slice(None),) * dim + (slice(start, end),)],
    "stack": lambda parts, dim=0: jnp.stack(jnp.broadcast_arrays(*parts), dim),
    "sum": lambda x, dims: x.sum(tuple(dims)),
    **dict.fromkeys(("expand", "expand_as", "to", "lift_fresh_copy", "detach_"), lambda x, *_: x),
    "_assert_tensor_metadata": lambda *_: None,
}


class Evaluated(torch.nn.Module):
    """The built-in model and what the reward makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = load_reward_model("mechanistic")

    def forward(self, *design: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Reward and outcomes of the patients' designs."""
        outcomes = self.model(*design)
        return compute_reward(outcomes), *outcomes


def in_jax() -> Callable[..., tuple[Array, ...]]:
    """`Evaluated` as a function of arrays: patient, polymer_id, formulation, coverage."""
    index = torch.zeros(2, dtype=torch.int64)
    example = (torch.ones(2, 11), index, torch.ones(2, len(FORMULATION_LOW)), index.clone())
    program = torch.export.export(Evaluated(), example)
    signature = program.graph_signature
    names = signature.inputs_to_buffers | signature.inputs_to_lifted_tensor_constants
    tensors = {name: program.constants[kept] for name, kept in names.items()}
    constants = {name: jnp.asarray(x.numpy(), jnp.float32) for name, x in tensors.items()}

    def evaluate(*design: Array) -> tuple[Array, ...]:
        values, given = dict(constants), iter(design)
        for node in program.graph.nodes:
            args = torch.fx.map_arg(node.args, lambda known: values[known.name])
            if node.op == "output":
                return tuple(args[0])
            if node.op == "call_function":
                name = getattr(node.target, "_opname", "getitem")
                function = OPERATIONS.get(name) or getattr(jnp, name, None)
                values[node.name] = (function or getattr(operator, name))(*args)
            elif node.name not in values:
                values[node.name] = next(given)
        raise ValueError("a program that returns nothing")

    return evaluate


class Batch(NamedTuple):
    """Storage of one rollout, (T, B, ...), or a flattened slice of it."""

    obs: Array
    action: Action
    logprob: Array
    value: Array
    advantages: Array  # the reward, until they are known
    done: Array  # after the step


def initial(key: Array, obs_dim: int) -> Params:
    """Orthogonal weights, zero biases."""
    keys = iter(random.split(key, 16))

    def dense(rows: int, columns: int, scale: float = math.sqrt(2.0)) -> Params:
        weight = nn.initializers.orthogonal(scale)(next(keys), (rows, columns))
        return {"weight": weight, "bias": jnp.zeros(columns)}

    normal = {"scale": jnp.ones(256), "shift": jnp.zeros(256)}
    hidden = [dense(256, width) for width in WIDTHS]
    sizes = (NUM_POLYMERS, len(FORMULATION_LOW), len(COVERAGES), 1)
    scales = (0.01, 0.01, 0.01, 1.0)
    return {
        "trunk": [dense(rows, 256) | normal for rows in (obs_dim, 256)],
        "hidden": jax.tree.map(lambda *parts: jnp.concatenate(parts, -1), *hidden),
        "heads": [dense(*sizes) for sizes in zip(WIDTHS, sizes, scales, strict=True)],
        "log_std": jnp.zeros(len(FORMULATION_LOW)),
    }


def product(x: Array, layer: Params, dtype: Any = jnp.float32) -> Array:
    """Of a layer, factors in the dtype given, sums in float32."""
    factors = x.astype(dtype), layer["weight"].astype(dtype)
    return jnp.dot(*factors, preferred_element_type=jnp.float32) + layer["bias"]


def heads(params: Params, obs: Array, dtype: Any) -> list[Array]:
    """Outputs for polymer, formulation, coverage and value of normalised observations."""
    for layer, kind in zip(params["trunk"], (jnp.float32, dtype), strict=True):
        x = product(obs, layer, kind)
        x = nn.standardize(x, axis=-1, epsilon=1e-5) * layer["scale"] + layer["shift"]
        obs = nn.relu(x)
    hidden = nn.relu(product(obs, params["hidden"], dtype))
    ends = [sum(WIDTHS[:k]) for k in range(1, len(WIDTHS))]
    parts = zip(jnp.split(hidden, ends, -1), params["heads"], strict=True)
    return [product(part, layer) for part, layer in parts]


def evaluate_action(params: Params, outputs: list[Array], action: Action) -> tuple[Array, Array]:
    """Log-probability and entropy, that of the formulation as the Gaussian's before tanh, (B,)."""
    (polymer, mean, coverage, _), (polymer_id, u, level) = outputs, action
    log_std = params["log_std"]
    normal = -0.5 * ((u - mean) * jnp.exp(-log_std)) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    jacobian = 2.0 * (math.log(2.0) - u - nn.softplus(-2.0 * u))
    logprob = (normal - jacobian).sum(-1)
    entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
    for logits, index in ((polymer, polymer_id), (coverage, level)):
        logp = nn.log_softmax(logits)
        logprob += jnp.take_along_axis(logp, index[:, None], -1)[:, 0]
        entropy -= (jnp.exp(logp) * logp).sum(-1)
    return logprob, entropy


def to_env(action: Action) -> tuple[Array, Array, Array]:
    """The design in physical units."""
    polymer_id, u, coverage = action
    share = (jnp.tanh(u) + 1.0) / 2.0
    return polymer_id, FORMULATION_LOW + share * (FORMULATION_HIGH - FORMULATION_LOW), coverage


def loss_of(params: Params, mb: Batch, dtype: Any) -> Array:
    """Clipped surrogate with value loss and entropy bonus."""
    outputs = heads(params, mb.obs, dtype)
    logprob, entropy = evaluate_action(params, outputs, mb.action)
    ratio, advantages = jnp.exp(logprob - mb.logprob), mb.advantages
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clipped = jnp.clip(ratio, 1.0 - manner.CLIP_COEF, 1.0 + manner.CLIP_COEF)
    pg_loss = -jnp.minimum(advantages * ratio, advantages * clipped).mean()
    v_loss = 0.5 * ((outputs[-1][:, 0] - (mb.advantages + mb.value)) ** 2).mean()
    return pg_loss - manner.ENT_COEF * entropy.mean() + manner.VF_COEF * v_loss


class Trainer:
    """Weights, and `iterate`, which takes them through one iteration.

    Environment k is of patient k modulo their number, whose every design is an episode.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.dtype, self.reward = args, PRECISIONS[args.precision], in_jax()
        patients = jnp.asarray(load_cohort().features.numpy(), jnp.float32)
        self.patients = patients[jnp.arange(args.num_envs) % len(patients)]
        self.mean, std = (jnp.pad(x, (0, 2)) for x in (self.patients.mean(0), self.patients.std(0)))
        # Score and iteration never vary in episodes of one step.
        self.std = jnp.where(std > 0, std, 1.0)
        key, self.key = random.split(random.key(args.seed))
        self.params = jax.jit(initial, static_argnums=1)(key, len(self.mean))
        updates = args.num_epochs * args.num_envs * args.num_steps // args.minibatch_size

        def learning_rate(step: Array) -> Array:
            return args.learning_rate * (1.0 - (step // updates) / args.num_iterations)

        adam = optax.adam(learning_rate, eps=1e-5)
        self.optimizer = optax.chain(optax.clip_by_global_norm(manner.MAX_GRAD_NORM), adam)
        self.state = self.optimizer.init(self.params)
        self.program = jax.jit(self.iteration, donate_argnums=(0, 1))

    def iterate(self) -> float:
        """An iteration; returns the mean reward of its rollout."""
        key, self.key = random.split(self.key)
        # Of a horizon that it knew, XLA would conclude that observations never change, and take the
        # network out of the loop over steps.
        self.params, self.state, reward = self.program(self.params, self.state, key, horizon=1)
        return float(reward)

    def iteration(
        self, params: Params, state: Any, key: Array, *, horizon: Array
    ) -> tuple[Params, Any, Array]:
        """Rollout, advantages and all epochs."""
        steps, envs = self.args.num_steps, self.args.num_envs
        acting, learning = random.split(key)

        def observe(best_and_count: Array) -> Array:
            return (jnp.hstack([self.patients, best_and_count]) - self.mean) / self.std

        def act(episode: Array, key: Array) -> tuple[Array, Batch]:
            outputs = heads(params, obs := observe(episode), self.dtype)
            (polymer, mean, coverage, value), keys = outputs, random.split(key, 3)
            u = mean + jnp.exp(params["log_std"]) * random.normal(keys[0], mean.shape)
            polymer_id = random.categorical(keys[1], polymer)
            action = polymer_id, u, random.categorical(keys[2], coverage)
            logprob, _ = evaluate_action(params, outputs, action)
            reward = self.reward(self.patients, *to_env(action))[0]
            episode = jnp.stack([jnp.maximum(episode[:, 0], reward), episode[:, 1] + 1.0], -1)
            done = episode[:, 1] >= horizon
            batch = Batch(obs, action, logprob, value[:, 0], reward, done)
            return jnp.where(done[:, None], 0.0, episode), batch

        def gae(carry: tuple[Array, Array], step: Batch) -> tuple[Any, Array]:
            trace, following = carry
            delta = step.advantages + manner.GAMMA * following * ~step.done - step.value
            trace = delta + manner.GAMMA * manner.GAE_LAMBDA * ~step.done * trace
            return (trace, step.value), trace

        episode, batch = lax.scan(act, jnp.zeros((envs, 2)), random.split(acting, steps))
        following = heads(params, observe(episode), self.dtype)[-1][:, 0]
        _, advantages = lax.scan(gae, (jnp.zeros(envs), following), batch, reverse=True)
        learnt = batch._replace(advantages=advantages)
        flat = jax.tree.map(lambda x: x.reshape(steps * envs, *x.shape[2:]), learnt)

        def update(carry: tuple[Params, Any], mb: Batch) -> tuple[tuple[Params, Any], None]:
            params, state = carry
            gradient = jax.grad(loss_of)(params, mb, self.dtype)
            changes, state = self.optimizer.update(gradient, state)
            return (optax.apply_updates(params, changes), state), None

        def epoch(carry: tuple[Params, Any], key: Array) -> tuple[tuple[Params, Any], None]:
            order = random.permutation(key, steps * envs).reshape(-1, self.args.minibatch_size)
            return lax.scan(update, carry, jax.tree.map(lambda x: x[order], flat))

        keys = random.split(learning, self.args.num_epochs)
        (params, state), _ = lax.scan(epoch, (params, state), keys)
        return params, state, batch.advantages.mean()

    def deterministic(self, obs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Likeliest categories and median formulation, for the environment."""
        normalised = (jnp.asarray(obs.numpy()) - self.mean) / self.std
        polymer, mean, coverage, _ = heads(self.params, normalised, self.dtype)
        design = to_env((polymer.argmax(-1), mean, coverage.argmax(-1)))
        return dict(zip(manner.HEADS, map(torch.tensor, jax.device_get(design)), strict=True))


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    precision = dict(choices=PRECISIONS, default="fp32", help="of the two large products")
    args = arguments(__doc__, argv, precision=precision)
    if threads := int(os.environ.get("OMP_NUM_THREADS", 0)):  # which XLA does not know
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    trainer = Trainer(args)
    recorder = Recorder(args, manner.ENV_ID, trainer.deterministic)
    for iteration in range(1, args.num_iterations + 1):
        start = time.perf_counter()
        reward = trainer.iterate()
        seconds = time.perf_counter() - start
        samples = iteration * args.num_envs * args.num_steps
        recorder.record(iteration, samples, 0.0, seconds, mean_reward=reward)


if __name__ == "__main__":
    sys.exit(run_script(main))
