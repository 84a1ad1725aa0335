"""How good a policy is: its mean reward on the held-out patients over the best there is.

The examples share this and nothing else. The oracle searches once, in about ten seconds, and keeps
what it found in `runs/oracle` of the folder it is called from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import torch

import hydrogel_gym
from hydrogel_gym.oracle import best_designs


@torch.no_grad()
def fraction_of_oracle(
    act: Callable[[Any], Any], env_id: str = "HydrogelDesign-v0", **kwargs: Any
) -> float:
    """Mean reward of one design per held-out patient over the oracle's mean reward.

    Args:
        act: the deterministic policy, from (B, 13) observations to a batch of B actions. It is
            given numpy arrays, or tensors with `output="torch"`.
        env_id: environment whose action `act` returns.
        kwargs: further arguments of the environment, such as `action_format`.
    """
    cohort = hydrogel_gym.load_cohort("holdout")
    best = best_designs(cohort, cache_dir="runs/oracle").score.mean()
    envs = gym.make_vec(
        env_id, num_envs=len(cohort), cohort=cohort, patient_assignment="fixed", **kwargs
    )
    obs, _ = envs.reset()
    return float(envs.step(act(obs))[1].mean() / best)


def report(fraction: float, samples: int, seconds: float) -> None:
    """Print the last line of every example."""
    print(
        f"fraction of oracle on held-out patients: {fraction:.4f} "
        f"({samples} samples, {seconds:.0f} s)"
    )
