"""Tianshou's PPO over the batched environment, on the flat action.

    pip install -e . tianshou==2.0.1
    python examples/tianshou_ppo.py                         # about two minutes

Tianshou takes no composite action, and loops over single environments in Python; the class below
gives it our batch instead. It resets ended episodes by itself, hence autoreset off.
"""

import gymnasium as gym
import numpy as np
import torch
from shared import ScaledEnvs, arguments, network, report
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory, LRSchedulerFactoryLinear
from tianshou.data import Batch, Collector, VectorReplayBuffer
from tianshou.env import BaseVectorEnv
from tianshou.trainer import OnPolicyTrainerParams
from torch import nn
from torch.distributions import Independent, Normal

import hydrogel_gym  # noqa: F401  registers the environments

ENV_ID = "HydrogelDesignFlat-v0"
args = arguments(__doc__, samples=200_000)
np.random.seed(args.seed)  # noqa: NPY002  Tianshou draws its minibatches from it


class BatchedVectorEnv(BaseVectorEnv):
    """A Gymnasium vector environment, all of it stepped at once."""

    def __init__(self, envs):
        self.envs, self.env_num = envs, envs.num_envs
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
        return obs, reward, terminated, truncated, infos

    def close(self, **kwargs):
        """Close the environments."""
        self.envs.close()


envs = gym.make_vec(ENV_ID, num_envs=args.num_envs, autoreset_mode="Disabled")
envs = ScaledEnvs(envs, args.seed)
num_inputs, num_actions = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]


class Critic(nn.Module):
    """Values, whatever Tianshou sends along."""

    def __init__(self, num_out=1):
        super().__init__()
        self.layers = network(num_inputs, num_out)

    def forward(self, obs, state=None, info=None):
        """(B, num_out)."""
        return self.layers(torch.as_tensor(obs))


class Actor(Critic):
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
optim.with_lr_scheduler_factory(
    LRSchedulerFactoryLinear(
        max_epochs=1,
        epoch_num_steps=args.samples,
        collection_step_num_env_steps=args.num_envs,
    )
)
algorithm = PPO(
    policy=policy,
    critic=Critic(),
    optim=optim,
    gamma=0.0,
    ent_coef=0.0,
    max_grad_norm=0.5,
    max_batchsize=args.num_envs,
)
buffer = VectorReplayBuffer(args.num_envs, args.num_envs)
collector = Collector(algorithm, BatchedVectorEnv(envs), buffer)
algorithm.run_training(
    OnPolicyTrainerParams(
        training_collector=collector,
        max_epochs=1,
        epoch_num_steps=args.samples,
        collection_step_num_env_steps=args.num_envs,
        batch_size=args.num_envs // 2,
        update_step_num_repetitions=10,
        verbose=False,
        show_progress=False,
    )
)


def act(obs):
    """The mean action."""
    return policy.map_action(policy(Batch(obs=envs.scale(obs), info={})).act)


report(args, act, ENV_ID, output="numpy")
