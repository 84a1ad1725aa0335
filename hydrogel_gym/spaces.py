"""Fields, spaces and flat actions, described in `problem.fields` and `envs.spaces`."""

from hydrogel_gym.envs.spaces import (
    FLAT_ACTION_DIM,
    FORMULATION_LEVELS,
    action_space,
    decode_box,
    decode_multidiscrete,
    encode_box,
    encode_multidiscrete,
    observation_space,
    split_observation,
)
from hydrogel_gym.problem.fields import (
    COVERAGE_FRACTIONS,
    COVERAGES,
    FORMULATION_FIELDS,
    FORMULATION_HIGH,
    FORMULATION_LOW,
    OUTCOME_FIELDS,
    PATIENT_FIELDS,
    Design,
    Field,
    Outcomes,
    from_unit_range,
    to_unit_range,
)
from hydrogel_gym.problem.polymers import NUM_POLYMERS

__all__ = [
    "COVERAGES",
    "COVERAGE_FRACTIONS",
    "Design",
    "FLAT_ACTION_DIM",
    "FORMULATION_FIELDS",
    "FORMULATION_HIGH",
    "FORMULATION_LEVELS",
    "FORMULATION_LOW",
    "Field",
    "NUM_POLYMERS",
    "OUTCOME_FIELDS",
    "Outcomes",
    "PATIENT_FIELDS",
    "action_space",
    "decode_box",
    "decode_multidiscrete",
    "encode_box",
    "encode_multidiscrete",
    "from_unit_range",
    "observation_space",
    "split_observation",
    "to_unit_range",
]
