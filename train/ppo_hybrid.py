"""Proximal policy optimisation for a hybrid action space: every line of the algorithm.

One policy learns to design a hydrogel for every patient of a cohort: a polymer (categorical), a
formulation (four continuous parameters) and a coverage pattern (categorical).

    python train/ppo_hybrid.py --preset quick                                  # half a minute
    python train/ppo_hybrid.py --preset full                                   # 2 M samples
    python train/ppo_hybrid.py --resume runs/quick-s1                          # an interrupted run
    torchrun --nproc-per-node=8 train/ppo_hybrid.py --preset source            # eight GPUs

What any run needs besides (options, ranks, run directory, checkpoints, logs, evaluation) is in
`hydrogel_gym.runs`. *The source* is the HYDRA-BERT Stage-2 document, faults of which are mended.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

import hydrogel_gym
from hydrogel_gym import runs
from hydrogel_gym.errors import UsageError

Preset = Literal["source", "quick", "full", "adapt"]
Policy = Literal["factored", "autoregressive"]


@dataclass
class Args(runs.RunOptions, runs.ProblemOptions):
    """Train a hybrid-action PPO policy on HydrogelDesign-v0."""

    preset: Preset = "source"
    """start of all other flags: the source's table, half a minute, the best, or adaptive"""

    # Learned reward
    limit_margin: float = 0.001
    """learn from safety limits tighter by this; what is reported keeps the true ones"""
    penalty_scale: float = 2.0
    """learn from safety penalties this many times as large; what is reported keeps the true ones"""

    # Algorithm
    policy: Policy = "autoregressive"
    """factored heads, or coverage and formulation conditioned on the sampled polymer"""
    state_std: bool = True
    """spread of the formulation from the state, or one learned spread per context"""
    hidden_dim: int = 256
    """width of the trunk"""
    num_iterations: int = 200
    """rollouts, each followed by its updates"""
    num_envs: int = 2000
    """parallel environments, over all ranks"""
    num_steps: int = 100
    """steps per environment and iteration"""
    minibatch_size: int = 2000
    """samples per update, over all ranks (the source's 2,048 does not divide its 200,000)"""
    num_epochs: int = 10
    """passes over each batch"""
    learning_rate: float = 3e-4
    """initial learning rate of Adam"""
    anneal_lr: bool = True
    """cosine decay of the learning rate to zero"""
    gamma: float = 0.99
    """discount"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    patient_baseline: bool = False
    """advantages less their mean over the designs that a rollout has for the same patient"""
    clip_coef: float = 0.2
    """clipping range of the probability ratio"""
    clip_vloss: bool = False
    """clip the change of the value too, in units of the return's standard deviation"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    temperature: float | None = None
    """reward that a nat of entropy is worth, falling to a hundredth; by default in no fixed unit"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient"""
    target_kl: float | None = None
    """end an iteration's epochs once the approximate KL divergence exceeds this"""

    @property
    def num_updates(self) -> int:
        """Gradient steps of the whole run."""
        samples = self.num_iterations * self.num_steps * self.num_envs
        return samples * self.num_epochs // self.minibatch_size

    @property
    def is_stricter(self) -> bool:
        """Whether the learned reward is another than the environment's."""
        return (self.limit_margin, self.penalty_scale) != (0.0, 1.0)


# Short rollouts, so that what was learnt is tried at once: `benchmark/quality/learning_quality.py`.
SHORT = dict(minibatch_size=1000, num_epochs=4, vf_coef=2.0)
SHORT |= dict(ent_coef=0.1, temperature=0.3, patient_baseline=True)
ADAPT = dict(env_id=runs.ADAPTIVE, reward_mode="score", horizon=8, num_steps=8, num_epochs=1)
# Which design has the best score under any response; evaluated with samples of the response.
ADAPT |= dict(gamma=0.0, patient_assignment="random", observe="response")
PRESETS: dict[Preset, dict[str, Any]] = {
    # Args itself has the source's numbers; its network has independent heads.
    "source": dict(policy="factored", state_std=False, limit_margin=0.0, penalty_scale=1.0),
    "quick": SHORT | dict(num_iterations=100, num_steps=2, learning_rate=2.5e-3),
    "full": SHORT | dict(num_steps=5, learning_rate=1.2e-3, limit_margin=0.002),
    "adapt": SHORT | ADAPT | dict(num_iterations=3000, learning_rate=3e-3),
}

LOG_STD_RANGE = (-6.0, 1.0)  # binds nowhere in practice; keeps a diverging run from overflow
HEAD_WIDTHS = (128, 128, 64, 128)  # hidden units for polymer, formulation, coverage, value


class HybridAction(NamedTuple):
    """A design as the policy sees it; `presquash` is the Gaussian sample before tanh."""

    polymer_id: Tensor  # (B,) int64
    presquash: Tensor  # (B, 4)
    coverage: Tensor  # (B,) int64


class Noise(NamedTuple):
    """Random numbers that a sampled action is made from; drawn once per rollout."""

    uniform: Tensor  # (..., 2) in [0, 1): polymer, coverage
    normal: Tensor  # (..., 4) standard normal: formulation


def draw_noise(*shape: int, dim: int, generator: torch.Generator) -> Noise:
    """`Noise` of the given leading shape, on the generator's device."""
    place = {"generator": generator, "device": generator.device, "dtype": torch.float32}
    return Noise(torch.rand(*shape, 2, **place), torch.randn(*shape, dim, **place))


class PolicyOutput(NamedTuple):
    """What `Agent.forward` returns; joint log-probability and entropy over all heads, (B,)."""

    action: HybridAction
    logprob: Tensor
    entropy: Tensor
    value: Tensor


def layer_init(layer: nn.Linear, std: float = math.sqrt(2.0)) -> nn.Linear:
    """Orthogonal weights, zero bias."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Head(nn.Module):
    """Output layer of a head, with one block of outputs per category of what was chosen before."""

    def __init__(self, hidden_dim: int, out_dim: int, *, std: float, num_contexts: int = 1) -> None:
        super().__init__()
        self.num_contexts = num_contexts
        self.out = layer_init(nn.Linear(hidden_dim, num_contexts * out_dim), std)

    def forward(self, hidden: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, out_dim) from the (B, hidden_dim) pre-activation and a (B,) category."""
        out = self.out(hidden.relu())
        if self.num_contexts == 1:
            return out
        return take(out.unflatten(-1, (self.num_contexts, -1)), context)


# Gauss-Hermite nodes and weights: the mean of a function of a standard normal, without noise.
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(8)


def log_tanh_jacobian(u: Tensor) -> Tensor:
    """Logarithm of d tanh(u) / du, elementwise; this form neither overflows nor cancels."""
    return 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))


class SquashedNormal(NamedTuple):
    """Distribution of tanh(u) on [-1, 1]^d for u ~ N(mean, std); another head has these methods."""

    mean: Tensor  # (B, d)
    log_std: Tensor  # (B, d)
    nodes: Tensor  # (2, K) quadrature nodes and weights

    def rows(self, index: Any) -> SquashedNormal:
        """The distributions at `index` of the first dimensions."""
        return SquashedNormal(self.mean[index], self.log_std[index], self.nodes)

    @staticmethod
    def squash(u: Tensor) -> Tensor:
        """What was sampled, on [-1, 1]."""
        return u.tanh()

    def median(self) -> Tensor:
        """(B, d) median before tanh."""
        return self.mean

    def sample(self, normal: Tensor, temperature: float = 1.0) -> Tensor:
        """(B, d) sample before tanh of the density to the power 1 / T, from standard normals."""
        return self.mean + self.log_std.exp() * math.sqrt(temperature) * normal

    def logprob(self, u: Tensor) -> Tensor:
        """(B,) log-density of tanh(u) at the (B, d) presquash value u."""
        z = (u - self.mean) * (-self.log_std).exp()
        normal = -0.5 * z.square() - self.log_std - 0.5 * math.log(2.0 * math.pi)
        return (normal - log_tanh_jacobian(u)).sum(-1)

    def entropy(self) -> Tensor:
        """(B,) entropy: that of the normal, and the mean log-Jacobian by quadrature."""
        u = self.mean.unsqueeze(-1) + self.log_std.exp().unsqueeze(-1) * self.nodes[0]
        jacobian = (log_tanh_jacobian(u) * self.nodes[1]).sum(-1)
        return (self.log_std + 0.5 * math.log(2.0 * math.pi * math.e) + jacobian).sum(-1)

    def divergence(self, other: SquashedNormal) -> Tensor:
        """(B,) KL divergence from another: that of the normals, since squashing is invertible."""
        ratio = (2.0 * (self.log_std - other.log_std)).exp()
        shift = (self.mean - other.mean).square() * (-2.0 * other.log_std).exp()
        return 0.5 * (ratio + shift - 1.0 - ratio.log()).sum(-1)


class Agent(nn.Module):
    """Actor-critic of the source's shape: one trunk, a head per action factor, a critic.

    The continuous head is a Gaussian squashed by tanh onto the formulation's box. With
    autoregressive heads, coverage and formulation have a block of outputs for each polymer.
    Observations are normalised by fixed buffers, and the critic works in units of the return's
    standard deviation; both are saved with the weights. Bounds of the formulation are in physical
    units; `policy`, `state_std`, `hidden_dim` and `precision` are those of `Args`.
    """

    def __init__(
        self,
        *,
        obs_dim: int,
        num_polymers: int,
        num_coverages: int,
        formulation_low: list[float],
        formulation_high: list[float],
        policy: Policy,
        state_std: bool,
        hidden_dim: int,
        precision: runs.Precision = "fp32",
    ) -> None:
        super().__init__()
        self.state_std = state_std
        self.precision = precision
        self.formulation_dim = len(formulation_low)
        self.autoregressive = policy == "autoregressive"
        contexts = num_polymers if self.autoregressive else 1
        self.encoder = nn.Sequential(
            layer_init(nn.Linear(obs_dim, hidden_dim)), nn.LayerNorm(hidden_dim), nn.ReLU()
        )
        self.trunk = nn.Sequential(
            layer_init(nn.Linear(hidden_dim, hidden_dim)), nn.LayerNorm(hidden_dim), nn.ReLU()
        )
        # The hidden layers of the four heads, as one matrix product.
        self.hidden = nn.Linear(hidden_dim, sum(HEAD_WIDTHS))
        nn.init.zeros_(self.hidden.bias)
        for block in self.hidden.weight.split(HEAD_WIDTHS):
            nn.init.orthogonal_(block, math.sqrt(2.0))
        polymer, formulation, coverage, critic = HEAD_WIDTHS
        self.polymer_head = Head(polymer, num_polymers, std=0.01)
        # means, then log standard deviations if they depend on the state
        outputs = self.formulation_dim * (2 if state_std else 1)
        self.formulation_head = Head(formulation, outputs, std=0.01, num_contexts=contexts)
        self.coverage_head = Head(coverage, num_coverages, std=0.01, num_contexts=contexts)
        self.critic = Head(critic, 1, std=1.0)
        if not state_std:
            self.formulation_log_std = nn.Parameter(torch.zeros(contexts, self.formulation_dim))

        self.register_buffer("formulation_low", torch.tensor(formulation_low))
        self.register_buffer("formulation_high", torch.tensor(formulation_high))
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        self.register_buffer("return_mean", torch.zeros(()))
        self.register_buffer("return_std", torch.ones(()))
        nodes = np.stack([_NODES, _WEIGHTS / _WEIGHTS.sum()])
        self.register_buffer("nodes", torch.tensor(nodes, dtype=torch.float32), persistent=False)
        self.to(torch.float64 if precision == "fp64" else torch.float32)

    def head_inputs(self, obs: Tensor) -> tuple[Tensor, ...]:
        """Pre-activations of the polymer, formulation, coverage and value heads."""
        features = self.encoder((obs - self.obs_mean) / self.obs_std)
        # Only the two large products may be in bfloat16: a log-probability does not survive it.
        bf16 = self.precision == "bf16"
        with torch.autocast(obs.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
            hidden = self.hidden(self.trunk(features))
        return hidden.to(features.dtype).split(HEAD_WIDTHS, dim=-1)

    def set_return_scale(self, returns: Tensor) -> None:
        """Fix the critic's units, from the returns of the untrained policy."""
        self.return_mean.copy_(returns.mean())
        self.return_std.copy_(returns.std().clamp_min(1e-6))

    def value(self, obs: Tensor) -> Tensor:
        """State value, (B,), in units of the reward."""
        return self._value(self.head_inputs(obs)[-1])

    def _value(self, hidden: Tensor) -> Tensor:
        return self.return_mean + self.return_std * self.critic(hidden).squeeze(-1)

    def forward(
        self, obs: Tensor, action: HybridAction | None = None, *, noise: Noise | None = None
    ) -> PolicyOutput:
        """Evaluate an action for (B, obs_dim) observations, or choose one.

        Chosen are, without `noise`, the most probable categories and the median formulation.
        """
        pick_polymer, pick_coverage = noise.uniform.unbind(-1) if noise else (None, None)
        polymer_in, formulation_in, coverage_in, value_in = self.head_inputs(obs)
        polymer_logp = self.polymer_head(polymer_in).log_softmax(-1)
        polymer_id = choose(polymer_logp, pick_polymer) if action is None else action.polymer_id
        coverage_logp = self.coverage_head(coverage_in, polymer_id).log_softmax(-1)
        coverage = choose(coverage_logp, pick_coverage) if action is None else action.coverage
        formulation = self.formulation_distribution(formulation_in, polymer_id, coverage)
        if action is None:
            presquash = formulation.sample(noise.normal) if noise else formulation.median()
            action = HybridAction(polymer_id, presquash, coverage)
        logprob = take(polymer_logp, action.polymer_id) + take(coverage_logp, action.coverage)
        logprob = logprob + formulation.logprob(action.presquash)
        # With autoregressive heads the conditional entropies at the sampled categories are an
        # unbiased estimate of their mean over categories.
        entropy = categorical_entropy(polymer_logp) + categorical_entropy(coverage_logp)
        entropy = entropy + formulation.entropy()
        return PolicyOutput(action, logprob, entropy, self._value(value_in))

    def formulation_distribution(
        self, hidden: Tensor, polymer_id: Tensor, coverage: Tensor
    ) -> SquashedNormal:
        """Distribution of the formulation, given the (B, 128) pre-activation of its head."""
        out = self.formulation_head(hidden, polymer_id)  # a block per coverage too was no better
        if self.state_std:
            mean, log_std = out.split(self.formulation_dim, -1)
            return SquashedNormal(mean, log_std.clamp(*LOG_STD_RANGE), self.nodes)
        log_std = self.formulation_log_std
        log_std = log_std[polymer_id] if self.autoregressive else log_std.expand_as(out)
        return SquashedNormal(out, log_std, self.nodes)

    def to_env(self, action: HybridAction) -> dict[str, Tensor]:
        """The action in the environment's `dict` format and physical units."""
        share = (SquashedNormal.squash(action.presquash) + 1.0) / 2.0
        # lerp is exact at both ends, so that no formulation leaves its box by a rounding error.
        formulation = torch.lerp(self.formulation_low, self.formulation_high, share)
        polymer_id, _, coverage = action
        return {"polymer_id": polymer_id, "formulation": formulation, "coverage": coverage}

    def design(
        self, obs: Tensor, generator: torch.Generator | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What the environment takes, sampled or deterministic, and the policy's entropy, (B,)."""
        noise = generator and draw_noise(len(obs), dim=self.formulation_dim, generator=generator)
        output = self(obs, noise=noise)
        return self.to_env(output.action), output.entropy


def choose(logp: Tensor, uniform: Tensor | None) -> Tensor:
    """Category of each row of (B, K) log-probabilities: the likeliest, or drawn by `uniform`."""
    if uniform is None:
        return logp.argmax(-1)
    cumulative = logp.exp().cumsum(-1)
    # Times the last entry, which rounding may leave off 1: no number may lie beyond it.
    is_below = cumulative <= uniform.unsqueeze(-1) * cumulative[:, -1:]
    return is_below.sum(-1).clamp(max=logp.shape[-1] - 1)


def take(values: Tensor, index: Tensor) -> Tensor:
    """(B, ...) entries of (B, K, ...) at the (B,) `index`."""
    index = index.view(-1, *[1] * (values.dim() - 1)).expand(-1, 1, *values.shape[2:])
    return values.gather(1, index).squeeze(1)


def categorical_entropy(logp: Tensor) -> Tensor:
    """Entropy of (B, K) normalised log-probabilities, nats."""
    return -(logp.exp() * logp).sum(-1)


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation [Schulman2016].

    `terminated` stops the bootstrap; `done` (terminated or truncated) stops the trace, since what
    follows belongs to another episode. Returns come from the raw advantages.

    All are (T, B): `values` are of the observation before each step, `next_values` of that after it
    (where the episode was truncated, of its last one). Gives advantages and returns.

    References:
        [Schulman2016] Schulman et al. High-dimensional continuous control using generalized
        advantage estimation. ICLR 2016.
    """
    bootstrap = torch.where(terminated, torch.zeros_like(next_values), next_values)
    deltas = rewards + gamma * bootstrap - values
    carry = gamma * gae_lambda * (~done).to(deltas.dtype)
    advantages, trace = torch.empty_like(deltas), torch.zeros_like(deltas[0])
    for t in reversed(range(deltas.shape[0])):
        trace = deltas[t] + carry[t] * trace
        advantages[t] = trace
    return advantages, advantages + values


class Batch(NamedTuple):
    """Samples of one rollout, flattened to (T * B, ...)."""

    obs: Tensor
    action: HybridAction
    logprob: Tensor
    advantage: Tensor
    returns: Tensor
    value: Tensor


def rows_of(batch: Any, index: Tensor | slice | int) -> Any:
    """What `index` takes of the first dimension of every tensor of a `Batch` or `Noise`."""
    return tree_map(lambda part: part[index], batch)


def normalize_advantage(advantage: Tensor, unit: float | Tensor | None = None) -> Tensor:
    """(K, M) advantages of K minibatches, each of mean 0, in a unit or their standard deviation."""
    std, mean = torch.std_mean(advantage, -1, correction=0, keepdim=True)
    return (advantage - mean) / (std + 1e-8 if unit is None else unit)


def ppo_loss(
    output: PolicyOutput, batch: Batch, args: Args, return_std: Tensor | float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate loss with value loss and entropy bonus [Schulman2017], and its parts.

    The value loss is the mean squared error in units of `return_std`; with `args.clip_vloss` the
    larger of it and the clipped one. `output` is what the policy now makes of the actions.

    References:
        [Schulman2017] Schulman et al. Proximal policy optimization algorithms. arXiv:1707.06347.
    """
    logratio = output.logprob - batch.logprob
    ratio = logratio.exp()
    clipped = ratio.clamp(1.0 - args.clip_coef, 1.0 + args.clip_coef)
    policy_loss = -torch.minimum(batch.advantage * ratio, batch.advantage * clipped).mean()

    squared_error = ((output.value - batch.returns) / return_std).square()
    if args.clip_vloss:
        change = ((output.value - batch.value) / return_std).clamp(-args.clip_coef, args.clip_coef)
        clipped_error = (batch.value - batch.returns) / return_std + change
        squared_error = torch.maximum(squared_error, clipped_error.square())
    value_loss = squared_error.mean()

    entropy = output.entropy.mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    with torch.no_grad():
        approx_kl = (ratio - 1.0 - logratio).mean()  # the k3 estimator
        clipfrac = ((ratio - 1.0).abs() > args.clip_coef).to(ratio.dtype).mean()
    parts = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    parts |= {"approx_kl": approx_kl, "clipfrac": clipfrac}
    return loss, {name: part.detach() for name, part in parts.items()}


def act(agent: Agent, obs: Tensor, noise: Noise) -> tuple[HybridAction, Tensor, Tensor, dict]:
    """Sample an action; returns it, its log-probability, the state's value, and its design."""
    output = agent(obs, noise=noise)
    return output.action, output.logprob, output.value, agent.to_env(output.action)


@torch.no_grad()
def rollout(
    envs: gym.vector.VectorEnv,
    agent: Agent,
    obs: Tensor,
    args: Args,
    generator: torch.Generator,
    act: Callable[..., Any] = act,
    world: runs.World = runs.ALONE,
) -> tuple[Tensor, Batch, dict[str, Tensor]]:
    """Take `num_steps` steps in every environment.

    Returns the observation to go on from, of this rank's environments; of those of all ranks the
    flattened batch, and (T, B) tensors of the steps' rewards and infos.
    """
    # Ours never truncate from inside; to ask the data of others would be a read on the host.
    may_truncate = not isinstance(envs.unwrapped, hydrogel_gym.HydrogelVectorEnv)
    # Of all environments, so that each is given the same ones however many ranks there are.
    num_envs = len(obs) * world.size
    noise = draw_noise(args.num_steps, num_envs, dim=agent.formulation_dim, generator=generator)
    noise = Noise(*(part[:, world.share(num_envs)] for part in noise))
    steps: list[dict[str, Any]] = []
    for t in range(args.num_steps):
        action, logprob, value, design = act(agent, obs, rows_of(noise, t))
        next_obs, reward, terminated, truncated, info = envs.step(design)
        step = {"obs": obs, **action._asdict(), "logprob": logprob, "value": value}
        step |= {"reward": reward.to(value.dtype), "terminated": terminated}
        step |= {"done": terminated | truncated}
        step |= {name: runs.at_step(info, name) for name in runs.INFOS}
        steps.append(step | ({"final_obs": info["final_obs"]} if may_truncate else {}))
        obs = next_obs
    data = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}

    # bootstrap: the value after a step is that of the next one, or of the final observation
    next_values = torch.cat([data["value"][1:], agent.value(obs).unsqueeze(0)])
    if may_truncate:
        final_values = agent.value(data["final_obs"].flatten(0, 1)).view_as(next_values)
        next_values = torch.where(data["done"] & ~data["terminated"], final_values, next_values)
    rewards, ends = data["reward"], (data["terminated"], data["done"])
    if args.is_stricter:
        rewards = runs.stricter_reward(data, envs, args.limit_margin, args.penalty_scale)
    advantages, returns = compute_gae(
        rewards, data["value"], next_values, *ends, args.gamma, args.gae_lambda
    )
    # Where no design bears on later ones and the response is seen, an episode's steps are alike.
    alike = args.observe == "response" and args.gamma == 0.0
    episodes = args.num_steps // args.horizon if args.patient_assignment == "fixed" else 1
    count = args.horizon if alike else episodes
    if args.patient_baseline and count > 1 and args.num_steps % args.horizon == 0:
        # They differ in the designs alone; what the value misses of the patient is no more noise.
        same = advantages.unflatten(0, (-1, args.horizon))
        same = (same - same.mean(int(alike), keepdim=True)) * (count / (count - 1))
        if alike:
            # Few have a design beyond a limit, and would outweigh what all others teach.
            spread = same.std(1, keepdim=True).clamp_min(1e-6)
            typical = world.average(spread.log().mean()).exp()
            same = same * typical / (spread + typical)
        advantages = same.flatten(0, 1)
    action = HybridAction(data["polymer_id"], data["presquash"], data["coverage"])
    batch = Batch(data["obs"], action, data["logprob"], advantages, returns, data["value"])
    infos = {name: data[name] for name in ("reward", *runs.INFOS)}
    batch, infos = tree_map(lambda part: world.gather(part, dim=1), (batch, infos))
    return obs, tree_map(lambda part: part.flatten(0, 1), batch), infos


def gradient_step(
    agent: Agent,
    optimizer: torch.optim.Optimizer,
    args: Args,
    minibatch: Batch,
    average: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """One step of the optimiser; returns the parts of the loss and the norm of the gradient.

    With several ranks, `minibatch` is the share of this one, and `average` the mean over them.
    """
    output = agent(minibatch.obs, minibatch.action)
    loss, parts = ppo_loss(output, minibatch, args, agent.return_std)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    weights = optimizer.param_groups[0]["params"]
    if average is not None:
        runs.average_gradients(weights, average)
    parts["grad_norm"] = nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
    optimizer.step()
    return parts


def update(
    step: Callable[[Batch], dict[str, Tensor]],
    batch: Batch,
    args: Args,
    generator: torch.Generator,
    world: runs.World = runs.ALONE,
    unit: float | None = None,
) -> dict[str, Tensor]:
    """Epochs of minibatch updates; returns the mean of each part of the loss over them.

    Ends early when an epoch ends with `target_kl` exceeded by the last minibatch of all ranks.
    """

    def epoch(batch: Batch, unit: Tensor | float | None = None) -> dict[str, Tensor]:
        order = torch.randperm(len(batch.logprob), generator=generator, device=generator.device)
        # The same minibatches for any number of ranks, each of which takes an equal share.
        order = order.view(-1, args.minibatch_size)
        share = world.share(args.minibatch_size)
        advantage = normalize_advantage(batch.advantage[order], unit)[:, share].flatten()
        shuffled = rows_of(batch, order[:, share].flatten())._replace(advantage=advantage)
        rows = args.minibatch_size // world.size
        starts = range(0, len(shuffled.logprob), rows)
        parts = [step(rows_of(shuffled, slice(start, start + rows))) for start in starts]
        return {name: torch.stack([each[name] for each in parts]) for name in parts[0]}

    # One graph on a GPU: only what it takes as an argument changes from one update to another.
    inputs = (batch,) if unit is None else (batch, unit)
    run_epoch = runs.recorded(step, epoch, inputs, generator)
    history: list[dict[str, Tensor]] = []
    for _ in range(args.num_epochs):
        history.append(run_epoch())
        # On every rank, or one would go on and wait for the others for ever.
        last_kl = history[-1]["approx_kl"][-1]
        if args.target_kl and world.average(last_kl.clone()) > args.target_kl:
            break
    losses = {name: torch.cat([parts[name] for parts in history]).mean() for name in history[0]}
    means = world.average(torch.stack(list(losses.values())))
    return dict(zip(losses, means.unbind(), strict=True))


def learning_rate_at(iteration: int, args: Args) -> float:
    """Learning rate of an iteration, the first of which is 1: cosine decay to zero."""
    share = (iteration - 1) / args.num_iterations if args.anneal_lr else 0.0
    return args.learning_rate * 0.5 * (1.0 + math.cos(math.pi * share))


def advantage_unit_at(iteration: int, args: Args) -> float | None:
    """Unit of advantages by which the entropy bonus has its temperature; None for their spread."""
    # Their spread falls before the best is found: `benchmark/quality/collapse.py`.
    if args.temperature is None:
        return None
    share = (iteration - 1) / args.num_iterations
    return args.temperature * 0.01**share / args.ent_coef


def make_learner(
    args: Args, cohort: hydrogel_gym.Cohort, device: torch.device, world: runs.World, compile: bool
) -> tuple[runs.Learner, Callable[..., Any], Callable[..., dict[str, Tensor]]]:
    """A learner with initial weights, how it acts and how it takes a gradient step."""
    make = functools.partial(runs.make_envs, args, cohort, device, dtype=args.dtype)
    envs = make(num_envs=args.num_envs // world.size, compile=compile)
    if args.is_stricter and not hasattr(envs.unwrapped, "problem"):
        raise UsageError(
            f"--env-id {args.env_id} does not say what its limits are (env.unwrapped.problem); "
            "pass --limit-margin 0 --penalty-scale 1"
        )
    torch.manual_seed(args.seed)  # initial weights
    space = envs.single_action_space
    architecture = {
        "obs_dim": envs.single_observation_space.shape[0],
        "num_polymers": int(space["polymer_id"].n),
        "num_coverages": int(space["coverage"].n),
        "formulation_low": space["formulation"].low.tolist(),
        "formulation_high": space["formulation"].high.tolist(),
        **{key: getattr(args, key) for key in "policy state_std hidden_dim precision".split()},
    }
    agent = Agent(**architecture).to(device)
    # Of the environments of all ranks, not of this one's patients.
    every = envs if world.size == 1 else make(num_envs=args.num_envs)
    statistics = runs.observation_statistics(every, args.horizon, args.seed)
    agent.obs_mean[:], agent.obs_std[:] = statistics
    weights = [runs.flatten_weights(agent)] if compile else list(agent.parameters())
    optimizer = torch.optim.Adam(weights, eps=1e-5, fused=device.type in ("cpu", "cuda"))
    generator = torch.Generator(device).manual_seed(args.seed)  # samples and minibatches
    learner = runs.Learner(envs, agent, architecture, optimizer, generator)
    if compile:
        return learner, *compile_learner(agent, optimizer, args, world)
    return learner, act, functools.partial(gradient_step, agent, optimizer, args)


def compile_learner(
    agent: Agent, optimizer: torch.optim.Optimizer, args: Args, world: runs.World
) -> tuple[Callable[..., Any], Callable[..., dict[str, Tensor]]]:
    """`act` and `gradient_step` as one graph each; `runs.compiled` has the machinery."""

    def loss(forward: Callable[..., Any], minibatch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        output = forward(minibatch.obs, minibatch.action)
        return ppo_loss(output, minibatch, args, agent.return_std)

    # An example of the inputs of each, by which they are compiled.
    device, num_envs = agent.obs_mean.device, args.num_envs // world.size
    rows = args.minibatch_size // world.size
    obs = agent.obs_mean.expand(max(rows, num_envs), -1).contiguous()
    generator = torch.Generator(device).manual_seed(0)
    noise = draw_noise(len(obs), dim=agent.formulation_dim, generator=generator)
    with torch.no_grad():
        action, logprob, value, _ = act(agent, obs[:rows], rows_of(noise, slice(rows)))
    act_inputs = (obs[:num_envs], rows_of(noise, slice(num_envs)))
    minibatch = Batch(obs[:rows], action, logprob, value, value, value)
    inputs = (agent, optimizer, act, loss, args.max_grad_norm, world)
    return runs.compile_training(*inputs, act_inputs=act_inputs, minibatch=minibatch)


def train(args: Args) -> dict[str, Any]:
    """Train a policy and write its run directory; returns the content of `summary.json`.

    Raises:
        UsageError: the request cannot be carried out; raised before training.
        FloatingPointError: the loss stopped being a number; the run so far is on disk.
        OSError: the run could not be saved; says from where it can go on.
    """
    check_args(args, world := runs.world_from_environment())
    labels = {"preset": args.preset, "policy": args.policy}
    with runs.start_run(args, world, labels, args.num_iterations, args.num_steps) as run:
        world, device = run.world, run.device
        runs.check_rollout_memory(args.num_envs, args.num_steps, device, world)
        make = functools.partial(make_learner, args, run.cohorts["train"], device, world)
        (learner, act, step), compile_seconds = runs.compiled_or_plain(
            make, args.compile, args.num_updates, world, device
        )
        _, agent, _, optimizer, generator = learner
        obs = run.restore(learner, agent.design, compile_seconds)
        if (average := runs.averaging(list(agent.parameters()), world)) is not None:
            step = functools.partial(step, average=average)
        roll_out = runs.recorded_rollout(rollout, step, learner, args=args, act=act, world=world)

        for iteration in run.iterations():
            obs, batch, infos = roll_out(obs)
            rolled_out_at = time.perf_counter()
            if iteration == 1:
                agent.set_return_scale(batch.returns)
            optimizer.param_groups[0]["lr"] = rate = learning_rate_at(iteration, args)
            losses = update(step, batch, args, generator, world, advantage_unit_at(iteration, args))
            unexplained = (batch.returns - batch.value).var() / batch.returns.var().clamp_min(1e-12)
            losses |= {"explained_variance": 1.0 - unexplained, "learning_rate": rate}
            run.record(infos, losses, rolled_out_at)
            run.save_if_due(obs)
        return run.finish()


def check_args(args: Args, world: runs.World) -> None:
    """Refuse, before anything is done, what cannot be carried out, as a `UsageError`."""
    runs.check_options(args)
    if args.policy not in get_args(Policy):
        raise UsageError(f"--policy is {args.policy!r}; allowed: {', '.join(get_args(Policy))}")
    positive = "learning_rate clip_coef max_grad_norm" + " ent_coef" * bool(args.temperature)
    sizes = "num_envs num_steps num_iterations num_epochs minibatch_size hidden_dim"
    runs.check_ranges(
        args,
        (sizes, "1 or more", lambda x: x >= 1),
        ("gamma gae_lambda", "0 to 1", lambda x: 0.0 <= x <= 1.0),
        ("vf_coef ent_coef limit_margin penalty_scale", "0 or more", lambda x: 0.0 <= x < math.inf),
        (positive, "above 0", lambda x: 0.0 < x < math.inf),
        ("target_kl temperature", "above 0", lambda x: x is None or 0.0 < x < math.inf),
    )
    runs.check_shares(args.num_envs, args.num_steps, args.minibatch_size, world.size)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""

    def body() -> int:
        args = runs.read_run_options(Args, PRESETS, argv, prog="ppo_hybrid.py")
        return runs.print_summary(train(args))

    return runs.run_script(body, out_of_memory="take fewer --num-envs or --num-steps")


def command() -> None:
    """Run the command line as a process of its own: `hydrogel-train`."""
    runs.run_process(main)


if __name__ == "__main__":
    command()
