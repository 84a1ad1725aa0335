"""PPO with a continuous action, in the manner of CleanRL: one file, nothing but PyTorch.

    pip install -e .
    python examples/cleanrl_continuous.py                   # about a minute

`HydrogelDesignFlat-v0` takes one Box: the formulation and a score per polymer and coverage, the
largest of which is chosen. `train/ppo_hybrid.py` is the same algorithm on the hybrid action itself.
"""

import gymnasium as gym
import torch
from shared import ScaledEnvs, arguments, network, report
from torch import nn
from torch.distributions import Normal

import hydrogel_gym  # noqa: F401  registers the environments

ENV_ID, NUM_EPOCHS, LEARNING_RATE = "HydrogelDesignFlat-v0", 10, 2e-3
args = arguments(__doc__)
envs = ScaledEnvs(gym.make_vec(ENV_ID, num_envs=args.num_envs, output="torch"), args.seed)
num_inputs, num_actions = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
actor, critic = network(num_inputs, num_actions, 0.01), network(num_inputs, 1)
logstd = nn.Parameter(torch.full((num_actions,), -1.0))
parameters = [*actor.parameters(), *critic.parameters(), logstd]
optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, eps=1e-5)

obs, _ = envs.reset(seed=args.seed)
for iteration in range(args.num_iterations):
    optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - iteration / args.num_iterations)

    # Rollout: an episode is one step, so its return is the reward.
    x = obs
    with torch.no_grad():
        policy = Normal(actor(x), logstd.exp())
        action = policy.sample()
        old_logprob = policy.log_prob(action).sum(-1)
        obs, returns, _, _, _ = envs.step(action)
        advantage = returns - critic(x).squeeze(-1)

    for _ in range(NUM_EPOCHS):
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


def act(obs):
    """The mean action."""
    return actor(envs.scale(obs))


report(args, act, ENV_ID)
