"""Stable-Baselines3's `VecEnv` over a vector environment; `envs.sb3` describes it."""

from hydrogel_gym.envs.sb3 import BatchedVecEnv

__all__ = ["BatchedVecEnv"]
