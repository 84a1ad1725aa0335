"""What the examples share: arguments, scaled environments, a network, and how good a policy is."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import torch
from torch import nn

import hydrogel_gym
from hydrogel_gym.oracle import best_designs


def arguments(doc: str, samples: int = 400_000, num_envs: int = 2000) -> argparse.Namespace:
    """What the command line says, or these defaults; also the `start` time.

    `samples` is rounded up to `num_iterations` of `num_envs`. Seeds torch, which uses one thread.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--samples", type=int, default=samples, help="designs to learn from")
    parser.add_argument("--num-envs", type=int, default=num_envs, help="designs at once")
    parser.add_argument("--seed", type=int, default=1, help="of weights and samples")
    args = parser.parse_args()
    args.num_iterations = -(-args.samples // args.num_envs)
    args.samples = args.num_iterations * args.num_envs
    args.start = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    return args


class ScaledEnvs(gym.vector.VectorWrapper):
    """Observations less their mean over their deviation; rewards over that of random designs.

    `final_obs` stays as it is: an episode has one step here, so no learner reads it.
    """

    def __init__(self, envs: gym.vector.VectorEnv, seed: int) -> None:
        super().__init__(envs)
        obs, _ = envs.reset(seed=seed)
        self.mean, self.std = obs.mean(0), obs.std(0)
        self.std[self.std == 0] = 1.0  # score and iteration, where an episode has one step
        envs.action_space.seed(seed)
        self.reward_std = envs.step(envs.action_space.sample())[1].std()

    def scale(self, obs: Any) -> Any:
        """(B, 13) observations as the learner sees them."""
        return (obs - self.mean) / self.std

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """As Gymnasium's."""
        obs, info = self.env.reset(**kwargs)
        return self.scale(obs), info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """As Gymnasium's."""
        obs, reward, *rest = self.env.step(actions)
        return self.scale(obs), reward / self.reward_std, *rest


def network(num_in: int, num_out: int, gain: float = 1.0) -> nn.Sequential:
    """Two hidden layers; orthogonal at first, `gain` being that of the last layer."""
    linears = [nn.Linear(num_in, 128), nn.Linear(128, 128), nn.Linear(128, num_out)]
    for linear, scale in zip(linears, (2**0.5, 2**0.5, gain), strict=True):
        nn.init.orthogonal_(linear.weight, scale)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(linears[0], nn.Tanh(), linears[1], nn.Tanh(), linears[2])


@torch.no_grad()
def report(
    args: argparse.Namespace,
    act: Callable[[Any], Any],
    env_id: str = "HydrogelDesign-v0",
    output: str = "torch",
) -> None:
    """Print the last line of every example.

    It has the mean reward of one design per held-out patient over the oracle's mean reward.

    Args:
        args: what `arguments` returned.
        act: the deterministic policy, from (B, 13) observations to a batch of B actions.
        env_id: environment whose action `act` returns.
        output: what `act` is given and returns, `"torch"` or `"numpy"`.
    """
    seconds = time.perf_counter() - args.start
    cohort = hydrogel_gym.load_cohort("holdout")
    best = best_designs(cohort, cache_dir="runs/oracle").score.mean()
    envs = gym.make_vec(env_id, num_envs=len(cohort), cohort=cohort, output=output)
    obs, _ = envs.reset()
    fraction = float(envs.step(act(obs))[1].mean() / best)
    print(
        f"fraction of oracle on held-out patients: {fraction:.4f} "
        f"({args.samples} samples, {seconds:.0f} s)"
    )
