"""RLlib's PPO on the hybrid action itself, new API stack.

    pip install -e . "ray[rllib]==2.60.0"                   # brings Gymnasium 1.2.2
    python examples/rllib_ppo.py                            # about a minute

RLlib makes a distribution for a Dict action by itself. It steps our batch as a vector environment,
which it expects to reset in the next step. What takes the time are its Python objects for every
episode.
"""

import gymnasium as gym
import ray
import torch
from gymnasium.wrappers.vector import RescaleObservation, TransformReward
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.tune.registry import register_env
from shared import arguments, report

import hydrogel_gym  # noqa: F401  registers the environments

args = arguments(__doc__, samples=40_000, num_envs=1000)


def make_envs(context):
    """The batch, with observations from -1 to 1 and rewards of about that size."""
    envs = gym.make_vec(
        "HydrogelDesign-v0", num_envs=context["num_envs"], autoreset_mode="NextStep"
    )
    return TransformReward(RescaleObservation(envs, -1.0, 1.0), lambda reward: reward / 10)


register_env("hydrogel", make_envs)
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
config = (
    PPOConfig()
    .environment("hydrogel")
    .env_runners(
        num_env_runners=0,
        num_envs_per_env_runner=args.num_envs,
        gym_env_vectorize_mode="vector_entry_point",
    )
    .training(
        lr=1e-3,
        gamma=0.0,
        train_batch_size_per_learner=args.num_envs,
        minibatch_size=args.num_envs // 2,
        num_epochs=10,
        use_kl_loss=False,
        vf_clip_param=float("inf"),
        grad_clip=0.5,
    )
    .rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[128, 128]))
    .debugging(seed=args.seed)
)
algorithm = config.build_algo()
for _ in range(args.num_iterations):
    algorithm.train()
module = algorithm.get_module()
env = gym.make("HydrogelDesign-v0")
observations, formulations = env.observation_space, env.action_space["formulation"]


def act(obs):
    """The likeliest polymer and coverage, and the mean formulation, back in its units."""
    low, high = (torch.tensor(bound) for bound in (observations.low, observations.high))
    inputs = {Columns.OBS: (obs - low) / (high - low) * 2 - 1}
    logits = module.forward_inference(inputs)[Columns.ACTION_DIST_INPUTS]
    distribution = module.get_inference_action_dist_cls().from_logits(logits)
    action = distribution.to_deterministic().sample()
    low, high = (torch.tensor(bound) for bound in (formulations.low, formulations.high))
    action["formulation"] = low + (action["formulation"] + 1) / 2 * (high - low)
    return action


report(args, act)
ray.shutdown()
