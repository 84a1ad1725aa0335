"""PPO with a continuous action, in the manner of CleanRL: one file, nothing but PyTorch.

    pip install -e .
    python examples/cleanrl_continuous.py                   # about a minute

`HydrogelDesignFlat-v0` takes one Box: the formulation and a score per polymer and coverage, the
largest of which is chosen. `train/ppo_hybrid.py` is the same algorithm on the hybrid action itself.
"""

import argparse
import time

import gymnasium as gym
import torch
from judge import fraction_of_oracle, report
from torch import nn
from torch.distributions import Normal

import hydrogel_gym  # noqa: F401  registers the environments

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--samples", type=int, default=400_000, help="designs to learn from")
parser.add_argument("--num-envs", type=int, default=2000, help="designs at once")
parser.add_argument("--num-epochs", type=int, default=10, help="passes over each batch")
parser.add_argument("--learning-rate", type=float, default=2e-3, help="at the start, of Adam")
parser.add_argument("--seed", type=int, default=1, help="of weights and samples")
args = parser.parse_args()
torch.set_num_threads(1)
torch.manual_seed(args.seed)

envs = gym.make_vec("HydrogelDesignFlat-v0", num_envs=args.num_envs, output="torch")
obs, _ = envs.reset(seed=args.seed)
mean, std = obs.mean(0), obs.std(0)
std[std == 0] = 1.0  # score and iteration, where an episode has one step


def layer(num_in, num_out, gain=2**0.5):
    """A linear layer, orthogonal at first."""
    linear = nn.Linear(num_in, num_out)
    nn.init.orthogonal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


def network(num_out, gain):
    """Two hidden layers over an observation."""
    num_in = envs.single_observation_space.shape[0]
    return nn.Sequential(
        layer(num_in, 128), nn.Tanh(), layer(128, 128), nn.Tanh(), layer(128, num_out, gain)
    )


num_actions = envs.single_action_space.shape[0]
actor, critic = network(num_actions, 0.01), network(1, 1.0)
logstd = nn.Parameter(torch.full((num_actions,), -1.0))
parameters = [*actor.parameters(), *critic.parameters(), logstd]
optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5)

num_iterations = -(-args.samples // args.num_envs)
start = time.perf_counter()
for iteration in range(num_iterations):
    optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / num_iterations)

    # Rollout: an episode is one step, so its return is the reward.
    x = (obs - mean) / std
    with torch.no_grad():
        policy = Normal(actor(x), logstd.exp())
        action = policy.sample()
        old_logprob = policy.log_prob(action).sum(-1)
        obs, reward, _, _, _ = envs.step(action)
        if iteration == 0:
            return_std = reward.std()
        returns = reward / return_std
        advantage = returns - critic(x).squeeze(-1)

    for _ in range(args.num_epochs):
        for rows in torch.randperm(args.num_envs).chunk(2):
            policy = Normal(actor(x[rows]), logstd.exp())
            logratio = policy.log_prob(action[rows]).sum(-1) - old_logprob[rows]
            ratio = logratio.exp()
            gain = (advantage[rows] - advantage[rows].mean()) / (advantage[rows].std() + 1e-8)
            policy_loss = -torch.min(gain * ratio, gain * ratio.clamp(0.8, 1.2)).mean()
            value_loss = (critic(x[rows]).squeeze(-1) - returns[rows]).square().mean()
            loss = policy_loss + 0.5 * value_loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
seconds = time.perf_counter() - start


def act(obs):
    """The mean action."""
    return actor((obs - mean) / std)


fraction = fraction_of_oracle(act, "HydrogelDesignFlat-v0", output="torch")
report(fraction, num_iterations * args.num_envs, seconds)
