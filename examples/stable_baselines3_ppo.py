"""Stable-Baselines3's PPO on 2,000 environments that step as one batch.

    pip install -e ".[sb3]"
    python examples/stable_baselines3_ppo.py                # about a minute

The library takes no composite action, so the flat form of the environment is learned: one Box of
the formulation and a score per polymer and coverage. Episodes have one step: short rollouts, no
discount.
"""

import gymnasium as gym
from shared import arguments, report
from stable_baselines3 import PPO
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize

import hydrogel_gym  # noqa: F401  registers the environments
from hydrogel_gym.sb3 import BatchedVecEnv

ENV_ID = "HydrogelDesignFlat-v0"
args = arguments(__doc__)
envs = gym.make_vec(ENV_ID, num_envs=args.num_envs, output="torch")
envs = VecNormalize(BatchedVecEnv(envs), gamma=0.0)
model = PPO(
    "MlpPolicy",
    envs,
    n_steps=1,
    batch_size=args.num_envs // 2,
    n_epochs=10,
    learning_rate=LinearSchedule(2e-3, 0.0, 1.0),
    gamma=0.0,
    policy_kwargs={"net_arch": [128, 128], "log_std_init": -1.0},
    seed=args.seed,
    device="cpu",
)
model.learn(args.samples)
envs.training = False


def act(obs):
    """The mean action."""
    return model.predict(envs.normalize_obs(obs), deterministic=True)[0]


report(args, act, ENV_ID, output="numpy")
