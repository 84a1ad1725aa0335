"""Learning to design in a hybrid action space: cardiac hydrogels for virtual patients.

Importing the package registers `HydrogelDesign-v0`, its two flat-action forms and
`HydrogelAdapt-v0` with Gymnasium.
"""

from importlib.metadata import version

from gymnasium.envs.registration import register

from hydrogel_gym.envs.adaptive import HydrogelAdaptEnv, HydrogelAdaptVectorEnv
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
    "HydrogelAdaptEnv",
    "HydrogelAdaptVectorEnv",
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

for _env_id, _name, _kwargs in (
    ("HydrogelDesign-v0", "Hydrogel", {}),
    ("HydrogelDesignFlat-v0", "Hydrogel", {"action_format": "box"}),
    ("HydrogelDesignDiscrete-v0", "Hydrogel", {"action_format": "multidiscrete"}),
    ("HydrogelAdapt-v0", "HydrogelAdapt", {}),
):
    register(
        id=_env_id,
        entry_point=f"hydrogel_gym.env:{_name}Env",
        vector_entry_point=f"hydrogel_gym.env:{_name}VectorEnv",
        kwargs=_kwargs,
        # It marks the first reset as looked at before that has happened, so that an environment
        # whose first reset is refused could never be stepped; ours checks what it is given itself.
        disable_env_checker=True,
    )
