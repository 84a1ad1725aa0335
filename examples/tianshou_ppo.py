"""Tianshou's PPO over the batched environment, on the flat action.

    pip install tianshou==2.0.1 pyarrow && pip install --no-deps -e .
    python examples/tianshou_ppo.py                         # about two minutes

Tianshou takes no composite action, and loops over single environments in Python; the class below
gives it our batch instead. It resets ended episodes by itself, hence autoreset off. It also asks
for pandas below 3, which is older than this package asks for but will do here.
"""

import argparse
import time

import gymnasium as gym
import numpy as np
import torch
from judge import fraction_of_oracle, report
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory, LRSchedulerFactoryLinear
from tianshou.data import Batch, Collector, VectorReplayBuffer
from tianshou.env import BaseVectorEnv
from tianshou.trainer import OnPolicyTrainerParams
from torch import nn
from torch.distributions import Independent, Normal

import hydrogel_gym  # noqa: F401  registers the environments

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--samples", type=int, default=200_000, help="designs to learn from")
parser.add_argument("--num-envs", type=int, default=2000, help="designs at once")
parser.add_argument("--seed", type=int, default=1, help="of weights and samples")
args = parser.parse_args()
torch.set_num_threads(1)
torch.manual_seed(args.seed)
np.random.seed(args.seed)  # noqa: NPY002  Tianshou draws its minibatches from it


class BatchedVectorEnv(BaseVectorEnv):
    """A Gymnasium vector environment, all of it stepped at once.

    Rewards are in units of `reward_std`, as Tianshou's critic has no scale of its own.
    """

    def __init__(self, envs, reward_std):
        self.envs, self.env_num, self.reward_std = envs, envs.num_envs, reward_std
        self.is_async = self.is_closed = False

    def get_env_attr(self, key, id=None):
        """Spaces, above all."""
        of_one = f"single_{key}" if key in ("action_space", "observation_space") else key
        return [getattr(self.envs, of_one)] * self.env_num

    def reset(self, env_id=None, **kwargs):
        """Begin episodes of the environments asked for."""
        rows = np.arange(self.env_num) if env_id is None else np.atleast_1d(env_id)
        if len(rows) < self.env_num:
            kwargs["options"] = {"reset_mask": np.isin(np.arange(self.env_num), rows)}
        obs, _ = self.envs.reset(**kwargs)
        return obs[rows], np.array([{}] * len(rows))

    def step(self, action, id=None):
        """Step all environments."""
        obs, reward, terminated, truncated, _ = self.envs.step(action)
        infos = np.array([{"env_id": row} for row in range(self.env_num)])
        return obs, reward / self.reward_std, terminated, truncated, infos

    def close(self, **kwargs):
        """Close the environments."""
        self.envs.close()


envs = gym.make_vec("HydrogelDesignFlat-v0", num_envs=args.num_envs, autoreset_mode="Disabled")
obs, _ = envs.reset(seed=args.seed)
envs.action_space.seed(args.seed)
reward_std = envs.step(envs.action_space.sample())[1].std()
num_actions = envs.single_action_space.shape[0]
mean, std = torch.from_numpy(obs.mean(0)), torch.from_numpy(obs.std(0))
std[std == 0] = 1.0  # score and iteration, where an episode has one step


class Network(nn.Module):
    """Two hidden layers over a normalised observation."""

    def __init__(self, num_out):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(len(mean), 128),
            nn.Tanh(),
            nn.Linear(128, 128),
            nn.Tanh(),
            nn.Linear(128, num_out),
        )

    def forward(self, obs, state=None, info=None):
        """(B, num_out)."""
        return self.layers((torch.as_tensor(obs) - mean) / std)


class Actor(Network):
    """Mean and deviation of a Gaussian action."""

    def __init__(self):
        super().__init__(num_actions)
        self.logstd = nn.Parameter(torch.full((num_actions,), -1.0))

    def forward(self, obs, state=None, info=None):
        """((B, 32), (B, 32)) and no hidden state."""
        loc = super().forward(obs)
        return (loc, self.logstd.exp().expand_as(loc)), None


policy = ProbabilisticActorPolicy(
    actor=Actor(),
    dist_fn=lambda parameters: Independent(Normal(*parameters), 1),
    deterministic_eval=True,
    action_space=envs.single_action_space,
    observation_space=envs.single_observation_space,
)
optim = AdamOptimizerFactory(lr=2e-3)
num_iterations = -(-args.samples // args.num_envs)
optim.with_lr_scheduler_factory(
    LRSchedulerFactoryLinear(
        max_epochs=1,
        epoch_num_steps=num_iterations * args.num_envs,
        collection_step_num_env_steps=args.num_envs,
    )
)
algorithm = PPO(
    policy=policy,
    critic=Network(1),
    optim=optim,
    gamma=0.0,
    ent_coef=0.0,
    max_grad_norm=0.5,
    max_batchsize=args.num_envs,
)
buffer = VectorReplayBuffer(args.num_envs, args.num_envs)
collector = Collector(algorithm, BatchedVectorEnv(envs, reward_std), buffer)
start = time.perf_counter()
algorithm.run_training(
    OnPolicyTrainerParams(
        training_collector=collector,
        max_epochs=1,
        epoch_num_steps=num_iterations * args.num_envs,
        collection_step_num_env_steps=args.num_envs,
        batch_size=args.num_envs // 2,
        update_step_num_repetitions=10,
        verbose=False,
        show_progress=False,
    )
)
seconds = time.perf_counter() - start


def act(obs):
    """The mean action."""
    return policy.map_action(policy(Batch(obs=obs, info={})).act)


samples = num_iterations * args.num_envs
report(fraction_of_oracle(act, "HydrogelDesignFlat-v0"), samples, seconds)
