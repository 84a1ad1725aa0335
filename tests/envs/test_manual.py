"""The manual, `HydrogelEnv`'s docstring, says what the environment does."""

from __future__ import annotations

import inspect
import re

from hydrogel_gym import HydrogelEnv, HydrogelVectorEnv, RewardConfig
from hydrogel_gym.envs.spaces import episode_fields
from hydrogel_gym.problem.fields import (
    COVERAGES,
    FORMULATION_FIELDS,
    OUTCOME_FIELDS,
    PATIENT_FIELDS,
)
from hydrogel_gym.problem.polymers import NUM_POLYMERS
from hydrogel_gym.problem.reward import RewardTerms

MANUAL = inspect.getdoc(HydrogelEnv)


def defaults(env_class) -> dict:
    return {name: item.default for name, item in inspect.signature(env_class).parameters.items()}


def test_manual_lists_action_and_observation_as_their_spaces_have_them():
    actions = [
        f"| formulation | {i} | {item.name} | {item.low:g} | {item.high:g} |"
        for i, item in enumerate(FORMULATION_FIELDS)
    ]
    fields = (*PATIENT_FIELDS, *episode_fields(1, RewardConfig().max_score))
    observations = [
        f"| {i} | {item.name} | {item.low:g} | {item.high:g} |" for i, item in enumerate(fields)
    ]
    observations[-1] = observations[-1].replace("| 1 |", "| horizon |")
    for row in (
        f"| polymer_id |  | row of the polymer table | 0 | {NUM_POLYMERS - 1} |",
        f"| coverage |  | {', '.join(COVERAGES)} | 0 | {len(COVERAGES) - 1} |",
        *actions,
        *observations,
    ):
        assert f"\n{row} " in MANUAL
    assert "`Box(13,)`" in MANUAL
    assert "`Box(-1, 1, (32,))`" in MANUAL
    assert "`MultiDiscrete([24, 11, 11, 11, 11, 4])`" in MANUAL


def test_arguments_have_the_defaults_of_the_manual_and_those_of_the_vector_but_one():
    table = MANUAL.split("## Arguments")[1]
    documented = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| `(.*?)` \|", table, re.MULTILINE))
    single, vector = defaults(HydrogelEnv), defaults(HydrogelVectorEnv)
    assert documented == {name: repr(x).replace("'", '"') for name, x in single.items()}
    assert {name for name in single if single[name] != vector[name]} == {"patient_assignment"}


def test_manual_names_the_terms_of_the_reward_and_everything_in_info():
    rewards = MANUAL.split("## Rewards")[1].split("## Starting State")[0]
    config = RewardConfig()
    terms = re.findall(r"^- `(\w+)`: (.*)$", rewards, re.MULTILINE)
    assert {name: list(map(float, re.findall(r"[-+]?\d[\d.]*", x))) for name, x in terms} == {
        "reward_delta_ef": [config.delta_ef_weight],
        "reward_stress_reduction": [config.stress_reduction_weight, 100.0],
        "reward_optimal_prob": [config.optimal_prob_weight],
        "reward_toxicity": [-config.toxicity_penalty, config.toxicity_limit],
        "reward_integrity": [-config.integrity_penalty, config.integrity_limit],
        "reward_fibrosis": [-config.fibrosis_penalty, config.fibrosis_limit],
        "reward_novelty": [config.novelty_bonus],
    }
    assert tuple(name for name, _ in terms) == RewardTerms._fields
    env = HydrogelEnv()
    env.reset()
    info = set(env.step(env.action_space.sample())[4])
    assert info <= set(re.findall(r"`(\w+)`", rewards))
    assert info >= {item.name for item in OUTCOME_FIELDS} | set(RewardTerms._fields)
    assert not info & {"episode", "state"}  # which Gymnasium's wrappers write there
