"""PPO for HydrogelDesign-v0 in CleanRL's or, with `--compile`, in LeanRL's manner.

    python benchmark/trainers/cleanrl_manner.py --num-iterations 30 --output run.jsonl

Plain PyTorch: a module per head, `torch.distributions`, Adam as it comes, minibatches gathered by a
shuffled index. `--compile` compiles the policy's step and the update, as LeanRL does, and uses CUDA
graphs on CUDA alone. The network is that of the source preset of `train/ppo_hybrid.py`;
`protocol.py` says what `--output` receives.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import torch
from protocol import Recorder, check_sizes, run
from torch import Tensor, nn, optim
from torch.distributions import Categorical, Distribution, Normal
from torch.distributions.transforms import TanhTransform

import hydrogel_gym  # noqa: F401  registers the environment

ENV_ID = "HydrogelDesign-v0"


def layer_init(layer: nn.Linear, std: float = 2.0**0.5) -> nn.Linear:
    """Orthogonal weights, zero bias."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, 0.0)
    return layer


class Action(NamedTuple):
    """A design; the formulation as the Gaussian sample before tanh."""

    polymer_id: Tensor  # (B,) int64
    presquash: Tensor  # (B, 4)
    coverage: Tensor  # (B,) int64


class Agent(nn.Module):
    """Shared trunk and four heads; observations are normalised by fixed statistics.

    Args:
        envs: whose spaces give the sizes.
        obs: (B, 13) observations that give the statistics.
    """

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

    def get_value(self, obs: Tensor) -> Tensor:
        """(B,)."""
        return self.critic(self.features(obs)).squeeze(-1)

    def get_action_and_value(
        self, obs: Tensor, action: Action | None = None
    ) -> tuple[Action, Tensor, Tensor, Tensor]:
        """Sample an action, or evaluate a given one.

        Returns:
            The action, its log-probability, entropy and the state's value, (B,) each. Entropy has
            no closed form after tanh; that of the Gaussian before it takes its place.
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
        return {
            "polymer_id": action.polymer_id,
            "formulation": torch.lerp(self.low, self.high, share),
            "coverage": action.coverage,
        }

    def deterministic(self, obs: Tensor) -> dict[str, Tensor]:
        """Likeliest categories and median formulation, for the environment."""
        features = self.features(obs)
        return self.to_env(
            Action(
                self.polymer(features).argmax(-1),
                self.formulation_mean(features),
                self.coverage(features).argmax(-1),
            )
        )


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
    envs: gym.vector.VectorEnv,
    agent: Agent,
    policy: Callable[..., tuple[Action, Tensor, Tensor, Tensor]],
    obs: Tensor,
    args: argparse.Namespace,
) -> tuple[Tensor, Batch]:
    """Take `num_steps` steps in every environment; returns the next observation and the storage."""
    steps = []
    for _ in range(args.num_steps):
        action, logprob, _, value = policy(obs)
        next_obs, reward, terminated, truncated, _ = envs.step(agent.to_env(action))
        done = (terminated | truncated).float()
        steps.append((obs, *action, logprob, value, reward.float(), done))
        obs = next_obs
    stacked = [torch.stack(parts) for parts in zip(*steps, strict=True)]
    *_, values, rewards, dones = stacked
    advantages = gae(rewards, values, dones, agent.get_value(obs), args.gamma, args.gae_lambda)
    return obs, Batch(*stacked, advantages, advantages + values)


def gae(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor,
    next_value: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """(T, B) advantages; `dones` are those after each step."""
    advantages = torch.zeros_like(rewards)
    last = torch.zeros_like(next_value)
    for t in reversed(range(len(rewards))):
        nonterminal = 1.0 - dones[t]
        following = values[t + 1] if t + 1 < len(rewards) else next_value
        delta = rewards[t] + gamma * following * nonterminal - values[t]
        advantages[t] = last = delta + gamma * gae_lambda * nonterminal * last
    return advantages


def update(
    agent: Agent, optimizer: optim.Optimizer, mb: Batch, args: argparse.Namespace
) -> dict[str, Tensor]:
    """One gradient step on a minibatch; returns what CleanRL logs of it."""
    action = Action(mb.polymer_id, mb.presquash, mb.coverage)
    _, newlogprob, entropy, newvalue = agent.get_action_and_value(mb.obs, action)
    logratio = newlogprob - mb.logprobs
    ratio = logratio.exp()
    advantages = (mb.advantages - mb.advantages.mean()) / (mb.advantages.std() + 1e-8)

    # Policy loss
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = torch.max(pg_loss1, pg_loss2).mean()

    # Value loss
    v_loss = 0.5 * ((newvalue - mb.returns) ** 2).mean()

    entropy_loss = entropy.mean()
    loss = pg_loss - args.ent_coef * entropy_loss + args.vf_coef * v_loss
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    optimizer.step()
    with torch.no_grad():
        approx_kl = ((ratio - 1) - logratio).mean()
        clipfrac = ((ratio - 1.0).abs() > args.clip_coef).float().mean()
    return {
        "policy_loss": pg_loss.detach(),
        "value_loss": v_loss.detach(),
        "entropy": entropy_loss.detach(),
        "approx_kl": approx_kl,
        "clipfrac": clipfrac,
    }


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
    recorder = Recorder(args.output, args.evaluate_every, ENV_ID, agent.deterministic)
    batch_size = args.num_envs * args.num_steps

    for iteration in range(1, args.num_iterations + 1):
        start = time.perf_counter()
        if args.anneal_lr:
            lrnow = args.learning_rate * (1.0 - (iteration - 1.0) / args.num_iterations)
            for group in optimizer.param_groups:
                if args.compile:
                    group["lr"].fill_(lrnow)
                else:
                    group["lr"] = lrnow
        obs, storage = rollout(envs, agent, policy, obs, args)
        rolled_out = time.perf_counter()
        flat = Batch(*(part.flatten(0, 1) for part in storage))
        clipfracs = []
        for _ in range(args.num_epochs):
            b_inds = torch.randperm(batch_size, device=device)
            for mb_inds in b_inds.split(args.minibatch_size):
                mb = Batch(*(part[mb_inds] for part in flat))
                scalars = step(agent, optimizer, mb, args)
                clipfracs.append(scalars["clipfrac"].clone())
        # As in CleanRL, the losses are those of the last minibatch.
        losses = {name: value.item() for name, value in scalars.items()}
        losses["clipfrac"] = torch.stack(clipfracs).mean().item()
        recorder.record(
            iteration,
            iteration * batch_size,
            rolled_out - start,
            time.perf_counter() - rolled_out,
            mean_reward=storage.rewards.mean().item(),
            **losses,
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line; names and defaults of our trainer's source preset."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flag = parser.add_argument
    flag("--num-envs", type=int, default=2000, help="parallel environments")
    flag("--num-steps", type=int, default=100, help="steps per environment and iteration")
    flag("--num-iterations", type=int, default=200, help="rollouts, each followed by its updates")
    flag("--num-epochs", type=int, default=10, help="passes over each batch")
    flag("--minibatch-size", type=int, default=2000, help="samples per update")
    flag("--learning-rate", type=float, default=3e-4, help="initial, of Adam")
    flag("--anneal-lr", action=argparse.BooleanOptionalAction, default=True, help="linear decay")
    flag("--gamma", type=float, default=0.99, help="discount")
    flag("--gae-lambda", type=float, default=0.95, help="lambda of advantage estimation")
    flag("--clip-coef", type=float, default=0.2, help="clipping range of the ratio")
    flag("--vf-coef", type=float, default=0.5, help="weight of the value loss")
    flag("--ent-coef", type=float, default=0.01, help="weight of the entropy bonus")
    flag("--max-grad-norm", type=float, default=0.5, help="largest norm of the gradient")
    flag("--seed", type=int, default=1, help="of weights, samples and minibatches")
    flag("--device", default="cpu", help="torch device")
    flag("--compile", action="store_true", help="LeanRL's manner")
    flag("--evaluate-every", type=int, default=0, help="iterations between evaluations; 0 never")
    flag("--output", type=Path, help="file of JSON lines; default standard output")
    args = parser.parse_args(argv)
    check_sizes(args, "num_envs num_steps num_iterations num_epochs minibatch_size".split())
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(train, parse_args, argv)


if __name__ == "__main__":
    sys.exit(main())
