"""rsl_rl's PPO, whose environments are one batch of tensors as ours are, on the flat action.

    pip install -e . rsl-rl-lib==5.5.1
    python examples/rsl_rl_ppo.py                           # about a minute

rsl_rl is made for robots in parallel: it takes one continuous action, and resets nothing itself.
"""

import gymnasium as gym
import torch
from rsl_rl.env import VecEnv
from rsl_rl.runners import OnPolicyRunner
from shared import ScaledEnvs, arguments, report
from tensordict import TensorDict

import hydrogel_gym  # noqa: F401  registers the environments

ENV_ID = "HydrogelDesignFlat-v0"
args = arguments(__doc__)


class Batch(VecEnv):
    """Our batch under rsl_rl's names."""

    def __init__(self, envs):
        self.envs, self.num_envs, self.device, self.cfg = envs, envs.num_envs, "cpu", {}
        self.num_actions = envs.single_action_space.shape[0]
        self.max_episode_length, self.episode_length_buf = 1, torch.zeros(self.num_envs)
        self.obs, _ = envs.reset()

    def get_observations(self):
        """One group of observations, for actor and critic."""
        return TensorDict(policy=self.obs, batch_size=[self.num_envs])

    def step(self, actions):
        """Observations, rewards, whether an episode ended, and whether it was cut off."""
        self.obs, reward, terminated, truncated, _ = self.envs.step(actions)
        return (
            self.get_observations(),
            reward,
            terminated | truncated,
            {"time_outs": truncated},
        )


envs = ScaledEnvs(gym.make_vec(ENV_ID, num_envs=args.num_envs, output="torch"), args.seed)
net = {"class_name": "MLPModel", "hidden_dims": [128, 128], "activation": "tanh"}
gaussian = {"class_name": "GaussianDistribution", "init_std": 0.37, "std_type": "log"}
config = {
    "num_steps_per_env": 1,
    "save_interval": args.num_iterations,
    "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
    "actor": {**net, "distribution_cfg": gaussian},
    "critic": net,
    "algorithm": {
        "class_name": "PPO",
        "gamma": 0.0,
        "num_learning_epochs": 10,
        "num_mini_batches": 2,
        "learning_rate": 1e-3,
        "schedule": "fixed",
        "entropy_coef": 0.0,
        "max_grad_norm": 0.5,
    },
}
runner = OnPolicyRunner(Batch(envs), config)
runner.learn(args.num_iterations)
policy = runner.get_inference_policy()


def act(obs):
    """The mean action."""
    return policy(TensorDict(policy=envs.scale(obs), batch_size=[len(obs)]))


report(args, act, ENV_ID)
