"""Plain Gymnasium: what the environments are like without a learner, and a random search on them.

    pip install -e .
    python examples/plain_gymnasium.py                      # about fifteen seconds

The search tries the same random designs on every training patient and keeps the one that is best
on average, a single design for everybody: what a policy must beat.
"""

import gymnasium as gym
import numpy as np
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from shared import arguments, report

import hydrogel_gym  # noqa: F401  registers the environments

args = arguments(__doc__, samples=1_000_000)

# One environment, one design per episode.
env = gym.make("HydrogelDesign-v0")
env.action_space.seed(args.seed)
obs, info = env.reset(seed=args.seed)
best = -np.inf
for _ in range(100):
    obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
    best = max(best, reward)
    if terminated or truncated:
        obs, info = env.reset()
print(f"best of 100 random designs, each for another patient: {best:.2f}")

# Five designs for one patient, each observed by its best score so far; observations grouped by
# name, and flattened again by a wrapper.
env = gym.make("HydrogelDesign-v0", horizon=5, obs_format="dict")
env = gym.wrappers.RecordEpisodeStatistics(gym.wrappers.FlattenObservation(env))
env.action_space.seed(args.seed)
obs, info = env.reset(seed=args.seed, options={"patient_index": 7})
done = False
while not done:
    obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
    done = terminated or truncated
print(f"return of an episode of {info['episode']['l']} designs: {info['episode']['r']:.2f}")

# Many environments in one batch of numpy arrays; an ended episode begins anew in the same step.
envs = RecordEpisodeStatistics(gym.make_vec("HydrogelDesign-v0", num_envs=8, horizon=3))
envs.action_space.seed(args.seed)
obs, info = envs.reset(seed=args.seed)
for _ in range(3):
    obs, reward, terminated, truncated, info = envs.step(envs.action_space.sample())
print(f"returns of 8 episodes of 3 designs: {info['episode']['r'].round(1)}")

# The same with tensors: the same design for all patients at each step.
envs = gym.make_vec("HydrogelDesign-v0", num_envs=args.num_envs, output="torch")
space = envs.single_action_space
space.seed(args.seed)
obs, info = envs.reset(seed=args.seed)
best, best_design = -np.inf, None
for _ in range(args.num_iterations):
    design = space.sample()
    action = {key: np.stack([value] * args.num_envs) for key, value in design.items()}
    obs, reward, terminated, truncated, info = envs.step(action)
    if reward.mean() > best:
        best, best_design = float(reward.mean()), design
print(f"best design for everybody, of {args.num_iterations}: {best_design}")


def act(obs):
    """The same design for everybody."""
    return {key: np.stack([value] * len(obs)) for key, value in best_design.items()}


report(args, act)
