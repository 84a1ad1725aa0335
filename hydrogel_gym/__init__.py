"""Learning to design in a hybrid action space: cardiac hydrogels for virtual patients.

Importing the package registers `HydrogelDesign-v0` and its two flat-action forms with Gymnasium.
"""

from importlib.metadata import version

from gymnasium.envs.registration import register

from hydrogel_gym.envs.single import HydrogelEnv
from hydrogel_gym.envs.vector import HydrogelVectorEnv
from hydrogel_gym.models.contract import RewardModel, RewardModelError, load_reward_model
from hydrogel_gym.problem.cohort import Cohort, CohortError, load_cohort
from hydrogel_gym.problem.fields import Outcomes
from hydrogel_gym.problem.polymers import PolymerTable, load_polymers
from hydrogel_gym.problem.reward import RewardConfig, compute_reward

__all__ = [
    "Cohort",
    "CohortError",
    "HydrogelEnv",
    "HydrogelVectorEnv",
    "Outcomes",
    "PolymerTable",
    "RewardConfig",
    "RewardModel",
    "RewardModelError",
    "compute_reward",
    "load_cohort",
    "load_polymers",
    "load_reward_model",
]

__version__ = version("hydrogel_gym")

for _env_id, _kwargs in {
    "HydrogelDesign-v0": {},
    "HydrogelDesignFlat-v0": {"action_format": "box"},
    "HydrogelDesignDiscrete-v0": {"action_format": "multidiscrete"},
}.items():
    register(
        id=_env_id,
        entry_point="hydrogel_gym.env:HydrogelEnv",
        vector_entry_point="hydrogel_gym.env:HydrogelVectorEnv",
        kwargs=_kwargs,
        # It marks the first reset as looked at before that has happened, so that an environment
        # whose first reset is refused could never be stepped; ours checks what it is given itself.
        disable_env_checker=True,
    )
