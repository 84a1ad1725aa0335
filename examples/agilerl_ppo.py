"""AgileRL's PPO, one agent without evolution, on the flat action.

    pip install -e . agilerl==2.58.0 peft==0.21.2
    python examples/agilerl_ppo.py                          # about a minute

AgileRL takes numpy vectors of Gymnasium that reset in the same step, as ours are. The discrete
action works as well.
"""

import gymnasium as gym
from agilerl.algorithms import PPO
from agilerl.rollouts import collect_rollouts
from shared import ScaledEnvs, arguments, report

import hydrogel_gym  # noqa: F401  registers the environments

ENV_ID = "HydrogelDesignFlat-v0"
args = arguments(__doc__)
envs = ScaledEnvs(gym.make_vec(ENV_ID, num_envs=args.num_envs), args.seed)
mlp = {"hidden_size": [128], "activation": "Tanh"}
agent = PPO(
    envs.single_observation_space,
    envs.single_action_space,
    net_config={"latent_dim": 128, "encoder_config": mlp, "head_config": mlp},
    num_envs=args.num_envs,
    learn_step=args.num_envs,
    batch_size=args.num_envs // 2,
    update_epochs=10,
    lr=2e-3,
    gamma=0.0,
    ent_coef=0.0,
    action_std_init=0.37,  # the logarithm of it
    share_encoders=False,
)
agent.set_training_mode(True)
last = {}
for _ in range(args.num_iterations):
    _, obs, done, scores, info = collect_rollouts(agent, envs, n_steps=1, **last)
    last = {"last_obs": obs, "last_done": done, "last_scores": scores, "last_info": info}
    agent.learn()


def act(obs):
    """The mean action."""
    latent = agent.actor.extract_features(agent.preprocess_observation(envs.scale(obs)))
    return agent.actor.head_net.wrapped(latent)


report(args, act, ENV_ID)
