"""Proximal policy optimisation for a hybrid action space, in one file.

One policy learns to design a hydrogel for every patient of a cohort: a polymer (categorical), a
formulation (four continuous parameters) and a coverage pattern (categorical).

    python train/ppo_hybrid.py --preset quick                                  # half a minute
    python train/ppo_hybrid.py --preset full                                   # the best policy
    python train/ppo_hybrid.py --preset source --precision bf16                # the source's scale
    python train/ppo_hybrid.py --evaluate runs/quick-s1/stage2_policy.pt       # a saved policy
    python train/ppo_hybrid.py --resume runs/quick-s1                          # an interrupted run
    python train/ppo_hybrid.py --preset quick --track                          # log to W&B
    torchrun --nproc-per-node=8 train/ppo_hybrid.py --preset source            # eight GPUs

The run directory receives `config.json`, `metrics.csv` (a row per iteration), `learning_curve.png`,
`policy_selection.png`, `stage2_policy.pt`, `summary.json` and `checkpoints/`; the README defines
every column. `--track` logs the same to Weights & Biases, `--tensorboard` to TensorBoard.
The algorithm reads from top to bottom in plain PyTorch; `CompiledStep` and what follows it make the
same rollout and update one compiled graph each (`--compile`).
Figures of *the source* are those of the HYDRA-BERT Stage-2 document; the README lists its faults
that are mended here.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import queue
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map, tree_map_only
from tqdm import tqdm

import hydrogel_gym
from hydrogel_gym.compiled import CompileError
from hydrogel_gym.files import write_atomically
from hydrogel_gym.memory import available_bytes, keep_freed_memory
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.problem.fields import COVERAGES, FORMULATION_FIELDS, PATIENT_FIELDS
from hydrogel_gym.problem.reward import RewardTerms

Preset = Literal["source", "quick", "full"]
Policy = Literal["factored", "autoregressive"]
Precision = Literal["fp32", "bf16", "fp64"]
Compile = Literal["auto", "on", "off"]

POLICY_FILE, SUMMARY_FILE, METRICS_FILE = "stage2_policy.pt", "summary.json", "metrics.csv"
WANDB_FILE = "wandb.json"  # which W&B run is this one
RUN_FILES = (
    POLICY_FILE,
    SUMMARY_FILE,
    METRICS_FILE,
    WANDB_FILE,
    "config.json",
    "learning_curve.png",
    "policy_selection.png",
)
CHECKPOINTS = "checkpoints"  # a folder of the run directory
CHECKPOINT_FORMAT = "hydrogel_gym.checkpoint.v2"

COHORTS = ("train", "holdout")
BUILT_IN = "mechanistic"
TRUE = "true_"  # before the names of figures by --true-reward-model
YARDSTICK = ("regret", "regret_p95", "fraction_of_oracle")
SAFETY_LIMITS = ("toxicity", "integrity", "fibrosis")
# What the logit of `is_optimal` tells is told by its term of the reward.
OUTCOMES_LOGGED = tuple(name for name in hydrogel_gym.Outcomes._fields if name != "optimal_logit")
TOLD = ("reward", "is_optimal", *OUTCOMES_LOGGED, *RewardTerms._fields)
# The learner's own reward is computed from these.
INFOS_KEPT = tuple(dict.fromkeys((*TOLD[1:], *hydrogel_gym.Outcomes._fields, *RewardTerms._fields)))

# A column of `metrics.csv` is NAMESPACE/COLUMN in W&B and TensorBoard.
NAMESPACES = {
    "losses": (
        "policy_loss value_loss entropy approx_kl clipfrac grad_norm explained_variance"
    ).split(),
    "reward": [*RewardTerms._fields, *(f"mean_{name}" for name in OUTCOMES_LOGGED)],
    "eval": [
        f"{prefix}{cohort}_{name}"
        for prefix in ("", TRUE)
        for cohort in COHORTS
        for name in ("deterministic_reward", *YARDSTICK)
    ],
    "perf": (
        "rollout_seconds reward_model_seconds update_seconds wall_seconds samples_per_second"
    ).split(),
    "charts": (
        "iteration mean_reward max_reward optimal_rate learning_rate "
        + " ".join(f"{name}_breach_rate" for name in SAFETY_LIMITS)
    ).split(),
}
# Of these W&B's summary shows the best of the run, of the rest the last. A sweep's objective has to
# be a number there, so fractions of the oracle are among the rest.
BEST_IS = {
    "max": ["charts/mean_reward", "charts/max_reward", "charts/optimal_rate"]
    + [f"eval/{p}{cohort}_deterministic_reward" for p in ("", TRUE) for cohort in COHORTS],
    "min": [
        f"eval/{prefix}{cohort}_{name}"
        for prefix in ("", TRUE)
        for cohort in COHORTS
        for name in ("regret", "regret_p95")
    ],
}
NUM_TOP_DESIGNS = 20  # of W&B's table
# Settings of W&B where the environment has none ($WANDB_CONSOLE and so on). The console would be
# copies of a progress bar; a network that is gone keeps the end of a run waiting.
WANDB_SETTINGS = {"console": "off", "init_timeout": 30.0, "finish_timeout": 300.0}
LAST_WAIT_SECONDS = 400.0  # for all logs, when training has ended
# For them to begin. Beside training that would take several times as long from it: what imports
# holds the interpreter for milliseconds at a time, which training needs for every operation.
FIRST_WAIT_SECONDS = 60.0

# The source's own results (sections 6.1 and 6.3), drawn beside ours: another reward model, so only
# the shape of the curve and its cost can be compared.
SOURCE_MEAN_REWARD = {0: 12.4, 20: 18.7, 50: 23.1, 100: 26.8, 150: 28.4, 200: 29.2}
SOURCE_SAMPLES_PER_ITERATION = 200_000
SOURCE_POLYMER_SHARE = {
    "PEGDA_3400": 0.182,
    "GelMA_rGO": 0.151,
    "GelMA_MXene": 0.124,
    "HA_ECM": 0.118,
    "Alginate_CaCl2": 0.092,
    "PEGDA_700": 0.086,
    "GelMA_3pct": 0.073,
}


class UsageError(ValueError):
    """A request that cannot be carried out; the message is one line for the person who asked."""


@dataclass
class Args:
    """Train, or evaluate, a hybrid-action PPO policy on HydrogelDesign-v0."""

    preset: Preset = "source"
    """starting values of all other flags: the source's table, a run of half a minute, or the
    best policy that a few minutes give"""
    output_dir: Path | None = None
    """run directory; default runs/PRESET-sSEED"""
    overwrite: bool = False
    """replace the run that the output directory holds"""
    evaluate: Path | None = None
    """evaluate this saved policy instead of training"""
    cohort: Path | None = None
    """patients to train (or to evaluate) on, CSV or Parquet; default the shipped cohort"""
    holdout_cohort: Path | None = None
    """patients to judge generalisation on; default the shipped hold-out cohort"""
    seed: int = 1
    """seed of weights, sampling and minibatches"""
    device: str = "auto"
    """auto (cuda if there is one, else cpu) or a torch device"""
    oracle: bool = True
    """search for every patient's best design first (kept beside the run), to measure regret"""

    # Interruptions
    checkpoint_interval: int = 20
    """iterations from one checkpoint to the next; 0 writes none"""
    keep_checkpoints: int = 3
    """how many of them stay"""
    resume: str | None = None
    """continue a run: from this checkpoint, from the newest of this run directory, or with `auto`
    from the newest of the output directory, and from the start where it has none"""

    # Logs, beside metrics.csv
    track: bool = False
    """log to Weights & Biases; offline where there is no account or no network"""
    wandb_project: str | None = None
    """default $WANDB_PROJECT, else hydrogel_gym"""
    wandb_entity: str | None = None
    """user or team; default $WANDB_ENTITY, else that of the account"""
    tensorboard: bool = False
    """log to TensorBoard, in the run directory"""

    # Environment
    env_id: str = "HydrogelDesign-v0"
    """environment to learn"""
    horizon: int = 1
    """designs tried per episode"""
    num_envs: int = 2000
    """parallel environments, over all ranks; environment i treats patient i modulo the size of the
    cohort"""
    patient_assignment: Literal["fixed", "random"] = "fixed"
    """whether an environment keeps its patient or draws one at each reset"""
    reward_model: str = BUILT_IN
    """frozen Stage-1 model that rewards: mechanistic, a checkpoint of `train/fit_stage1.py` (.pt),
    a program of torch.export (.pt2), or module:factory"""
    pessimism: float | None = None
    """standard deviations of a checkpoint's ensemble below its mean that are rewarded; default the
    checkpoint's own"""
    reward_precision: Literal["fp32", "bf16"] = "fp32"
    """of a checkpoint's matrix products"""
    true_reward_model: str | None = None
    """where the truth behind the reward model is known: judge by this one too, whose oracle is then
    the yardstick"""

    limit_margin: float = 0.01
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
    precision: Precision = "fp32"
    """of the two large matrix products (fp32 is TF32 on CUDA), everything else being float32;
    fp64 is float64 throughout, to compare runs by"""
    compile: Compile = "auto"
    """compile rollout and update; auto does so when the run is long enough to gain by it"""
    num_iterations: int = 200
    """rollouts, each followed by its updates"""
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
    clip_coef: float = 0.2
    """clipping range of the probability ratio"""
    clip_vloss: bool = False
    """clip the change of the value too, in units of the return's standard deviation"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient"""
    target_kl: float | None = None
    """end an iteration's epochs once the approximate KL divergence exceeds this"""


PRESETS: dict[Preset, dict[str, Any]] = {
    # Args itself holds the source's numbers; its network has independent heads.
    "source": dict(policy="factored", state_std=False, limit_margin=0.0, penalty_scale=1.0),
    # Short rollouts, so that what was learnt is tried at once: `benchmark/learning_quality.py`.
    "quick": dict(
        num_iterations=100,
        num_steps=2,
        minibatch_size=1000,
        num_epochs=4,
        learning_rate=2e-3,
        vf_coef=2.0,
    ),
    "full": dict(
        num_iterations=200,
        num_steps=5,
        minibatch_size=1000,
        num_epochs=4,
        learning_rate=2e-3,
        vf_coef=2.0,
    ),
}


# Of `--compile auto`, see `worth_compiling`. Small and large minibatches save about as much.
SECONDS_SAVED_PER_UPDATE = 3e-3
COMPILE_SECONDS = 34.0
# At least, for the tensors of a rollout and their copies; with the libraries, the 200,000 samples
# of the source preset take 1,750 each by `benchmark/throughput.py`.
BYTES_PER_SAMPLE = 1000
BYTES_PER_GATHERED_SAMPLE = 400  # on every rank: the batch of all, and its copies by minibatch

SHARED_MEMORY = "/dev/shm"

# Rank 0 searches for the best designs while the others wait.
RANKS_TIMEOUT = timedelta(minutes=30)

BETAS, EPS = (0.9, 0.999), 1e-5  # of Adam

# Wide enough to bind nowhere in practice; keeps a diverging run from overflow.
LOG_STD_RANGE = (-6.0, 1.0)
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

    def rows(self, index: int | slice) -> Noise:
        """The numbers at `index` of the first dimension."""
        return Noise(self.uniform[index], self.normal[index])


def draw_noise(*shape: int, formulation_dim: int, generator: torch.Generator) -> Noise:
    """`Noise` of the given leading shape, on the generator's device."""
    device = generator.device
    return Noise(
        torch.rand(*shape, 2, generator=generator, device=device),
        torch.randn(*shape, formulation_dim, generator=generator, device=device),
    )


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


# Nodes and weights for the mean of a function of a standard normal variable.
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(8)


def log_tanh_jacobian(u: Tensor) -> Tensor:
    """Logarithm of d tanh(u) / du, elementwise; this form neither overflows nor cancels."""
    return 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))


class SquashedNormal(NamedTuple):
    """Distribution of tanh(u) on [-1, 1]^d for u ~ N(mean, std)."""

    mean: Tensor  # (B, d)
    log_std: Tensor  # (B, d)
    nodes: Tensor  # (2, K) quadrature nodes and weights

    def median(self) -> Tensor:
        """(B, d) median before tanh."""
        return self.mean

    def sample(self, normal: Tensor) -> Tensor:
        """(B, d) sample before tanh, from (B, d) standard normal numbers."""
        return self.mean + self.log_std.exp() * normal

    def logprob(self, u: Tensor) -> Tensor:
        """(B,) log-density of tanh(u) at the (B, d) presquash value u."""
        z = (u - self.mean) * (-self.log_std).exp()
        normal = -0.5 * z.square() - self.log_std - 0.5 * math.log(2.0 * math.pi)
        return (normal - log_tanh_jacobian(u)).sum(-1)

    def entropy_estimate(self) -> Tensor:
        """(B,) entropy.

        The normal part is exact; the mean log-Jacobian has no closed form and is estimated by
        Gauss-Hermite quadrature, which has no sampling noise.
        """
        u = self.mean.unsqueeze(-1) + self.log_std.exp().unsqueeze(-1) * self.nodes[0]
        jacobian = (log_tanh_jacobian(u) * self.nodes[1]).sum(-1)
        return (self.log_std + 0.5 * math.log(2.0 * math.pi * math.e) + jacobian).sum(-1)


class Agent(nn.Module):
    """Actor-critic of the source's shape: one trunk, a head per action factor, a critic.

    The continuous head is a Gaussian squashed by tanh onto the formulation's box. With
    autoregressive heads, coverage and formulation have a block of outputs for each polymer.
    Observations are normalised by fixed buffers, and the critic works in units of the return's
    standard deviation; both are saved with the weights.

    Args:
        obs_dim: width of the observation.
        num_polymers: categories of the polymer head.
        num_coverages: categories of the coverage head.
        formulation_low: lower bounds of the formulation, physical units.
        formulation_high: upper bounds.
        policy: `"factored"` or `"autoregressive"`.
        state_std: let the Gaussian's spread depend on the state.
        hidden_dim: width of the trunk.
        precision: `"bf16"` does the two large matrix products in bfloat16, `"fp64"` everything in
            float64.
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
        precision: Precision = "fp32",
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
        if precision == "fp64":
            self.double()

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
        self,
        obs: Tensor,
        action: HybridAction | None = None,
        *,
        noise: Noise | None = None,
    ) -> PolicyOutput:
        """Choose an action, or judge a given one.

        Args:
            obs: (B, obs_dim), physical units.
            action: to judge; None chooses one.
            noise: what to sample from; None chooses the most probable categories and the median
                formulation.
        """
        pick_polymer, pick_coverage = noise.uniform.unbind(-1) if noise else (None, None)
        polymer_in, formulation_in, coverage_in, value_in = self.head_inputs(obs)
        polymer_logp = self.polymer_head(polymer_in).log_softmax(-1)
        if action is None:
            polymer_id = choose(polymer_logp, pick_polymer)
        else:
            polymer_id = action.polymer_id
        coverage_logp = self.coverage_head(coverage_in, polymer_id).log_softmax(-1)
        if action is None:
            coverage = choose(coverage_logp, pick_coverage)
        else:
            coverage = action.coverage
        formulation = self.formulation_distribution(formulation_in, polymer_id, coverage)
        if action is None:
            presquash = formulation.sample(noise.normal) if noise else formulation.median()
            action = HybridAction(polymer_id, presquash, coverage)
        logprob = (
            take(polymer_logp, action.polymer_id)
            + take(coverage_logp, action.coverage)
            + formulation.logprob(action.presquash)
        )
        # With autoregressive heads the conditional entropies at the sampled categories are an
        # unbiased estimate of their mean over categories.
        entropy = (
            categorical_entropy(polymer_logp)
            + categorical_entropy(coverage_logp)
            + formulation.entropy_estimate()
        )
        return PolicyOutput(action, logprob, entropy, self._value(value_in))

    def formulation_distribution(
        self, hidden: Tensor, polymer_id: Tensor, coverage: Tensor
    ) -> SquashedNormal:
        """Distribution of the formulation.

        Args:
            hidden: (B, 128) pre-activation of the head.
            polymer_id: (B,); factored heads do not look at it.
            coverage: (B,); no head looks at it, for a block per coverage too was no better.
        """
        out = self.formulation_head(hidden, polymer_id)
        if self.state_std:
            mean, log_std = out.split(self.formulation_dim, -1)
            return SquashedNormal(mean, log_std.clamp(*LOG_STD_RANGE), self.nodes)
        log_std = self.formulation_log_std
        log_std = log_std[polymer_id] if self.autoregressive else log_std.expand_as(out)
        return SquashedNormal(out, log_std, self.nodes)

    def to_env(self, action: HybridAction) -> dict[str, Tensor]:
        """The action in the environment's `dict` format and physical units."""
        share = (action.presquash.tanh() + 1.0) / 2.0
        # lerp is exact at both ends, so that no formulation leaves its box by a rounding error.
        formulation = torch.lerp(self.formulation_low, self.formulation_high, share)
        return {
            "polymer_id": action.polymer_id,
            "formulation": formulation,
            "coverage": action.coverage,
        }


def choose(logp: Tensor, uniform: Tensor | None) -> Tensor:
    """Category of each row of (B, K) log-probabilities, the likeliest without (B,) numbers.

    With them, the category whose share of the cumulative distribution holds the row's number.
    """
    if uniform is None:
        return logp.argmax(-1)
    cumulative = logp.exp().cumsum(-1)
    # Times the last entry, which rounding may leave off 1: no number may lie beyond it.
    return (
        (cumulative <= uniform.unsqueeze(-1) * cumulative[:, -1:])
        .sum(-1)
        .clamp(max=logp.shape[-1] - 1)
    )


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

    Args:
        rewards: (T, B).
        values: (T, B) value of the observation before each step.
        next_values: (T, B) value of the observation after it: that of the final observation where
            the episode was truncated.
        terminated: (T, B) bool.
        done: (T, B) bool.
        gamma: discount.
        gae_lambda: lambda.

    Returns:
        Advantages and returns, (T, B) each.

    References:
        [Schulman2016] Schulman et al. High-dimensional continuous control using generalized
        advantage estimation. ICLR 2016.
    """
    bootstrap = torch.where(terminated, torch.zeros_like(next_values), next_values)
    deltas = rewards + gamma * bootstrap - values
    carry = gamma * gae_lambda * (~done).to(deltas.dtype)
    advantages = torch.empty_like(deltas)
    trace = torch.zeros_like(deltas[0])
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

    def rows(self, index: Tensor | slice) -> Batch:
        """The samples at `index`."""
        obs, action, *rest = self
        action = HybridAction(*(part[index] for part in action))
        return Batch(obs[index], action, *(part[index] for part in rest))

    @property
    def num_samples(self) -> int:
        """T * B."""
        return self.logprob.shape[0]


def normalize_advantage(advantage: Tensor) -> Tensor:
    """(K, M) advantages of K minibatches, each with mean 0 and standard deviation 1."""
    std, mean = torch.std_mean(advantage, -1, correction=0, keepdim=True)
    return (advantage - mean) / (std + 1e-8)


def ppo_loss(
    output: PolicyOutput,
    batch: Batch,
    *,
    clip_coef: float,
    vf_coef: float,
    ent_coef: float,
    return_std: Tensor | float = 1.0,
    clip_vloss: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate loss with value loss and entropy bonus [Schulman2017], and its parts.

    Only the policy's part takes the advantages, which are normalised per minibatch. The value loss
    is the mean squared error in units of `return_std`.

    Args:
        output: the current policy's judgement of the batch's actions.
        batch: M samples with normalised advantages.
        clip_coef: clipping range of the ratio (and, with `clip_vloss`, of the scaled value).
        vf_coef: weight of the value loss.
        ent_coef: weight of the entropy.
        return_std: scale of the returns.
        clip_vloss: take the larger of the plain and the clipped squared error.

    References:
        [Schulman2017] Schulman et al. Proximal policy optimization algorithms. arXiv:1707.06347.
    """
    logratio = output.logprob - batch.logprob
    ratio = logratio.exp()
    clipped = ratio.clamp(1.0 - clip_coef, 1.0 + clip_coef)
    policy_loss = -torch.minimum(batch.advantage * ratio, batch.advantage * clipped).mean()

    error = (output.value - batch.returns) / return_std
    squared_error = error.square()
    if clip_vloss:
        change = ((output.value - batch.value) / return_std).clamp(-clip_coef, clip_coef)
        clipped_error = (batch.value - batch.returns) / return_std + change
        squared_error = torch.maximum(squared_error, clipped_error.square())
    value_loss = squared_error.mean()

    entropy = output.entropy.mean()
    loss = policy_loss + vf_coef * value_loss - ent_coef * entropy
    with torch.no_grad():
        approx_kl = (ratio - 1.0 - logratio).mean()  # the k3 estimator
        clipfrac = ((ratio - 1.0).abs() > clip_coef).to(ratio.dtype).mean()
    return loss, {
        "policy_loss": policy_loss.detach(),
        "value_loss": value_loss.detach(),
        "entropy": entropy.detach(),
        "approx_kl": approx_kl,
        "clipfrac": clipfrac,
    }


class RankLostError(RuntimeError):
    """Another rank has ended, or cannot be reached."""


def collective(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that every rank calls, failing as `RankLostError`."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except RuntimeError as error:  # the backends have no narrower one in common
            raise RankLostError(f"another rank was lost: {reason(error)}") from error

    return call


class World(NamedTuple):
    """The processes that train together, one per device.

    Every rank steps its own share of the environments and learns from its own share of every
    minibatch. What they share is made to be the same on all of them, so that a run does not depend
    on their number: the weights, the random numbers, and, gathered once per rollout, the batch.
    Methods other than `share` are collective: every rank calls them, with tensors of one shape.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1  # ranks on this machine
    joined: bool = False  # there is a process group

    def share(self, count: int) -> slice:
        """This rank's part of `count` things, which the number of ranks divides."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    @collective
    def gather(self, rows: Tensor, dim: int = 0) -> Tensor:
        """The rows of all ranks, by rank, along a dimension."""
        if not self.joined:
            return rows
        rows = rows.movedim(dim, 0).contiguous()
        gathered = rows.new_empty(self.size * len(rows), *rows.shape[1:])
        dist.all_gather_single(gathered, rows)
        return gathered.movedim(0, dim)

    @collective
    def average(self, values: Tensor) -> Tensor:
        """The mean over the ranks, in place."""
        if self.joined:
            dist.all_reduce(values)
            values /= self.size
        return values

    @collective
    def any(self, flags: Tensor) -> Tensor:
        """Which of (K,) int32 flags any rank has set, in place."""
        if self.joined:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        return flags

    @collective
    def broadcast(self, content: bytes | None, device: torch.device) -> bytes | None:
        """What rank 0 has."""
        if not self.joined:
            return content
        size = torch.tensor([-1 if content is None else len(content)], device=device)
        dist.broadcast(size, 0)
        if size.item() < 0:
            return None
        data = torch.empty(size.item(), dtype=torch.uint8, device=device)
        if self.rank == 0:
            data.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(data, 0)
        return data.cpu().numpy().tobytes()

    @collective
    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Give every rank the values of rank 0, in place."""
        if self.joined:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    @collective
    def wait(self) -> None:
        """Return once every rank has called this."""
        if self.joined:
            dist.barrier()


ALONE = World()


class SharedMean:
    """The mean over the ranks of a vector, by way of memory that they share.

    Args:
        rows: (2, ranks, length) shared by all ranks.
        world: which tells when all have written.
    """

    def __init__(self, rows: Tensor, world: World) -> None:
        self.rows, self.world, self.turn = rows, world, 0

    def __call__(self, vector: Tensor) -> Tensor:
        """The mean, in the vector's place; every rank calls."""
        # Two places, in turn: a rank that is ahead does not write where another still reads.
        self.turn = 1 - self.turn
        rows = self.rows[self.turn]
        rows[self.world.rank] = vector
        self.world.wait()
        return torch.mean(rows, 0, out=vector)


def averaging(agent: Agent, world: World) -> Callable[[Tensor], Tensor]:
    """How the ranks average a gradient; collective.

    CPU ranks of one machine do so in memory that they share, if there is some: in messages, which
    gloo sends through sockets, it would cost them twice as much (`benchmark/scaling.py`).
    """
    weights = list(agent.parameters())
    device, dtype = weights[0].device, weights[0].dtype
    if not world.joined or device.type != "cpu" or world.local_size < world.size:
        return world.average
    shape = (2, world.size, sum(weight.numel() for weight in weights))
    size, path = math.prod(shape), None
    with contextlib.ExitStack() as stack:
        if world.rank == 0:
            with contextlib.suppress(OSError):  # another system than Linux, or too little memory
                file = stack.enter_context(tempfile.NamedTemporaryFile(dir=SHARED_MEMORY))
                # Now, since writing to memory that is not there ends a process.
                os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
                path = file.name.encode()
        path = world.broadcast(path, device)
        if path is None:
            return world.average
        rows = torch.from_file(path.decode(), shared=True, size=size, dtype=dtype)
        world.wait()  # then the file loses its name, and goes with the last process
    return SharedMean(rows.view(shape), world)


def act(
    agent: Agent, obs: Tensor, noise: Noise
) -> tuple[HybridAction, Tensor, Tensor, dict[str, Tensor]]:
    """Sample an action for each of (B, obs_dim) observations.

    Returns:
        The action, its log-probability and the state's value, (B,) each, and the action as the
        environment takes it.
    """
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
    world: World = ALONE,
) -> tuple[Tensor, Batch, dict[str, Tensor]]:
    """Take `num_steps` steps in every environment.

    Returns:
        The observation to go on from, of this rank's environments; of those of all ranks the
        flattened batch and (T, B) tensors of what the steps told, by the names in `TOLD`.
    """
    # Our environments never truncate from inside. Of others it is not known, and asking the data
    # would be a read on the host: the value of every final observation is computed.
    may_truncate = not isinstance(envs.unwrapped, hydrogel_gym.HydrogelVectorEnv)
    # Every rank draws the numbers of all environments and takes its own: an environment is given
    # the same ones however many ranks there are.
    num_envs = len(obs) * world.size
    noise = draw_noise(
        args.num_steps, num_envs, formulation_dim=agent.formulation_dim, generator=generator
    )
    noise = Noise(*(part[:, world.share(num_envs)] for part in noise))
    steps: list[dict[str, Any]] = []
    for t in range(args.num_steps):
        action, logprob, value, design = act(agent, obs, noise.rows(t))
        next_obs, reward, terminated, truncated, info = envs.step(design)
        steps.append(
            {
                "obs": obs,
                **action._asdict(),
                "logprob": logprob,
                "value": value,
                "reward": reward.to(value.dtype),
                "terminated": terminated,
                "done": terminated | truncated,
                **{name: at_step(info, name) for name in INFOS_KEPT},
                **({"final_obs": info["final_obs"]} if may_truncate else {}),
            }
        )
        obs = next_obs
    data = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}

    # bootstrap: the value after a step is that of the next one, or of the final observation
    next_values = torch.cat([data["value"][1:], agent.value(obs).unsqueeze(0)])
    if may_truncate:
        final_values = agent.value(data["final_obs"].flatten(0, 1)).view_as(next_values)
        next_values = torch.where(data["done"] & ~data["terminated"], final_values, next_values)
    advantages, returns = compute_gae(
        strict_reward(data, args),
        data["value"],
        next_values,
        data["terminated"],
        data["done"],
        args.gamma,
        args.gae_lambda,
    )
    action = HybridAction(data["polymer_id"], data["presquash"], data["coverage"])
    batch = Batch(data["obs"], action, data["logprob"], advantages, returns, data["value"])
    told = {name: data[name] for name in TOLD}
    batch, told = tree_map(lambda part: world.gather(part, dim=1), (batch, told))
    return obs, tree_map(lambda part: part.flatten(0, 1), batch), told


def strict_reward(told: dict[str, Tensor], args: Args) -> Tensor:
    """(T, B) what the steps are worth to the learner, from what they told.

    A penalty that starts at a limit leaves a policy indifferent on the wrong side of it, and one
    that is right on average breaks the limit for half of the patients who are best served close to
    it. Larger penalties from tighter limits move neither: the best designs break no limit.
    """
    if args.limit_margin == 0.0 and args.penalty_scale == 1.0:
        return told["reward"]
    outcomes = hydrogel_gym.Outcomes(*(told[name] for name in hydrogel_gym.Outcomes._fields))
    config = hydrogel_gym.RewardConfig().stricter(args.limit_margin, args.penalty_scale)
    reward = hydrogel_gym.compute_reward(outcomes, told["reward_novelty"] > 0.0, config)
    return reward.to(told["reward"].dtype)


def at_step(info: dict[str, Any], name: str) -> Tensor:
    """An info of every environment at this step, whether or not its episode ended with it.

    With same-step autoreset an entry is zero at top level where the episode ended and in
    `final_info` where it did not, so the sum is the value.
    """
    return info[name] + info["final_info"][name]


class PlainStep:
    """One step of the optimiser on a minibatch.

    Args:
        agent: the policy, updated in place.
        args: for the loss and the optimiser.
        world: whose gradients are averaged.
    """

    def __init__(self, agent: Agent, args: Args, world: World = ALONE) -> None:
        self.agent, self.args, self.world = agent, args, world
        self.average = world.average
        fused = agent.obs_mean.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(agent.parameters(), betas=BETAS, eps=EPS, fused=fused)

    def __call__(self, minibatch: Batch, learning_rate: float) -> dict[str, Tensor]:
        """Update the agent; returns the parts of the loss and the norm of the gradient.

        Args:
            minibatch: this rank's share of it.
            learning_rate: of this update.
        """
        output = self.agent(minibatch.obs, minibatch.action)
        loss, parts = ppo_loss(
            output, minibatch, return_std=self.agent.return_std, **loss_settings(self.args)
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = self.optimizer.param_groups[0]["params"]
        if self.world.joined:
            average_gradients(parameters, self.average)
        parts["grad_norm"] = nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        return parts

    def state_dict(self) -> dict[str, Any]:
        """Adam's number of updates and its two moments, each as one vector over all weights."""
        weights = self.optimizer.param_groups[0]["params"]
        state = self.optimizer.state
        if not state:
            zeros = torch.cat([torch.zeros_like(weight).flatten() for weight in weights])
            return {"num_updates": 0, "mean": zeros, "square": zeros.clone()}
        mean, square = (
            torch.cat([state[weight][name].flatten() for weight in weights])
            for name in ("exp_avg", "exp_avg_sq")
        )
        return {"num_updates": int(state[weights[0]]["step"]), "mean": mean, "square": square}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, here or in a `CompiledStep`."""
        weights = self.optimizer.param_groups[0]["params"]
        sizes = [weight.numel() for weight in weights]
        moments = (state[name].split(sizes) for name in ("mean", "square"))
        for weight, mean, square in zip(weights, *moments, strict=True):
            self.optimizer.state[weight] = {
                "step": torch.tensor(float(state["num_updates"]), device=weight.device),
                "exp_avg": mean.view_as(weight).to(weight).clone(),
                "exp_avg_sq": square.view_as(weight).to(weight).clone(),
            }


def average_gradients(parameters: list[nn.Parameter], average: Callable[[Tensor], Tensor]) -> None:
    """Give every rank the mean gradient, as one vector instead of one per parameter."""
    gradients = [parameter.grad for parameter in parameters]
    flat = average(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = flat.split([gradient.numel() for gradient in gradients])
    pairs = zip(parts, gradients, strict=True)
    torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in pairs])


def loss_settings(args: Args) -> dict[str, Any]:
    """The settings of `ppo_loss`."""
    return {name: getattr(args, name) for name in "clip_coef vf_coef ent_coef clip_vloss".split()}


def update(
    step: Callable[[Batch, float], dict[str, Tensor]],
    batch: Batch,
    args: Args,
    learning_rate: float,
    generator: torch.Generator,
    world: World = ALONE,
) -> dict[str, Tensor]:
    """Epochs of minibatch updates; returns the mean of each part of the loss over them.

    Ends early when an epoch ends with `target_kl` exceeded by the last minibatch of all ranks.
    """
    history: list[dict[str, Tensor]] = []
    for _ in range(args.num_epochs):
        order = torch.randperm(batch.num_samples, generator=generator, device=generator.device)
        # Minibatches are the same for any number of ranks, and so are their statistics; each rank
        # takes an equal share of every one.
        order = order.view(-1, args.minibatch_size)
        share = world.share(args.minibatch_size)
        advantage = normalize_advantage(batch.advantage[order])[:, share].flatten()
        shuffled = batch.rows(order[:, share].flatten())._replace(advantage=advantage)
        rows = args.minibatch_size // world.size
        for start in range(0, shuffled.num_samples, rows):
            history.append(step(shuffled.rows(slice(start, start + rows)), learning_rate))
        if args.target_kl is not None:
            # On every rank, or one would go on and wait for the others for ever.
            if world.average(history[-1]["approx_kl"].clone()) > args.target_kl:
                break
    losses = mean_over(history)
    means = world.average(torch.stack(list(losses.values())))
    return dict(zip(losses, means.unbind(), strict=True))


def learning_rate_at(iteration: int, args: Args) -> float:
    """Learning rate of an iteration, the first of which is 1: cosine decay to zero."""
    if not args.anneal_lr:
        return args.learning_rate
    share = (iteration - 1) / args.num_iterations
    return args.learning_rate * 0.5 * (1.0 + math.cos(math.pi * share))


def mean_over(history: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each entry over the updates of an iteration."""
    return {name: torch.stack([parts[name] for parts in history]).mean() for name in history[0]}


# The fast path: the same rollout and the same update, as one compiled graph each. Nothing below
# changes what is computed; `act` and `PlainStep` are the definition, and a test compares the two.


class CompiledStep:
    """`PlainStep` as one graph: forward, loss, backward, clipping and Adam.

    The weights become views of one flat vector, so that the gradient is one vector too and Adam one
    kernel; the agent itself is always up to date.

    Args:
        agent: the policy, updated in place.
        args: for the loss and the optimiser.
        world: whose gradients are averaged, between two graphs instead of one.
    """

    def __init__(self, agent: Agent, args: Args, world: World = ALONE) -> None:
        self.agent, self.args, self.world, self.num_updates = agent, args, world, 0
        self.average = world.average
        weights = dict(agent.named_parameters())
        self.names = list(weights)
        self.shapes = [weight.shape for weight in weights.values()]
        self.sizes = [weight.numel() for weight in weights.values()]
        self.buffers = dict(agent.named_buffers())
        self.flat = torch.cat([weight.detach().flatten() for weight in weights.values()])
        for weight, part in zip(weights.values(), self.flat.split(self.sizes), strict=True):
            weight.data = part.view_as(weight)
        self.mean, self.square = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        # What changes from one update to the next: filled in place, without a copy from the host.
        self.step_size, self.root_scale = self.flat.new_ones(()), self.flat.new_ones(())
        device = agent.obs_mean.device
        if world.joined:
            self.gradient_graph = compiled(self.pure_gradient, device)
            self.descent_graph = compiled(self.pure_descent, device)
        else:
            self.graph = compiled(self.pure_step, device)

    def __call__(self, minibatch: Batch, learning_rate: float) -> dict[str, Tensor]:
        """Update the agent; returns the parts of the loss and the norm of the gradient."""
        return self.call(minibatch, learning_rate, self.average)

    @torch.no_grad()
    def call(
        self, minibatch: Batch, learning_rate: float, average: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """`__call__`, with the means of averaging a gradient over the ranks."""
        self.num_updates += 1
        beta1, beta2 = BETAS
        self.step_size.fill_(learning_rate / (1.0 - beta1**self.num_updates))
        self.root_scale.fill_((1.0 - beta2**self.num_updates) ** -0.5)
        if not self.world.joined:
            return self.graph(minibatch)
        gradient, parts = self.gradient_graph(minibatch)
        return parts | {"grad_norm": self.descent_graph(average(gradient))}

    def warm_up(self, minibatch: Batch) -> None:
        """Compile, and leave everything as it was."""
        state = (self.flat, self.mean, self.square)
        before = [part.clone() for part in state]
        # Copies, since a graph would be specialised to two inputs being the same tensor. Nothing is
        # averaged, since another rank may be unable to compile.
        self.call(tree_map(torch.clone, minibatch), 0.0, lambda gradient: gradient)
        self.num_updates = 0
        for part, value in zip(state, before, strict=True):
            part.copy_(value)

    def loss(self, flat: Tensor, minibatch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a minibatch, and its parts, as a function of the weights."""
        parts = zip(self.names, flat.split(self.sizes), self.shapes, strict=True)
        weights = {name: part.view(shape) for name, part, shape in parts}
        output = torch.func.functional_call(
            self.agent, (weights, self.buffers), (minibatch.obs, minibatch.action)
        )
        return_std = self.buffers["return_std"]
        return ppo_loss(output, minibatch, return_std=return_std, **loss_settings(self.args))

    def pure_gradient(self, minibatch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradient of the loss, and its parts."""
        gradient, (_, parts) = torch.func.grad_and_value(self.loss, has_aux=True)(
            self.flat, minibatch
        )
        return gradient, parts

    def pure_descent(self, gradient: Tensor) -> Tensor:
        """Clipping and Adam; returns the norm of the gradient."""
        norm = gradient.norm()
        gradient = gradient * (self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        self.mean.lerp_(gradient, 1.0 - BETAS[0])
        self.square.lerp_(gradient.square(), 1.0 - BETAS[1])
        self.flat.sub_(self.step_size * self.mean / (self.square.sqrt() * self.root_scale + EPS))
        return norm

    def pure_step(self, minibatch: Batch) -> dict[str, Tensor]:
        """Both."""
        gradient, parts = self.pure_gradient(minibatch)
        return parts | {"grad_norm": self.pure_descent(gradient)}

    def state_dict(self) -> dict[str, Any]:
        """As of `PlainStep`."""
        return {"num_updates": self.num_updates, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As of `PlainStep`."""
        self.num_updates = state["num_updates"]
        self.mean.copy_(state["mean"])
        self.square.copy_(state["square"])


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """A function of tensors of fixed shapes as one compiled graph."""
    graph = torch.compile(
        function,
        fullgraph=True,
        dynamic=False,
        # Shapes and settings never change here, and asking whether they did takes as long as a
        # tenth of an update. Each graph is its own, so that no other function's can be taken.
        isolate_recompiles=True,
        options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
    )
    return Replayed(graph) if device.type == "cuda" else graph


def compile_training(
    agent: Agent, args: Args, world: World = ALONE
) -> tuple[CompiledStep, Callable[..., Any]]:
    """The compiled forms of `PlainStep` and `act`, run once so that what follows is fast.

    Raises:
        CompileError: something that compiling needs is missing; says what.
    """
    device, rows = agent.obs_mean.device, args.minibatch_size // world.size
    num_envs = args.num_envs // world.size
    step = CompiledStep(agent, args, world)
    fast_act = compiled(functools.partial(act, agent), device)
    generator = torch.Generator(device).manual_seed(0)
    obs = agent.obs_mean.expand(max(rows, num_envs), -1).contiguous()
    noise = draw_noise(len(obs), formulation_dim=agent.formulation_dim, generator=generator)
    try:
        with torch.no_grad():
            fast_act(obs[:num_envs], noise.rows(slice(num_envs)))
            action, logprob, value, _ = act(agent, obs[:rows], noise.rows(slice(rows)))
        step.warm_up(Batch(obs[:rows], action, logprob, value, value, value))
    except Exception as error:  # whatever the compiler raises, and in however many lines
        raise CompileError(reason(error)) from error
    return step, lambda _, obs, noise: fast_act(obs, noise)


class Replayed:
    """A function on CUDA whose kernels are launched together, as a CUDA graph.

    The first calls run as they are and compile; the third is recorded, on inputs of its own that
    every later call is copied into. A recorded function must do all its work on the device.
    """

    def __init__(self, function: Callable[..., Any], calls_before_recording: int = 2) -> None:
        self.function, self.calls_left = function, calls_before_recording
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Any) -> Any:
        """What the function returns, in tensors that no later call writes to."""
        if self.calls_left:
            self.calls_left -= 1
            return self.function(*inputs)
        if self.graph is None:
            self.inputs = tree_map(torch.clone, inputs)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = self.function(*self.inputs)
        tree_map(lambda kept, given: kept.copy_(given), self.inputs, inputs)
        self.graph.replay()
        return tree_map(torch.clone, self.outputs)


def best_scores(envs: gym.vector.VectorEnv, args: Args, cache_dir: Path) -> Tensor | None:
    """(P,) largest reward that one design can earn for each patient; None with `--no-oracle`.

    Raises:
        UsageError: the search cannot be carried out.
    """
    if not args.oracle:
        return None
    problem = envs.unwrapped.problem
    try:
        best = best_designs(
            problem.cohort,
            problem.reward_model,
            problem.params.reward_config,
            device=problem.device,
            cache_dir=cache_dir,
            progress=True,
        )
    except ValueError as error:
        raise UsageError(f"the oracle cannot search: {error}") from error
    return best.score.to(problem.device)


@torch.no_grad()
def evaluate(
    agent: Agent,
    envs: gym.vector.VectorEnv,
    args: Args,
    *,
    best_score: Tensor | None = None,
    generator: torch.Generator | None = None,
    num_episodes: int = 1,
) -> dict[str, Any]:
    """Figures of a policy over whole episodes of every environment, one patient each.

    Args:
        agent: the policy.
        envs: one environment per patient.
        args: for the horizon.
        best_score: (P,) largest reward for each patient.
        generator: source of samples; None judges the deterministic policy.
        num_episodes: per environment.

    Returns:
        `mean_reward`, `max_reward` and `optimal_rate` over all steps, `limit_breach_rate` (the
        share of designs that break a safety limit), `entropy`, `polymer_share` (a list); and,
        unless `best_score` is None, `regret` and `regret_p95` (mean and 95th percentile over the
        patients of how far the mean reward of a step falls short of the best) and
        `fraction_of_oracle` (mean reward over mean best), else None for each.
    """
    obs, _ = envs.reset()
    rewards, optimal, breached, entropies, polymers = [], [], [], [], []
    for _ in range(num_episodes * args.horizon):
        noise = generator and draw_noise(
            len(obs), formulation_dim=agent.formulation_dim, generator=generator
        )
        output = agent(obs, noise=noise)
        obs, reward, _, _, info = envs.step(agent.to_env(output.action))
        penalty = sum(at_step(info, f"reward_{name}") for name in SAFETY_LIMITS)
        rewards.append(reward)
        optimal.append(at_step(info, "is_optimal"))
        breached.append(penalty < 0)
        entropies.append(output.entropy)
        polymers.append(output.action.polymer_id)
    reward = torch.stack(rewards)
    num_polymers = agent.polymer_head.out.out_features
    share = torch.bincount(torch.stack(polymers).flatten(), minlength=num_polymers) / reward.numel()
    yardstick = dict.fromkeys(YARDSTICK)
    if best_score is not None:
        regret = best_score - reward.mean(0)
        fraction = reward.mean() / best_score.mean()
        figures = (regret.mean(), regret.quantile(0.95), fraction)
        yardstick = {k: figure.item() for k, figure in zip(YARDSTICK, figures, strict=True)}
    return {
        "mean_reward": reward.mean().item(),
        "max_reward": reward.max().item(),
        "optimal_rate": torch.stack(optimal).float().mean().item(),
        "limit_breach_rate": torch.stack(breached).float().mean().item(),
        **yardstick,
        "entropy": torch.stack(entropies).mean().item(),
        "polymer_share": share.tolist(),
    }


@torch.no_grad()
def policy_designs(agent: Agent, envs: gym.vector.VectorEnv) -> dict[str, Tensor]:
    """What the deterministic policy designs first for every patient, and what is predicted of it.

    Args:
        agent: the policy.
        envs: one environment per patient.

    Returns:
        Tensors of P patients: `polymer_id` and `coverage` (P,) int64, `formulation` (P, 4) in the
        units of `hydrogel_gym.spaces.FORMULATION_FIELDS`, and (P,) each, `reward`, every predicted
        outcome and every term of the reward, by their names in `info`.
    """
    obs, _ = envs.reset()
    design = agent.to_env(agent(obs).action)
    _, reward, _, _, info = envs.step(design)
    told = (*hydrogel_gym.Outcomes._fields, *RewardTerms._fields)
    return {**design, "reward": reward, **{name: at_step(info, name) for name in told}}


class Judged(NamedTuple):
    """Patients on whom a policy is judged, and the best that can be done for them."""

    envs: gym.vector.VectorEnv  # one per patient
    best_score: Tensor | None  # (P,)


def final_figures(
    agent: Agent, cohorts: dict[str, Judged], args: Args, generator: torch.Generator
) -> dict[str, Any]:
    """The figures of `summary.json` that describe a policy; sampled ones over ten episodes each.

    Args:
        agent: the policy.
        cohorts: by name; sampled figures are of `"train"`.
        args: for the horizon.
        generator: source of the samples.
    """
    train_envs, best_score = cohorts["train"]
    sampled = evaluate(
        agent,
        train_envs,
        args,
        best_score=best_score,
        generator=generator,
        num_episodes=10,
    )
    names = hydrogel_gym.load_polymers().names
    figures = {
        name: sampled[name]
        for name in ("mean_reward", "max_reward", "optimal_rate", "entropy", "limit_breach_rate")
    }
    figures |= {name: sampled[name] for name in YARDSTICK}
    figures["polymer_share"] = dict(zip(names, sampled["polymer_share"], strict=True))
    for name, (envs, best_score) in cohorts.items():
        result = evaluate(agent, envs, args, best_score=best_score)
        figures[f"{name}_deterministic_reward"] = result["mean_reward"]
        figures[f"{name}_deterministic_optimal_rate"] = result["optimal_rate"]
        figures[f"{name}_deterministic_limit_breach_rate"] = result["limit_breach_rate"]
        figures |= {f"{name}_{key}": result[key] for key in YARDSTICK}
    return figures


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write plain data as JSON."""
    write_atomically(path, (json.dumps(content, indent=2, default=str) + "\n").encode())


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV; None becomes an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def save_policy(path: Path, agent: Agent, architecture: dict[str, Any], args: Args) -> None:
    """Write the policy: weights and plain types only, all that `load_policy` needs."""
    buffer = io.BytesIO()
    torch.save(
        {
            "format": "hydrogel_gym.stage2_policy.v2",
            "architecture": architecture,
            "policy_state_dict": {k: v.detach().cpu() for k, v in agent.state_dict().items()},
            "training_config": plain_config(args),
            "polymers": list(hydrogel_gym.load_polymers().names),
            "versions": versions(),
        },
        buffer,
    )
    write_atomically(path, buffer.getvalue())


def load_policy(path: Path, device: str | torch.device) -> tuple[Agent, dict[str, Any]]:
    """Rebuild a saved policy; returns it and the whole content of the file.

    Raises:
        UsageError: the file is missing or is not a policy of this project.
    """
    if not path.is_file():
        raise UsageError(f"policy {path}: no such file")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is cut off, or is no policy")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["format"] != "hydrogel_gym.stage2_policy.v2":
            raise ValueError(f"format {saved['format']!r}")
        if saved["polymers"] != list(hydrogel_gym.load_polymers().names):
            raise ValueError("it was trained on another polymer table")
        agent = Agent(**saved["architecture"])
        agent.load_state_dict(saved["policy_state_dict"])
    except Exception as error:
        raise UsageError(f"policy {path} cannot be used: {reason(error)}") from error
    return agent.to(device), saved


def plain_config(args: Args) -> dict[str, Any]:
    """Arguments as plain types."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(args).items()
    }


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("hydrogel_gym", "torch", "gymnasium", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


class CheckpointError(ValueError):
    """A file that is not a whole checkpoint of this project; the message says why."""


MARK = b"sha256:"  # then the hash in hexadecimal: the comment that a ZIP archive may end with


def checkpoint_name(iteration: int) -> str:
    """File name of a checkpoint; names sort as iterations do."""
    return f"checkpoint-{iteration:06d}.pt"


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run directory, oldest first."""
    return sorted((output_dir / CHECKPOINTS).glob("checkpoint-*.pt"))


def seal(content: dict[str, Any]) -> bytes:
    """A checkpoint as a file that `torch.load` reads, with its own hash at the end."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    archive, length = buffer.getvalue(), len(MARK) + hashlib.sha256().digest_size * 2
    # A ZIP archive ends with the length of its comment, and the comment.
    archive = archive[:-2] + length.to_bytes(2, "little")
    return archive + MARK + hashlib.sha256(archive).hexdigest().encode()


def unseal(sealed: bytes) -> dict[str, Any]:
    """The content of a checkpoint, of plain types and tensors on the CPU; runs no code.

    Raises:
        CheckpointError: the file is damaged, or is something else.
    """
    archive, mark, digest = sealed.rpartition(MARK)
    if not mark:
        raise CheckpointError("it is cut off, or is no checkpoint")
    if hashlib.sha256(archive).hexdigest().encode() != digest:
        raise CheckpointError("it is damaged: its content does not have the hash at its end")
    try:
        content = torch.load(io.BytesIO(archive + mark + digest), weights_only=True)
        found = content["format"]
    except Exception as error:
        raise CheckpointError(reason(error)) from error
    if found != CHECKPOINT_FORMAT:
        raise CheckpointError(f"its format is {found!r}, not {CHECKPOINT_FORMAT!r}")
    return content


def read_checkpoint(path: Path) -> bytes:
    """A checkpoint as it lies on the disk, once it is known to be whole.

    Raises:
        CheckpointError: it cannot be read, or cannot be used.
    """
    try:
        sealed = path.read_bytes()
    except OSError as error:
        raise CheckpointError(error.strerror) from error
    unseal(sealed)
    return sealed


def newest_checkpoint(output_dir: Path) -> bytes | None:
    """The newest checkpoint of a run directory that is whole; None where there is none at all.

    Raises:
        UsageError: there are checkpoints, and none is whole.
    """
    refused: list[str] = []
    paths = checkpoints(output_dir)
    for path in reversed(paths):
        try:
            sealed = read_checkpoint(path)
        except CheckpointError as error:
            refused.append(f"checkpoint {path} cannot be used: {error}")
            continue
        for why in refused:
            print(f"warning: {why}; going back to {path}", file=sys.stderr)
        return sealed
    if refused:
        raise UsageError(f"{'; '.join(refused)}; pass --overwrite, without --resume, to begin anew")
    return None


def checkpoint_at(path: Path) -> bytes:
    """The checkpoint that a file is, or the newest of a run directory.

    Raises:
        UsageError: it cannot be used.
    """
    if path.is_dir():
        if (sealed := newest_checkpoint(path)) is None:
            raise UsageError(f"--resume {path}: it has no {CHECKPOINTS}/checkpoint-*.pt")
        return sealed
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        raise UsageError(f"--resume {path} cannot be used: {error}") from error


def checkpoint_to_resume(args: Args, output_dir: Path) -> bytes | None:
    """The checkpoint that `--resume` means; None begins at the start.

    Raises:
        UsageError: there is none that can be used.
    """
    if args.resume is None:
        return None
    if args.resume == "auto":
        return None if args.overwrite else newest_checkpoint(output_dir)
    path = Path(args.resume)
    newer = [] if path.is_dir() else [p for p in checkpoints(output_dir) if p.name > path.name]
    if newer and holds(output_dir, path) and not args.overwrite:
        raise UsageError(
            f"--resume {path}: {output_dir} holds newer ones, up to {newer[-1].name}; pass "
            "--overwrite to give them up, or another --output-dir"
        )
    return checkpoint_at(path)


# A run may go on with other values of these. Cohorts are compared by what they hold.
MAY_CHANGE = (
    "output_dir overwrite evaluate resume checkpoint_interval keep_checkpoints device compile "
    "cohort holdout_cohort reward_model track wandb_project wandb_entity tensorboard"
).split()


def digest(cohort: Any) -> str:
    """Short hash of who is in a cohort."""
    ids = json.dumps(cohort.patient_ids).encode()
    return hashlib.sha256(ids + cohort.features.numpy().tobytes()).hexdigest()[:16]


def content_of(reward_model: str) -> str:
    """Short hash of the file of a reward model, or its name where it is no file."""
    path = Path(reward_model)
    if not path.is_file():
        return reward_model
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def identity(args: Args, cohorts: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What has to be the same for a run to go on as if it had never stopped."""
    return {
        **{name: value for name, value in plain_config(args).items() if name not in MAY_CHANGE},
        **{f"patients of the {name} cohort": digest(cohort) for name, cohort in cohorts.items()},
        "reward model": content_of(args.reward_model),
        "device type": device.type,
        "hydrogel_gym": versions()["hydrogel_gym"],
    }


def surroundings(world: World, compiled: bool) -> dict[str, Any]:
    """What may differ from the checkpoint's, at the cost of other rounding."""
    told = versions()
    del told["hydrogel_gym"]  # is part of the identity
    threads = torch.get_num_threads()
    return told | {"threads": threads, "ranks": world.size, "compiled": compiled}


def differences(saved: dict[str, Any], here: dict[str, Any]) -> str:
    """Fields that differ, as "name: value in the checkpoint, now value"."""
    names = [name for name in {**saved, **here} if saved.get(name) != here.get(name)]
    return "; ".join(
        f"{name}: {saved.get(name)} in the checkpoint, now {here.get(name)}" for name in names
    )


def run_state(learner: Learner, obs: Tensor, generator: torch.Generator, world: World) -> dict:
    """What the next iteration depends on, of all ranks; `load_run_state` takes it back.

    There is no state of a scheduler: the learning rate is a function of the iteration.
    """
    device = obs.device
    environments = learner.envs.unwrapped.state_dict()
    random = {"sampling": generator.get_state(), "cpu": torch.get_rng_state()}
    if device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)
    return {
        "architecture": learner.architecture,
        "policy_state_dict": {k: v.detach().cpu() for k, v in learner.agent.state_dict().items()},
        "optimizer_state_dict": tree_map_only(Tensor, Tensor.cpu, learner.step.state_dict()),
        "obs": world.gather(obs).cpu(),
        "environments": {name: world.gather(x).cpu() for name, x in environments.items()},
        "random": {n: world.gather(x.to(device).unsqueeze(0)).cpu() for n, x in random.items()},
    }


def load_run_state(
    saved: dict[str, Any], learner: Learner, generator: torch.Generator, world: World
) -> Tensor:
    """Take up a run at `run_state`, on any number of ranks; returns what was observed last."""
    device, share = learner.agent.obs_mean.device, world.share(len(saved["obs"]))
    learner.agent.load_state_dict(saved["policy_state_dict"])
    learner.step.load_state_dict(saved["optimizer_state_dict"])
    learner.envs.unwrapped.load_state_dict(
        {name: rows[share] for name, rows in saved["environments"].items()}
    )
    # Ranks sample from one stream. What else draws from a rank's own generators (a user's outcome
    # model may) goes on only where there are as many ranks.
    random = saved["random"]
    generator.set_state(random["sampling"][0].clone())  # torch misreads a row of a tensor
    if len(random["cpu"]) == world.size:
        torch.set_rng_state(random["cpu"][world.rank].clone())
        if device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"][world.rank].clone(), device)
    return saved["obs"][share].to(device)


def draw_learning_curve(path: Path, rows: list[dict[str, Any]]) -> None:
    """Reward against samples, beside the source's curve."""
    # Imported here: two seconds that neither --help nor --evaluate should pay.
    from matplotlib.figure import Figure

    table = {name: [row[name] for row in rows] for name in rows[0]}
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(table["global_step"], table["mean_reward"], color="0.6", label="sampled, training")
    axes.plot(
        table["global_step"],
        table["train_deterministic_reward"],
        color="#0072B2",
        label="deterministic, training cohort",
    )
    axes.plot(
        table["global_step"],
        table["holdout_deterministic_reward"],
        color="#D55E00",
        ls="--",
        label="deterministic, held-out cohort",
    )
    source = {k * SOURCE_SAMPLES_PER_ITERATION: v for k, v in SOURCE_MEAN_REWARD.items() if k}
    axes.plot(
        list(source), list(source.values()), "k.:", label="source (another reward model)", lw=1
    )
    axes.set_xscale("log")
    axes.set(xlabel="samples (one design for one virtual patient)", ylabel="mean reward")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    save_figure(path, figure)


def draw_policy_selection(path: Path, polymer_share: dict[str, float]) -> None:
    """Share of each polymer in the learned policy, beside the source's table."""
    from matplotlib.figure import Figure

    names = sorted(polymer_share, key=polymer_share.get)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(names))
    axes.barh(
        rows + 0.2, [100 * polymer_share[n] for n in names], 0.4, color="#0072B2", label="this run"
    )
    axes.barh(
        rows - 0.2,
        [100 * SOURCE_POLYMER_SHARE.get(n, 0.0) for n in names],
        0.4,
        color="0.7",
        label="source (another reward model; 17 others 17.4 % in all)",
    )
    axes.set_yticks(rows, names, fontsize="small")
    axes.set_xlabel("share of sampled designs, %")
    axes.legend(loc="lower right", fontsize="small")
    save_figure(path, figure)


def save_figure(path: Path, figure: Any) -> None:
    """Write a figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomically(path, buffer.getvalue())


def metric_key(column: str) -> str:
    """What a column of `metrics.csv` is called in W&B and TensorBoard."""
    for namespace, columns in NAMESPACES.items():
        if column in columns:
            return f"{namespace}/{column}"
    return column  # global_step, the axis of all others


def metric_values(row: dict[str, Any]) -> dict[str, float]:
    """A row of `metrics.csv` by `metric_key`; without an oracle there is no regret."""
    return {metric_key(column): value for column, value in row.items() if value is not None}


class Outcome(NamedTuple):
    """What there is to tell when training ends."""

    summary: dict[str, Any]
    policy_file: Path
    cohort: Any  # the training patients
    designs: dict[str, Tensor]  # for them, as of `policy_designs`


class TensorBoardLog:
    """The rows of `metrics.csv` for TensorBoard, in `tensorboard/` of the run directory.

    Args:
        output_dir: the run directory.
        rows: of the run so far; what it logged after them before it was interrupted is struck out.
    """

    def __init__(self, output_dir: Path, rows: list[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        first = rows[-1]["global_step"] + 1 if rows else 0
        self.writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=first)

    def log(self, row: dict[str, Any]) -> None:
        """Add a row."""
        values = metric_values(row)
        step = values.pop("global_step")
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def conclude(self, outcome: Outcome) -> None:
        """Add nothing: the last row holds the last figures."""

    def close(self, failed: bool) -> None:
        """Write what is left."""
        self.writer.close()


class WandbLog:
    """A run of Weights & Biases, which goes on when the run of training does.

    Its steps are samples of all ranks, which never go backwards: W&B drops what does. Offline,
    every part of an interrupted run tells the whole run from its start, since the part that is
    uploaded last replaces those before it (wandb/wandb, issue 5865).

    Args:
        args: for project and entity.
        output_dir: the run directory; W&B's own files go to `wandb/` in it.
        config: what the run is.
        cohorts: patients by name, with their file unless they are the shipped ones.
        rows: of the run so far.
    """

    def __init__(
        self,
        args: Args,
        output_dir: Path,
        config: dict[str, Any],
        cohorts: dict[str, tuple[Any, Path | None]],
        rows: list[dict[str, Any]],
    ) -> None:
        import wandb

        self.wandb, env = wandb, os.environ
        # Silent, or a terminal is asked for an account, and all ranks wait for the answer.
        mode = wandb.setup(wandb.Settings(silent=True)).settings.mode
        mode = "offline" if mode == "dryrun" else mode
        path = output_dir / WANDB_FILE
        run_id = json.loads(path.read_text())["id"] if path.exists() else uuid.uuid4().hex[:8]
        in_sweep, job = "WANDB_SWEEP_ID" in env, env.get("TORCHELASTIC_RUN_ID", "")
        asked = dict(
            id=env.get("WANDB_RUN_ID", run_id),
            # A sweep has a project and an entity already.
            project=None
            if in_sweep
            else args.wandb_project or env.get("WANDB_PROJECT", "hydrogel_gym"),
            entity=None if in_sweep else args.wandb_entity,
            name=env.get("WANDB_NAME", output_dir.name),
            group=env.get("WANDB_RUN_GROUP", f"torchrun-{job}" if job else None),
            job_type=env.get("WANDB_JOB_TYPE", "train"),
            tags=[args.preset, args.policy, args.env_id, f"{config['ranks']} ranks"],
            dir=str(output_dir),
            settings=wandb.Settings(
                save_code=True,
                **{k: v for k, v in WANDB_SETTINGS.items() if f"WANDB_{k.upper()}" not in env},
            ),
        )
        why = "as asked"
        if mode not in ("offline", "disabled"):
            try:
                self.run = wandb.init(**asked, resume="allow")
            except Exception as error:  # no account, no network, no permission
                mode, why = "offline", reason(error)
        if mode in ("offline", "disabled"):
            self.run = wandb.init(**asked, mode=mode)
        told = {name: getattr(self.run, name) for name in ("id", "project", "entity", "url")}
        write_json(path, told)
        self.exit_code = 0
        self.sync = f"to upload: wandb sync {shlex.quote(str(Path(self.run.dir).parent))}"
        state = f"offline ({why}); {self.sync}" if mode == "offline" else self.run.url or mode
        say(f"W&B: {state}")

        self.run.config.update(config, allow_val_change=True)
        self.run.define_metric("global_step")
        for namespace in NAMESPACES:
            self.run.define_metric(f"{namespace}/*", step_metric="global_step")
        for best, names in BEST_IS.items():
            for name in names:
                self.run.define_metric(name, step_metric="global_step", summary=best)
        for name, (cohort, file) in cohorts.items():
            self._use(self._cohort_artifact(name, cohort, file))
        self.first_step = self.run.step  # of a run that goes on, the one after the last there
        for row in rows:
            self.log(row)

    def _cohort_artifact(self, name: str, cohort: Any, file: Path | None) -> Any:
        """The shipped patients as they are; of one's own only name and hash leave the machine."""
        metadata = {"patients": len(cohort), "digest": digest(cohort), "shipped": file is None}
        title = "cohort" if name == "train" else f"cohort_{name}"
        if file is not None:
            title = re.sub(r"[^\w.-]", "_", file.stem)
        artifact = self.wandb.Artifact(title, type="cohort", metadata=metadata)
        if file is None:
            artifact.add_file(str(files("hydrogel_gym.patients") / f"{title}.csv"))
        else:
            artifact.add_reference(file.absolute().as_uri())
        return artifact

    def _use(self, artifact: Any) -> None:
        if self.run.offline:
            # `use_artifact` refuses, although the file of a run can hold that one is used.
            self.run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
        else:
            self.run.use_artifact(artifact)

    def log(self, row: dict[str, Any]) -> None:
        """Add a row, unless an earlier part of the run has."""
        if row["global_step"] >= self.first_step:
            self.run.log(metric_values(row), step=row["global_step"])

    def conclude(self, outcome: Outcome) -> None:
        """Add final figures, pictures, the best designs and the policy."""
        wandb, figures = self.wandb, outcome.summary
        share = wandb.Table(["polymer", "share"], [*map(list, figures["polymer_share"].items())])
        told = {
            "eval/polymer_share": wandb.plot.bar(
                share, "polymer", "share", title="Share of each polymer in sampled designs"
            ),
            "eval/polymer_by_scar_size": wandb.Plotly(polymers_by_scar_size(outcome)),
            "eval/top_designs": wandb.Table(dataframe=top_designs(outcome)),
        }
        self.run.log(told, step=figures["samples"])
        plain = (bool, int, float, str)
        self.run.summary.update(
            {f"final/{name}": value for name, value in figures.items() if isinstance(value, plain)}
        )
        artifact = wandb.Artifact("stage2_policy", type="policy", metadata=figures)
        artifact.add_file(str(outcome.policy_file))
        self.run.log_artifact(artifact, aliases=["latest", f"run-{self.run.id}"])
        self.exit_code = 130 if figures["interrupted"] else 0

    def close(self, failed: bool) -> None:
        """End W&B's run too."""
        self.run.finish(exit_code=1 if failed else self.exit_code)
        if self.run.offline:
            say(f"W&B: {self.sync}")


def polymers_by_scar_size(outcome: Outcome) -> Any:
    """Heat map, for Plotly, of how often each polymer is chosen for small, medium, large scars."""
    from plotly import graph_objects

    column = [field.name for field in PATIENT_FIELDS].index("scar_fraction_pct")
    scar = outcome.cohort.features[:, column].contiguous()
    bounds = scar.quantile(torch.tensor([0.0, 1 / 3, 2 / 3, 1.0], dtype=scar.dtype))
    tertile = torch.bucketize(scar, bounds[1:3])
    names = hydrogel_gym.load_polymers().names
    polymer = outcome.designs["polymer_id"].cpu()
    counts = torch.bincount(tertile * len(names) + polymer, minlength=3 * len(names)).view(3, -1)
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    low, high = bounds[:-1].tolist(), bounds[1:].tolist()
    heat_map = graph_objects.Heatmap(
        z=shares.T.tolist(),
        x=[f"{a:.1f} to {b:.1f} %" for a, b in zip(low, high, strict=True)],
        y=names,
        colorscale="Viridis",
        colorbar={"title": "share"},
    )
    title = "Deterministic choice of polymer by scar, % of the left ventricle (tertiles)"
    return graph_objects.Figure(heat_map, layout={"title": title, "height": 700})


def top_designs(outcome: Outcome) -> Any:
    """Data frame of the training patients' best designs by predicted reward."""
    import pandas as pd

    designs = {name: values.cpu() for name, values in outcome.designs.items()}
    best = designs["reward"].argsort(descending=True)[:NUM_TOP_DESIGNS]
    names = hydrogel_gym.load_polymers().names
    columns = {
        "patient_id": [outcome.cohort.patient_ids[row] for row in best],
        "polymer": [names[i] for i in designs["polymer_id"][best]],
        **{f.name: designs["formulation"][best, i] for i, f in enumerate(FORMULATION_FIELDS)},
        "coverage": [COVERAGES[i] for i in designs["coverage"][best]],
        **{name: designs[name][best] for name in ("reward", *hydrogel_gym.Outcomes._fields)},
    }
    return pd.DataFrame(
        {name: x.tolist() if isinstance(x, Tensor) else x for name, x in columns.items()}
    )


class Logs:
    """The logs of a run beside `metrics.csv`, kept by a thread of their own.

    Once they have begun, training neither waits for a log nor ends with it: one that fails is left
    out from then on, with a warning.

    Args:
        makers: by name, what begins each.
    """

    def __init__(self, makers: dict[str, Callable[[], WandbLog | TensorBoardLog]]) -> None:
        self.makers = makers
        self.logs: dict[str, WandbLog | TensorBoardLog] = {}
        self.calls: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
        self.begun = threading.Event()
        # Daemon, so that a log that hangs keeps no process alive.
        self.thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Logs:
        if self.makers:
            self.thread.start()
            self.begun.wait(FIRST_WAIT_SECONDS)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.makers:
            self.calls.put(("close", kind is not None))
            self.calls.put(None)
            self.thread.join(LAST_WAIT_SECONDS)

    def log(self, row: dict[str, Any]) -> None:
        """Add a row of `metrics.csv` to each."""
        self.calls.put(("log", row))

    def conclude(self, outcome: Callable[[], Outcome]) -> None:
        """Tell each how the run ended."""
        if self.makers:
            self.calls.put(("conclude", outcome()))

    def _work(self) -> None:
        for name, make in self.makers.items():
            with self._survived(name):
                self.logs[name] = make()
        self.begun.set()
        while call := self.calls.get():
            method, argument = call
            for name, log in list(self.logs.items()):
                with self._survived(name):
                    getattr(log, method)(argument)

    @contextlib.contextmanager
    def _survived(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.logs.pop(name, None)
            say(f"warning: going on without {name}: {reason(error)}")


def say(line: str) -> None:
    """Print a line on standard error, above a progress bar if there is one."""
    tqdm.write(line, file=sys.stderr)


class Signals:
    """Turns signals into requests that training obeys when its iteration is done.

    SIGINT and SIGTERM ask to save and stop, SIGUSR1 (what batch queues send as a warning) to save
    and go on. A second SIGINT or SIGTERM does what it always did, unless a launcher watches over
    this process: that one sends every signal again, and kills after a time of its own.
    """

    def __init__(self, world: World) -> None:
        self.world, self.stop = world, False
        self._warnings = self._warnings_obeyed = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        # Only the main thread may install handlers; elsewhere the caller keeps control.
        if threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGINT: self._stop, signal.SIGTERM: self._stop}
            if hasattr(signal, "SIGUSR1"):  # not on Windows
                handlers[signal.SIGUSR1] = self._warn
            self._previous = {s: signal.signal(s, handler) for s, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requests(self, device: torch.device) -> Tensor:
        """(2,) int32 flags of any rank: stop, save."""
        # Counted, so that none is lost that comes between two of these lines.
        warnings = self._warnings
        save, self._warnings_obeyed = warnings > self._warnings_obeyed, warnings
        flags = torch.tensor([self.stop, save], dtype=torch.int32)
        return self.world.any(flags.to(device, non_blocking=True))

    def _stop(self, number: int, _: object) -> None:
        if not self.world.joined:
            signal.signal(number, self._previous[number])
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nstopping after this iteration; again to stop at once\n")
        self.stop = True

    def _warn(self, *_: object) -> None:
        self._warnings += 1


def check_ranges(args: Any, *ranges: tuple[str, str, Callable[[Any], bool]]) -> None:
    """Refuse a flag whose value is out of its range.

    Args:
        args: of a script.
        ranges: names of flags, what is allowed in words, and whether a value is.

    Raises:
        UsageError: names the flag, its value and what is allowed.
    """
    for names, allowed, holds in ranges:
        for name in names.split():
            if not holds(value := getattr(args, name)):
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} is {value}; allowed: {allowed}")


def check_args(args: Args, world: World) -> None:
    """Refuse, before anything is done, what cannot be carried out.

    Raises:
        UsageError: names the flag, its value and what is allowed.
    """
    if args.pessimism is not None:
        check_ranges(args, ("pessimism", "0 or more", lambda x: 0.0 <= x < math.inf))
    for flag, asked, package in (
        ("--track", args.track, "wandb"),
        ("--tensorboard", args.tensorboard, "tensorboard"),
    ):
        if asked and importlib.util.find_spec(package) is None:
            raise UsageError(f'{flag} needs {package}: pip install -e ".[track]"')
    if args.policy not in get_args(Policy):
        raise UsageError(f"--policy is {args.policy!r}; allowed: {', '.join(get_args(Policy))}")
    sizes = "horizon num_envs num_steps num_iterations num_epochs minibatch_size hidden_dim"
    check_ranges(
        args,
        (f"{sizes} keep_checkpoints", "1 or more", lambda x: x >= 1),
        ("seed checkpoint_interval", "0 or more", lambda x: x >= 0),
        ("gamma gae_lambda", "0 to 1", lambda x: 0.0 <= x <= 1.0),
        ("vf_coef ent_coef limit_margin penalty_scale", "0 or more", lambda x: 0.0 <= x < math.inf),
        ("learning_rate clip_coef max_grad_norm", "above 0", lambda x: 0.0 < x < math.inf),
    )
    if args.num_envs % world.size:
        below = args.num_envs // world.size * world.size
        near = [count for count in (below, below + world.size) if count]
        ranks = [n for n in range(2, args.num_envs + 1) if args.num_envs % n == 0][:8]
        raise UsageError(
            f"--num-envs is {args.num_envs}, which {world.size} ranks cannot share equally; near "
            f"it they can share {' or '.join(map(str, near))}; {args.num_envs} can be shared by "
            f"{', '.join(map(str, ranks))} ..."
        )
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.minibatch_size or args.minibatch_size % world.size:
        near = [n for n in range(world.size, batch_size + 1, world.size) if batch_size % n == 0]
        near = sorted(sorted(near, key=lambda n: abs(n - args.minibatch_size))[:4])
        shared = f", or which {world.size} ranks cannot share equally" if world.size > 1 else ""
        raise UsageError(
            f"--minibatch-size is {args.minibatch_size}, which does not divide the batch of "
            f"num_envs x num_steps = {batch_size}{shared}; near it these do: "
            f"{', '.join(map(str, near))}"
        )


def choose_output_dir(args: Args) -> Path:
    """The run directory, before anything is done to it.

    Raises:
        UsageError: it holds a run that may not be replaced.
    """
    output_dir = args.output_dir or default_output_dir(args)
    held = [name for name in (*RUN_FILES, CHECKPOINTS) if (output_dir / name).exists()]
    if not held or args.overwrite:
        return output_dir
    if args.resume == "auto" and (
        # What a run that was killed before its first checkpoint leaves may be replaced.
        checkpoints(output_dir) or not (output_dir / SUMMARY_FILE).exists()
    ):
        return output_dir
    if args.resume not in (None, "auto") and holds(output_dir, Path(args.resume)):
        return output_dir
    go_on = "continue it with --resume auto, " if checkpoints(output_dir) else ""
    raise UsageError(
        f"--output-dir {output_dir} already holds a run ({held[0]}); "
        f"{go_on}choose another directory or pass --overwrite"
    )


def default_output_dir(args: Args) -> Path:
    """Named by preset and seed; in a W&B sweep, which varies more than those, by sweep and run."""
    sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    if sweep and run:
        return Path("runs") / f"sweep-{sweep}" / run
    return Path("runs") / f"{args.preset}-s{args.seed}"


def holds(output_dir: Path, checkpoint: Path) -> bool:
    """Whether a checkpoint, or a run directory, is that of a run directory."""
    return output_dir.resolve() in (checkpoint.resolve(), checkpoint.resolve().parent.parent)


def prepare_output_dir(output_dir: Path, args: Args, resumed_at: int | None) -> None:
    """Make the run directory; empty it of what is replaced, and of files that were never finished.

    Args:
        output_dir: where.
        args: for `resume` and `overwrite`.
        resumed_at: iteration of the checkpoint to go on from, if any.

    Raises:
        UsageError: it cannot be written to.
    """
    folder = output_dir / CHECKPOINTS
    goes_on = resumed_at is not None and (
        args.resume == "auto" or holds(output_dir, Path(args.resume))
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Named like a summary that was never finished, since a kill may leave it.
        with tempfile.NamedTemporaryFile(dir=output_dir, prefix=f".{SUMMARY_FILE}."):
            pass
        paths = [p for name in RUN_FILES for p in output_dir.glob(f".{name}.????????")]
        paths += folder.glob(".checkpoint-*.pt.????????")
        if not goes_on:
            paths += [output_dir / name for name in RUN_FILES] + checkpoints(output_dir)
        elif args.overwrite:
            paths += [p for p in checkpoints(output_dir) if p.name > checkpoint_name(resumed_at)]
        for path in paths:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"--output-dir {output_dir} cannot be written to: {error}") from error


def resolve_device(name: str, world: World = ALONE) -> torch.device:
    """The device asked for; of several GPUs that of this rank.

    Raises:
        UsageError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if world.local_size > 1 and name.startswith("cuda"):
        count = torch.cuda.device_count()
        if name != "cuda" or count < world.local_size:
            raise UsageError(
                f"--device {name} for {world.local_size} ranks on this machine, which has {count} "
                "GPUs; allowed: cpu, or cuda with a GPU for each rank"
            )
    if world is not ALONE and name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', world.rank)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used: {reason(error)}") from error
    return device


def world_from_environment() -> World:
    """The ranks that `torchrun` started; this process alone where it did not."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return ALONE
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    return World(*(int(os.environ.get(name, 1)) for name in names))


@contextlib.contextmanager
def joined(world: World, device: torch.device) -> Iterator[World]:
    """The ranks, able to talk to each other."""
    if world is ALONE:
        yield world
        return
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
    store = next(dist.rendezvous("env://", world.rank, world.size, timeout=RANKS_TIMEOUT))[0]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        store = fresh_part(store, world)
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=RANKS_TIMEOUT,
        device_id=device if on_cuda else None,
    )
    yield world._replace(joined=True)
    dist.destroy_process_group()  # not after an error, which other ranks may not know of


def fresh_part(store: dist.Store, world: World) -> dist.Store:
    """A part of a launcher's store that nobody has written to; the same one for all ranks.

    `torchrun` gives the ranks that it starts again the store of those before them, and torch then
    connects to addresses that dead ranks have left in it (pytorch/pytorch, issue 135712). Launchers
    on several machines do not agree on how often they have restarted, so rank 0 makes up a name and
    tells it to every rank under what that rank made up: neither can be older than the two of them.
    """
    name = uuid.uuid4().hex
    if world.rank:
        store.set(f"rank {world.rank} asks as", name)
        name = store.get(name).decode()  # waits for it
        store.set(f"rank {world.rank} knows {name}", "")
        return dist.PrefixStore(name, store)
    for rank in range(1, world.size):
        # Who asked may be a rank that was lost before, so until it is known that the answer came.
        while not store.check([f"rank {rank} knows {name}"]):
            if store.check([f"rank {rank} asks as"]):
                store.set(store.get(f"rank {rank} asks as").decode(), name)
            time.sleep(0.01)
    return dist.PrefixStore(name, store)


def reason(error: BaseException) -> str:
    """An error as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def check_precision(args: Args, device: torch.device) -> None:
    """Refuse bfloat16 where the hardware would only emulate it.

    Raises:
        UsageError: names the fallback.
    """
    if args.precision != "bf16" or device.type == "meta":
        return
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        supported = any(on for name, on in torch.cpu.get_capabilities().items() if "bf16" in name)
    if not supported:
        raise UsageError(
            f"--precision bf16: this {device.type} has no bfloat16 arithmetic (AVX512-BF16 or AMX "
            "on a CPU, compute capability 8.0 on CUDA); use --precision fp32"
        )


def check_memory(args: Args, device: torch.device, world: World) -> None:
    """Refuse a rollout that does not fit into memory.

    Linux hands out more memory than there is and ends the process that uses it.

    Raises:
        UsageError: says what fits.
    """
    available = available_bytes(device)
    if available is None:
        return
    samples, per_sample = args.num_envs * args.num_steps, BYTES_PER_SAMPLE
    if world.size > 1:
        per_sample = BYTES_PER_SAMPLE // world.size + BYTES_PER_GATHERED_SAMPLE
        available //= world.local_size if device.type == "cpu" else 1
    if samples * per_sample > available:
        raise UsageError(
            f"--num-envs {args.num_envs} x --num-steps {args.num_steps} needs about "
            f"{samples * per_sample / 1e9:,.1f} GB for a rollout and {device} has "
            f"{available / 1e9:,.1f} GB left; {available // per_sample:,} samples fit"
        )


@contextlib.contextmanager
def fast_float32(device: torch.device) -> Iterator[None]:
    """Matrix products in TF32 on CUDA, by oneDNN instead of MKL on CPUs.

    oneDNN is the faster of the two on AMD processors. It is what the setting below selects, but
    where it makes bfloat16 of the factors too (AMX), the default stays.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "medium")
    if device.type == "cpu":
        factor = torch.linspace(1.0, 2.0, 64 * 64).view(64, 64)
        exact = (factor.double() @ factor.double()).float()
        if not torch.allclose(factor @ factor, exact, rtol=1e-5):
            torch.set_float32_matmul_precision(before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def worth_compiling(args: Args) -> bool:
    """Whether a run is long enough for compiled graphs to save more than they cost.

    Both sides are measured by `benchmark/throughput.py` on two CPU cores, without anything cached,
    and scale alike with the speed of a machine: so the answer depends on the request alone, and a
    seed gives the same run every time.
    """
    samples = args.num_iterations * args.num_steps * args.num_envs
    updates = samples * args.num_epochs // args.minibatch_size
    return updates * SECONDS_SAVED_PER_UPDATE > COMPILE_SECONDS


def make_envs(
    args: Args,
    cohort: Any,
    device: torch.device,
    *,
    num_envs: int | None = None,
    compile: bool = False,
    true_reward: bool = False,
) -> gym.vector.VectorEnv:
    """Batched environments that return tensors.

    Args:
        args: the problem.
        cohort: the patients.
        device: where.
        num_envs: so many to train in; None makes one per patient, to judge.
        compile: their step.
        true_reward: reward by `--true-reward-model`.

    Raises:
        hydrogel_gym.RewardModelError: the reward model cannot be used.
    """
    given: dict[str, Any] = {}
    if true_reward:
        given["reward_model"] = hydrogel_gym.load_reward_model(args.true_reward_model, device)
    elif (args.reward_model, args.pessimism, args.reward_precision) != (BUILT_IN, None, "fp32"):
        given["reward_model"] = hydrogel_gym.load_reward_model(
            args.reward_model,
            device,
            pessimism=args.pessimism,
            compute_dtype=torch.bfloat16 if args.reward_precision == "bf16" else None,
        )
    return gym.make_vec(
        args.env_id,
        num_envs=num_envs or len(cohort),
        cohort=cohort,
        device=str(device),
        horizon=args.horizon,
        patient_assignment=args.patient_assignment if num_envs else "fixed",
        output="torch",
        autoreset_mode="SameStep",
        **({"compile": True} if compile else {}),
        **({"dtype": "float64"} if args.precision == "fp64" else {}),
        **given,
    )


@torch.no_grad()
def observation_statistics(envs: gym.vector.VectorEnv, args: Args) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (obs_dim,), of what one episode of random designs observes."""
    envs.action_space.seed(args.seed)
    obs, _ = envs.reset(seed=args.seed)
    seen = [obs]
    for _ in range(args.horizon - 1):
        seen.append(envs.step(envs.action_space.sample())[0])
    stacked = torch.cat(seen)
    std = stacked.std(0)
    # A field that never varies (the best score of a single-step episode) carries nothing.
    return stacked.mean(0), torch.where(std > 0, std, torch.ones_like(std))


def judged(
    args: Args, cohorts: dict[str, Any], device: torch.device, runs_dir: Path
) -> dict[str, Judged]:
    """Cohorts to judge a policy on, by name; those of the true reward model have `TRUE` before it.

    The oracle's results are kept in `runs_dir`/oracle. Where the truth is known, it is the oracle
    of the truth alone that counts: what a fitted model holds for the best is its own mistake.
    """
    result = {}
    for name, cohort in cohorts.items():
        envs = make_envs(args, cohort, device)
        best = best_scores(envs, args, runs_dir / "oracle") if not args.true_reward_model else None
        result[name] = Judged(envs, best)
    if args.true_reward_model:
        for name, cohort in cohorts.items():
            envs = make_envs(args, cohort, device, true_reward=True)
            result[TRUE + name] = Judged(envs, best_scores(envs, args, runs_dir / "oracle"))
    return result


@torch.no_grad()
def reward_model_seconds(envs: gym.vector.VectorEnv) -> float | None:
    """Time of the frozen model alone for one step of all environments, not compiled.

    Called once more for it, since within a compiled step or on a GPU it cannot be told apart. None
    for environments of another make.
    """
    problem = getattr(envs.unwrapped, "problem", None)
    if problem is None:
        return None
    heads, rows = envs.single_action_space, torch.arange(envs.num_envs, device=problem.device)
    patient = problem.params.patients[rows % problem.params.num_patients]
    middle = (heads["formulation"].low + heads["formulation"].high) / 2
    formulation = patient.new_tensor(middle).expand(envs.num_envs, -1)
    design = (rows % int(heads["polymer_id"].n), formulation, rows % int(heads["coverage"].n))
    if problem.device.type == "cuda":
        torch.cuda.synchronize(problem.device)
    began = time.perf_counter()
    problem.reward_model(patient, *design)
    if problem.device.type == "cuda":
        torch.cuda.synchronize(problem.device)
    return time.perf_counter() - began


def shown_regret(figures: dict[str, Any]) -> dict[str, str]:
    """What the progress bar tells of the yardstick: training / held-out cohort."""
    true = TRUE if f"{TRUE}holdout_regret" in figures else ""
    if figures[f"{true}holdout_regret"] is None:
        return {}
    pairs = {name: [figures[f"{true}{cohort}_{name}"] for cohort in COHORTS] for name in YARDSTICK}
    told = {"truly": f"{figures[f'{TRUE}holdout_deterministic_reward']:.2f}"} if true else {}
    return told | {
        "regret": " / ".join(f"{value:.2f}" for value in pairs["regret"]),
        "p95": " / ".join(f"{value:.2f}" for value in pairs["regret_p95"]),
        "of oracle": " / ".join(f"{100 * x:.1f} %" for x in pairs["fraction_of_oracle"]),
    }


class Learner(NamedTuple):
    """What learns: the policy in its environments, and how it acts and is updated."""

    envs: gym.vector.VectorEnv  # this rank's
    agent: Agent
    architecture: dict[str, Any]
    act: Callable[..., Any]
    step: PlainStep | CompiledStep


def make_learner(
    args: Args, cohort: Any, device: torch.device, *, compile: bool, world: World = ALONE
) -> Learner:
    """A learner with initial weights.

    Raises:
        CompileError: with `compile`, compiling is not possible here.
    """
    num_envs = args.num_envs // world.size
    envs = make_envs(args, cohort, device, num_envs=num_envs, compile=compile)
    torch.manual_seed(args.seed)  # initial weights
    space = envs.single_action_space
    architecture = {
        "obs_dim": envs.single_observation_space.shape[0],
        "num_polymers": int(space["polymer_id"].n),
        "num_coverages": int(space["coverage"].n),
        "formulation_low": space["formulation"].low.tolist(),
        "formulation_high": space["formulation"].high.tolist(),
        "policy": args.policy,
        "state_std": args.state_std,
        "hidden_dim": args.hidden_dim,
        "precision": args.precision,
    }
    agent = Agent(**architecture).to(device)
    # Of the environments of all ranks, not of this one's patients.
    every = envs if world.size == 1 else make_envs(args, cohort, device, num_envs=args.num_envs)
    agent.obs_mean[:], agent.obs_std[:] = observation_statistics(every, args)
    if not compile:
        return Learner(envs, agent, architecture, act, PlainStep(agent, args, world))
    step, fast_act = compile_training(agent, args, world)
    return Learner(envs, agent, architecture, fast_act, step)


def compiled_learner(
    args: Args, cohort: Any, device: torch.device, world: World = ALONE
) -> Learner | None:
    """A compiled learner where one is asked for; under `auto`, where the run gains by it.

    Raises:
        UsageError: it is asked for and not possible here.
    """
    if args.compile == "off" or (args.compile == "auto" and not worth_compiling(args)):
        return None
    if world.rank == 0:
        print("compiling rollout and update, once per shape and machine ...", file=sys.stderr)
    learner, cause = None, None
    try:
        learner = make_learner(args, cohort, device, compile=True, world=world)
    except CompileError as error:
        cause = error
    # All or none, for a rank that compiles calls others than one that does not.
    failed = world.any(torch.tensor([cause is not None], dtype=torch.int32, device=device))
    if not failed.item():
        return learner
    cause = cause or CompileError("another rank cannot compile")
    if args.compile == "on":
        raise UsageError(f"--compile on: {cause}; use --compile off") from cause
    if world.rank == 0:
        print(f"not compiled, going on without: {cause}", file=sys.stderr)
    return None


@torch.no_grad()
def first_reset(
    envs: gym.vector.VectorEnv, args: Args, num_patients: int, world: World = ALONE
) -> Tensor:
    """Begin this rank's environments, as what they are among all; returns what they observe."""
    share = world.share(args.num_envs)
    options = None
    if args.patient_assignment == "fixed" and world.size > 1:
        options = {"patient_id": torch.arange(share.start, share.stop) % num_patients}
    return envs.reset(seed=args.seed + share.start, options=options)[0]


def train(args: Args) -> dict[str, Any]:
    """Train a policy and write its run directory.

    Returns:
        The content of `summary.json`; on ranks other than 0 only whether it was interrupted.

    Raises:
        UsageError: the request cannot be carried out; raised before training.
        FloatingPointError: the loss stopped being a number; the run so far is on disk.
        OSError: the run could not be saved; says from where it can go on.
    """
    world = world_from_environment()
    check_args(args, world)
    if Path(args.reward_model).is_file():  # what reads the policy may be started elsewhere
        args = dataclasses.replace(args, reward_model=str(Path(args.reward_model).absolute()))
    device = resolve_device(args.device, world)
    check_precision(args, device)
    check_memory(args, device, world)
    keep_freed_memory()
    with joined(world, device) as world, fast_float32(device):
        return learn(args, device, world)


def learn(args: Args, device: torch.device, world: World) -> dict[str, Any]:
    """`train`, once the process is set up for it."""
    cohorts = {
        "train": hydrogel_gym.load_cohort(args.cohort),
        "holdout": hydrogel_gym.load_cohort(args.holdout_cohort or "holdout"),
    }
    is_main = world.rank == 0
    output_dir, sealed = None, None
    if is_main:
        output_dir = choose_output_dir(args)
        sealed = checkpoint_to_resume(args, output_dir)
    # By message, since another machine may not see rank 0's disk.
    sealed = world.broadcast(sealed, device)
    saved = unseal(sealed) if sealed else None
    run = identity(args, cohorts, device)
    refuse_differences(saved and saved["run"], run)

    start = time.perf_counter()
    learner = compiled_learner(args, cohorts["train"], device, world)
    is_compiled, compile_seconds = learner is not None, time.perf_counter() - start
    learner = learner or make_learner(args, cohorts["train"], device, compile=False, world=world)
    envs, agent = learner.envs, learner.agent
    # Equal by the seed, but for what another processor rounds in another way.
    world.copy_first(agent.state_dict().values())
    learner.step.average = averaging(agent, world)
    if saved:
        refuse_differences(saved["architecture"], learner.architecture)
    if args.checkpoint_interval and not hasattr(envs.unwrapped, "state_dict"):
        raise UsageError(
            f"--env-id {args.env_id}: its environments have no state_dict, so that a run cannot be "
            "continued; pass --checkpoint-interval 0"
        )
    if is_main:
        prepare_output_dir(output_dir, args, saved and saved["iteration"])
        here = surroundings(world, is_compiled)
        if saved and (differing := differences(saved["surroundings"], here)):
            print(f"warning: may go on with other rounding: {differing}", file=sys.stderr)
        write_json(output_dir / "config.json", plain_config(args))
        judged_on = judged(args, cohorts, device, output_dir.parent)
    generator = torch.Generator(device).manual_seed(args.seed)  # samples and minibatches
    rows: list[dict[str, Any]] = []
    began_at, seconds_before = time.time(), 0.0
    if saved is None:
        obs = first_reset(envs, args, len(cohorts["train"]), world)
    else:
        # The last thing before training: what was done above may have drawn random numbers too.
        obs = load_run_state(saved, learner, generator, world)
        rows, began_at = saved["metrics"], saved["training_began"]
        seconds_before = rows[-1]["wall_seconds"]

    def write_checkpoint() -> None:
        state = run_state(learner, obs, generator, world)
        if not is_main:
            return
        content = {
            "format": CHECKPOINT_FORMAT,
            "iteration": iteration,
            **state,
            "metrics": rows,
            "training_began": began_at,
            "args": plain_config(args),
            "run": run,
            "surroundings": here,
        }
        path = output_dir / CHECKPOINTS / checkpoint_name(iteration)
        write_atomically(path, seal(content))
        up_to_now = [old for old in checkpoints(output_dir) if old.name <= path.name]
        for old in up_to_now[: -args.keep_checkpoints]:
            old.unlink()

    makers: dict[str, Callable[[], Any]] = {}
    if is_main and args.track:
        config = plain_config(args) | versions() | here | {"device": str(device)}
        config |= {f"{name}_cohort_digest": digest(each) for name, each in cohorts.items()}
        paths = {"train": args.cohort, "holdout": args.holdout_cohort}
        patients = {name: (each, paths[name]) for name, each in cohorts.items()}
        makers["W&B"] = functools.partial(WandbLog, args, output_dir, config, patients, list(rows))
    if is_main and args.tensorboard:
        makers["TensorBoard"] = functools.partial(TensorBoardLog, output_dir, list(rows))

    samples_per_iteration = args.num_envs * args.num_steps
    resumed_at, stop = len(rows), False
    with (
        Logs(makers) as logs,
        Signals(world) as signals,
        tqdm(
            total=args.num_iterations,
            initial=len(rows),
            unit="it",
            desc="training",
            dynamic_ncols=True,
            disable=not is_main,
        ) as bar,
    ):
        start = time.perf_counter() - seconds_before
        for iteration in range(len(rows) + 1, args.num_iterations + 1):
            began = time.perf_counter()
            obs, batch, told = rollout(envs, agent, obs, args, generator, learner.act, world)
            rolled_out = time.perf_counter()
            if iteration == 1:
                agent.set_return_scale(batch.returns)
            learning_rate = learning_rate_at(iteration, args)
            losses = update(learner.step, batch, args, learning_rate, generator, world)
            asked = signals.requests(device)
            row = {
                "iteration": iteration,
                "global_step": iteration * samples_per_iteration,
                "mean_reward": told["reward"].mean(),
                "max_reward": told["reward"].max(),
                "optimal_rate": told["is_optimal"].float().mean(),
                **{f"mean_{name}": told[name].mean() for name in OUTCOMES_LOGGED},
                **{name: told[name].mean() for name in RewardTerms._fields},
                **{
                    f"{name}_breach_rate": (told[f"reward_{name}"] < 0).float().mean()
                    for name in SAFETY_LIMITS
                },
                **losses,
                "explained_variance": 1.0
                - (batch.returns - batch.value).var() / batch.returns.var().clamp_min(1e-12),
                "learning_rate": learning_rate,
            }
            # The first read on the host since the iteration began: what it asked for is now done.
            row = {name: float(value) for name, value in row.items()}
            stop, save = asked.tolist()
            updated = time.perf_counter()
            row |= {name: int(row[name]) for name in ("iteration", "global_step")}
            if is_main:
                for name, (patients, best_score) in judged_on.items():
                    result = evaluate(agent, patients, args, best_score=best_score)
                    row[f"{name}_deterministic_reward"] = result["mean_reward"]
                    row |= {f"{name}_{key}": result[key] for key in YARDSTICK}
            row["rollout_seconds"] = rolled_out - began
            if is_main:
                model_seconds = reward_model_seconds(envs)
                row["reward_model_seconds"] = model_seconds and args.num_steps * model_seconds
            row["update_seconds"] = updated - rolled_out
            row["wall_seconds"] = time.perf_counter() - start
            row["samples_per_second"] = row["global_step"] / row["wall_seconds"]
            rows.append(row)
            is_last = stop or iteration == args.num_iterations
            with explained_losses(output_dir, iteration):
                if is_main:
                    write_csv(output_dir / METRICS_FILE, rows)
                watched = ("mean_reward", "policy_loss", "value_loss")
                if not all(math.isfinite(row[name]) for name in watched):
                    raise FloatingPointError(
                        f"iteration {iteration}: {', '.join(watched)} are not all finite; "
                        f"see {METRICS_FILE}"
                    )
                if args.checkpoint_interval and (
                    save or is_last or iteration % args.checkpoint_interval == 0
                ):
                    write_checkpoint()
            logs.log(row)
            if is_main:
                bar.set_postfix(
                    {
                        "samples/s": f"{row['samples_per_second']:,.0f}",
                        "reward": f"{row['mean_reward']:.2f}",
                        "held-out": f"{row['holdout_deterministic_reward']:.2f}",
                        **shown_regret(row),
                    },
                    refresh=False,
                )
                bar.update()
            if stop:
                break
        interrupted = len(rows) < args.num_iterations
        if not is_main:
            # A launcher ends all ranks once one of them was interrupted, so they end together.
            world.wait()
            return {"interrupted": interrupted}
        wall_seconds = time.perf_counter() - start

        figures = final_figures(agent, judged_on, args, generator)
        samples = rows[-1]["global_step"]
        summary = {
            "interrupted": interrupted,
            "preset": args.preset,
            "policy": args.policy,
            **figures,
            "iterations": len(rows),
            "samples": samples,
            "training_began": began_at,
            "resumed_at_iteration": resumed_at or None,
            "wall_seconds": wall_seconds,
            "compiled": is_compiled,
            "compile_seconds": compile_seconds if is_compiled else 0.0,
            "samples_per_second": samples / wall_seconds,
            "seed": args.seed,
            "world_size": world.size,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        with explained_losses(output_dir, len(rows)):
            save_policy(output_dir / POLICY_FILE, agent, learner.architecture, args)
            draw_learning_curve(output_dir / "learning_curve.png", rows)
            draw_policy_selection(output_dir / "policy_selection.png", figures["polymer_share"])
            # Last: a summary says that the directory is complete.
            write_json(output_dir / SUMMARY_FILE, summary)
        logs.conclude(
            lambda: Outcome(
                summary,
                output_dir / POLICY_FILE,
                cohorts["train"],
                policy_designs(agent, judged_on["train"].envs),
            )
        )
        world.wait()
    return summary | {"output_dir": str(output_dir)}


def refuse_differences(saved: dict[str, Any] | None, here: dict[str, Any]) -> None:
    """Refuse to go on with another run than the checkpoint's, if there is one.

    Raises:
        UsageError: names what differs.
    """
    if saved and (differing := differences(saved, here)):
        raise UsageError(f"--resume: the checkpoint is of another run; {differing}")


@contextlib.contextmanager
def explained_losses(output_dir: Path | None, iteration: int) -> Iterator[None]:
    """Say of a failure to write what is lost by it, and what is not."""
    try:
        yield
    except OSError as error:
        left = checkpoints(output_dir)
        kept = (
            f"{left[-1]} is whole, go on from it" if left else "nothing was saved yet, begin again"
        )
        raise OSError(
            f"iteration {iteration} could not be saved: {reason(error)}; {kept} with --resume auto"
        ) from error


def evaluate_saved(args: Args) -> dict[str, Any]:
    """Judge a saved policy on the shipped cohorts, or on `--cohort` alone, and write the figures.

    Raises:
        UsageError: the policy cannot be read, or the figures cannot be written.
    """
    device = resolve_device(args.device)
    agent, saved = load_policy(args.evaluate, device)
    config = saved["training_config"]
    problem = {name: config[name] for name in ("horizon", "env_id")}
    if args.reward_model == BUILT_IN:  # the one it was trained on, unless another is asked for
        names = ("reward_model", "pessimism", "reward_precision")
        problem |= {name: config[name] for name in names if name in config}
        if args.pessimism is not None:
            problem["pessimism"] = args.pessimism
    args = dataclasses.replace(args, **problem)
    cohort = hydrogel_gym.load_cohort(args.cohort)
    name = "shipped" if args.cohort is None else args.cohort.stem
    path = (args.output_dir or args.evaluate.parent) / f"evaluation-{name}.json"
    cohorts = {"train": cohort}
    if args.cohort is None or args.holdout_cohort is not None:
        cohorts["holdout"] = hydrogel_gym.load_cohort(args.holdout_cohort or "holdout")
    judged_on = judged(args, cohorts, device, path.parent.parent)
    generator = torch.Generator(device).manual_seed(args.seed)
    with fast_float32(device):  # as in training, whose figures this repeats
        figures = final_figures(agent, judged_on, args, generator)
    result = {
        "policy_file": str(args.evaluate),
        "cohort": str(args.cohort or "shipped"),
        "num_patients": len(cohort),
        **figures,
        "seed": args.seed,
        "device": str(device),
        "versions": versions(),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error}") from error
    return result | {"output_dir": str(path.parent)}


def parse_args(argv: list[str] | None = None) -> Args:
    """Arguments of the command line, on top of the preset that it names.

    Raises:
        UsageError: a flag or a value is unknown.
    """
    argv = spelt_as_flags(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="source")
    first.add_argument("--resume")
    given = first.parse_known_args(argv)[0]
    if given.preset not in PRESETS:
        raise UsageError(f"--preset is {given.preset!r}; allowed: {', '.join(PRESETS)}")
    if given.resume in (None, "auto"):
        defaults = Args(preset=given.preset, **PRESETS[given.preset])
    else:
        defaults = args_of_checkpoint(Path(given.resume))
    return read_command_line(Args, args=argv, default=defaults, prog="ppo_hybrid.py")


def read_command_line(kind: type, **options: Any) -> Any:
    """`tyro.cli`, whose errors are one line.

    Raises:
        UsageError: a flag or a value is unknown.
    """
    boxed = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxed):
            return tyro.cli(kind, **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # tyro draws its message in a box of several lines.
        lines = (line.strip(" │╭╮╰╯─") for line in boxed.getvalue().splitlines()[1:])
        message = " ".join(itertools.takewhile(bool, lines))
        raise UsageError(message or "the arguments cannot be read; see --help") from None


def spelt_as_flags(argv: list[str]) -> list[str]:
    """Booleans as W&B's agents write them, `--flag=True` and `--flag=False`, as tyro does."""
    booleans = {field.name for field in dataclasses.fields(Args) if field.type == "bool"}

    def spelt(word: str) -> str:
        flag, _, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if name not in booleans or value.lower() not in ("true", "false"):
            return word
        return f"--{name}" if value.lower() == "true" else f"--no_{name}"

    return [spelt(word) for word in argv]


def args_of_checkpoint(path: Path) -> Args:
    """The arguments of the run that a checkpoint, or the newest of a run directory, belongs to.

    Raises:
        UsageError: it cannot be used.
    """
    output_dir = path if path.is_dir() else path.absolute().parent.parent
    values = unseal(checkpoint_at(path))["args"] | {"output_dir": output_dir, "overwrite": False}
    for name in ("cohort", "holdout_cohort"):
        values[name] = values[name] and Path(values[name])
    try:
        return Args(**values)
    except TypeError as error:
        raise UsageError(f"--resume {path} is of another version: {reason(error)}") from error


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    world = world_from_environment()
    # Only rank 0 prints, but for what may be wrong on one machine of several.
    who = f"rank {world.rank}: " if world.rank else ""
    try:
        args = parse_args(argv)
        if args.evaluate:
            if args.track or args.tensorboard:
                raise UsageError("--track and --tensorboard log training; drop them to --evaluate")
            if world.rank:
                return 0
            summary = evaluate_saved(args)
        else:
            summary = train(args)
    except (
        UsageError,
        hydrogel_gym.CohortError,
        hydrogel_gym.RewardModelError,
        gym.error.Error,
    ) as error:
        print(f"{who}error: {error}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError, RankLostError) as error:
        print(f"{who}error: {error}", file=sys.stderr)
        return 1
    except (MemoryError, torch.OutOfMemoryError) as error:
        hint = "take fewer --num-envs or --num-steps"
        print(f"{who}error: out of memory: {reason(error)}; {hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before training began, or a second Ctrl-C
        print(f"{who}interrupted", file=sys.stderr)
        return 130
    if world.rank:
        return 130 if summary["interrupted"] else 0
    shown = (
        "mean_reward",
        "optimal_rate",
        "train_deterministic_reward",
        "holdout_deterministic_reward",
        "holdout_regret",
        "holdout_fraction_of_oracle",
        "holdout_deterministic_limit_breach_rate",
        "true_holdout_deterministic_reward",
        "true_holdout_regret",
        "true_holdout_fraction_of_oracle",
        "true_holdout_deterministic_limit_breach_rate",
    )
    for name in shown:
        if summary.get(name) is not None:
            print(f"{name:>40}  {summary[name]:.3f}")
    print(f"{'written to':>40}  {summary['output_dir']}")
    if summary.get("interrupted"):
        print(
            "interrupted: what was trained so far is saved; --resume auto continues",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGUSR1"):  # while there is nothing to save, a warning must not end the run
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    exit_code = main()
    if world_from_environment() is not ALONE:
        # A thread of a process group, which outlives it, rarely aborts an interpreter that is being
        # taken down; a launcher would take that for a failure. All files are closed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
