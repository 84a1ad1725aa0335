"""The environments, under the path that registered ids and saved specs name."""

from hydrogel_gym.envs.adaptive import HydrogelAdaptEnv, HydrogelAdaptVectorEnv
from hydrogel_gym.envs.single import HydrogelEnv
from hydrogel_gym.envs.vector import HydrogelVectorEnv

__all__ = ["HydrogelAdaptEnv", "HydrogelAdaptVectorEnv", "HydrogelEnv", "HydrogelVectorEnv"]
