"""PPO for HydrogelDesign-v0 in CleanRL's or, with `--compile`, in LeanRL's manner.

    python benchmark/speed/trainers/cleanrl_manner.py --num-iterations 30 --output run.jsonl

Plain PyTorch: a module per head, `torch.distributions`, Adam as it comes, minibatches gathered by a
shuffled index. `--compile` compiles the policy's step and the update, as LeanRL does, and uses CUDA
graphs on CUDA alone. The network is that of the source preset of `train/ppo_hybrid.py`, and so are
the coefficients; `protocol.py` says what `--output` receives.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import torch
from torch import Tensor, nn, optim
from torch.distributions import Categorical, Distribution, Normal
from torch.distributions.transforms import TanhTransform

sys.path.insert(0, str(Path(__file__).parents[2]))
from speed.trainers.protocol import Recorder, arguments

import hydrogel_gym  # noqa: F401  registers the environment
from hydrogel_gym.runs.command_line import run_script

ENV_ID = "HydrogelDesign-v0"
HEADS = ("polymer_id", "formulation", "coverage")
GAMMA, GAE_LAMBDA = 0.99, 0.95
CLIP_COEF, VF_COEF, ENT_COEF, MAX_GRAD_NORM = 0.2, 0.5, 0.01, 0.5


def layer_init(layer: nn.Linear, std: float = 2.0**0.5) -> nn.Linear:
    """Orthogonal weights, zero bias."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, 0.0)
    return layer


class Action(NamedTuple):
    """A design; the formulation as the Gaussian sample before tanh."""

    polymer_id: Tensor  # (B,)
    presquash: Tensor  # (B, 4)
    coverage: Tensor  # (B,)


class Agent(nn.Module):
    """Shared trunk and four heads; (B, 13) observations give the statistics that normalise them."""

    def __init__(self, envs: gym.vector.VectorEnv, obs: Tensor) -> None:
        super().__init__()
        space = envs.single_action_space
        box = space["formulation"]
        self.trunk = nn.Sequential(
            layer_init(nn.Linear(obs.shape[-1], 256)),
            nn.LayerNorm(256),
            nn.ReLU(),
            layer_init(nn.Linear(256, 256)),
            nn.LayerNorm(256),
            nn.ReLU(),
        )
        self.polymer = self._head(128, int(space["polymer_id"].n), 0.01)
        self.formulation_mean = self._head(128, box.shape[0], 0.01)
        self.formulation_logstd = nn.Parameter(torch.zeros(1, box.shape[0]))
        self.coverage = self._head(64, int(space["coverage"].n), 0.01)
        self.critic = self._head(128, 1, 1.0)
        std = obs.std(0)
        self.register_buffer("obs_mean", obs.mean(0))
        # Score and iteration never vary in episodes of one step.
        self.register_buffer("obs_std", torch.where(std > 0, std, torch.ones_like(std)))
        self.register_buffer("low", torch.from_numpy(box.low))
        self.register_buffer("high", torch.from_numpy(box.high))

    @staticmethod
    def _head(width: int, out: int, std: float) -> nn.Sequential:
        return nn.Sequential(
            layer_init(nn.Linear(256, width)), nn.ReLU(), layer_init(nn.Linear(width, out), std)
        )

    def features(self, obs: Tensor) -> Tensor:
        """(B, 256)."""
        return self.trunk((obs - self.obs_mean) / self.obs_std)

    def get_action_and_value(
        self, obs: Tensor, action: Action | None = None
    ) -> tuple[Action, Tensor, Tensor, Tensor]:
        """An action, sampled or given, its log-probability, entropy and the state's value, (B,).

        Entropy has no closed form after tanh; that of the Gaussian before it takes its place.
        """
        features = self.features(obs)
        polymer = Categorical(logits=self.polymer(features))
        mean = self.formulation_mean(features)
        formulation = Normal(mean, self.formulation_logstd.expand_as(mean).exp())
        coverage = Categorical(logits=self.coverage(features))
        if action is None:
            action = Action(polymer.sample(), formulation.sample(), coverage.sample())
        u = action.presquash
        jacobian = TanhTransform().log_abs_det_jacobian(u, u.tanh())
        logprob = (
            polymer.log_prob(action.polymer_id)
            + (formulation.log_prob(u) - jacobian).sum(-1)
            + coverage.log_prob(action.coverage)
        )
        entropy = polymer.entropy() + formulation.entropy().sum(-1) + coverage.entropy()
        return action, logprob, entropy, self.critic(features).squeeze(-1)

    def to_env(self, action: Action) -> dict[str, Tensor]:
        """The action in the environment's format."""
        share = (action.presquash.tanh() + 1.0) / 2.0
        formulation = torch.lerp(self.low, self.high, share)
        return dict(zip(HEADS, (action.polymer_id, formulation, action.coverage), strict=True))

    def deterministic(self, obs: Tensor) -> dict[str, Tensor]:
        """Likeliest categories and median formulation, for the environment."""
        heads = (self.polymer, self.formulation_mean, self.coverage)
        polymer, mean, coverage = (head(self.features(obs)) for head in heads)
        return self.to_env(Action(polymer.argmax(-1), mean, coverage.argmax(-1)))


class Batch(NamedTuple):
    """Storage of one rollout, (T, B, ...), or a flattened slice of it."""

    obs: Tensor
    polymer_id: Tensor
    presquash: Tensor
    coverage: Tensor
    logprobs: Tensor
    values: Tensor
    rewards: Tensor
    dones: Tensor  # after the step
    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def rollout(
    envs: gym.vector.VectorEnv, agent: Agent, policy: Callable[..., Any], obs: Tensor, steps: int
) -> tuple[Tensor, Batch]:
    """Take steps in every environment; returns the next observation and the storage."""
    rows = []
    for _ in range(steps):
        action, logprob, _, value = policy(obs)
        next_obs, reward, terminated, truncated, _ = envs.step(agent.to_env(action))
        done = (terminated | truncated).float()
        rows.append((obs, *action, logprob, value, reward.float(), done))
        obs = next_obs
    stacked = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    *_, values, rewards, dones = stacked
    advantages = gae(rewards, values, dones, agent.critic(agent.features(obs)).squeeze(-1))
    return obs, Batch(*stacked, advantages, advantages + values)


def gae(rewards: Tensor, values: Tensor, dones: Tensor, next_value: Tensor) -> Tensor:
    """(T, B) advantages; `dones` are those after each step."""
    advantages = torch.zeros_like(rewards)
    last = torch.zeros_like(next_value)
    for t in reversed(range(len(rewards))):
        nonterminal = 1.0 - dones[t]
        following = values[t + 1] if t + 1 < len(rewards) else next_value
        delta = rewards[t] + GAMMA * following * nonterminal - values[t]
        advantages[t] = last = delta + GAMMA * GAE_LAMBDA * nonterminal * last
    return advantages


def update(agent: Agent, optimizer: optim.Optimizer, mb: Batch) -> Tensor:
    """One gradient step on a minibatch; returns the share of clipped ratios."""
    action = Action(mb.polymer_id, mb.presquash, mb.coverage)
    _, newlogprob, entropy, newvalue = agent.get_action_and_value(mb.obs, action)
    ratio = (newlogprob - mb.logprobs).exp()
    advantages = (mb.advantages - mb.advantages.mean()) / (mb.advantages.std() + 1e-8)

    # Policy loss
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * torch.clamp(ratio, 1 - CLIP_COEF, 1 + CLIP_COEF)
    pg_loss = torch.max(pg_loss1, pg_loss2).mean()

    # Value loss
    v_loss = 0.5 * ((newvalue - mb.returns) ** 2).mean()

    entropy_loss = entropy.mean()
    loss = pg_loss - ENT_COEF * entropy_loss + VF_COEF * v_loss
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    return ((ratio.detach() - 1.0).abs() > CLIP_COEF).float().mean()


def train(args: argparse.Namespace) -> None:
    """Train, recording every iteration."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    envs = gym.make_vec(ENV_ID, num_envs=args.num_envs, output="torch", device=args.device)
    obs, _ = envs.reset(seed=args.seed)
    agent = Agent(envs, obs).to(device)
    # A compiled step takes the learning rate as a tensor, or it is compiled again at every change.
    learning_rate = torch.tensor(args.learning_rate) if args.compile else args.learning_rate
    optimizer = optim.Adam(agent.parameters(), lr=learning_rate, eps=1e-5)
    policy: Callable = agent.get_action_and_value
    step: Callable = update
    if args.compile:
        # Validation of the distributions' arguments reads values on the host, which breaks graphs.
        Distribution.set_default_validate_args(False)
        mode = "reduce-overhead" if device.type == "cuda" else None  # CUDA graphs
        policy, step = torch.compile(policy, mode=mode), torch.compile(update, mode=mode)
    recorder = Recorder(args, ENV_ID, agent.deterministic)
    batch_size = args.num_envs * args.num_steps

    for iteration in range(1, args.num_iterations + 1):
        start = time.perf_counter()
        lrnow = args.learning_rate * (1.0 - (iteration - 1.0) / args.num_iterations)
        for group in optimizer.param_groups:
            if args.compile:
                group["lr"].fill_(lrnow)
            else:
                group["lr"] = lrnow
        obs, storage = rollout(envs, agent, policy, obs, args.num_steps)
        rolled_out = time.perf_counter()
        flat = Batch(*(part.flatten(0, 1) for part in storage))
        clipfracs = []
        for _ in range(args.num_epochs):
            b_inds = torch.randperm(batch_size, device=device)
            for mb_inds in b_inds.split(args.minibatch_size):
                mb = Batch(*(part[mb_inds] for part in flat))
                clipfracs.append(step(agent, optimizer, mb).clone())
        clipfrac = torch.stack(clipfracs).mean().item()  # which waits for an accelerator
        times = rolled_out - start, time.perf_counter() - rolled_out
        recorder.record(iteration, iteration * batch_size, *times, clipfrac=clipfrac)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    device = dict(default="cpu", help="torch device")
    compiled = dict(action="store_true", help="LeanRL's manner")
    train(arguments(__doc__, argv, device=device, compile=compiled))


if __name__ == "__main__":
    sys.exit(run_script(main))
