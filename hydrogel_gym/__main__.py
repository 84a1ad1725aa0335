"""What is installed, and whether it works here.

    python -m hydrogel_gym
    python -m hydrogel_gym --device cuda

Prints versions, environment ids and the hashes of the data, then steps environments and compares
what they return with figures worked out elsewhere. Exit code 0 if all is well, 1 if not, 2 for a
device that is not there.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.resources import files

import gymnasium as gym
import numpy as np
import torch

import hydrogel_gym
from hydrogel_gym.envs.wrappers import VectorDiscretizeHybridAction, VectorFlattenHybridAction
from hydrogel_gym.errors import first_line
from hydrogel_gym.output import unfailing_output
from hydrogel_gym.problem.fields import (
    COVERAGES,
    FORMULATION_FIELDS,
    FORMULATION_HIGH,
    FORMULATION_LOW,
)
from hydrogel_gym.problem.polymers import NUM_POLYMERS

DATA = {
    "hydrogel_gym": ("polymers.csv",),
    "hydrogel_gym.patients": ("cohort.csv", "cohort_holdout.csv"),
}
LIBRARIES = ("torch", "gymnasium", "numpy", "pandas")
REFERENCE_FORMULATION = {
    "youngs_modulus_kpa": 15.0,
    "half_life_days": 60.0,
    "conductivity_s_per_m": 0.2,
    "thickness_mm": 3.0,
}
# Polymer 6, on half of the border zone.
REFERENCE_DESIGN = (
    6,
    tuple(REFERENCE_FORMULATION.get(field.name, field.low) for field in FORMULATION_FIELDS),
    COVERAGES.index("scar_bz50"),
)
# Its reward for the first three patients of the cohort, by the model in float64;
# `tests/test_main.py` works them out again.
REFERENCE_REWARDS = (33.423765, 25.805065, 30.246383)
TOLERANCE = 1e-3  # a hundred roundings of a reward of 40 in float32
NUM_ENVS = 32


def check_data(device: str) -> str:
    """The files are read and validated; nobody is in both cohorts."""
    train, holdout = hydrogel_gym.load_cohort("train"), hydrogel_gym.load_cohort("holdout")
    if both := set(train.patient_ids) & set(holdout.patient_ids):
        raise AssertionError(f"{sorted(both)[0]} is in both cohorts")
    num_polymers = len(hydrogel_gym.load_polymers().names)
    return f"{len(train):,} and {len(holdout)} synthetic patients, {num_polymers} polymers"


def check_rewards(device: str) -> str:
    """A known design earns for known patients what it should."""
    num_envs = len(REFERENCE_REWARDS)
    envs = gym.make_vec("HydrogelDesign-v0", num_envs, device=device)
    envs.reset()
    polymer_id, formulation, coverage = REFERENCE_DESIGN
    _, rewards, *_ = envs.step(
        {
            "polymer_id": np.full(num_envs, polymer_id),
            "formulation": np.tile(np.array(formulation, np.float32), (num_envs, 1)),
            "coverage": np.full(num_envs, coverage),
        }
    )
    _require_close(rewards, np.array(REFERENCE_REWARDS))
    return f"{', '.join(f'{reward:.3f}' for reward in rewards)} for the first patients"


def check_agreement(device: str) -> str:
    """The single environment and the row of a vector return the same."""
    env = gym.make("HydrogelDesign-v0", device=device)
    envs = gym.make_vec("HydrogelDesign-v0", NUM_ENVS, device=device, patient_assignment="random")
    first, _ = envs.reset(seed=0)
    envs.action_space.seed(0)
    actions = envs.action_space.sample()
    _, rewards, *_ = envs.step(actions)
    for row in range(NUM_ENVS):
        obs, _ = env.reset(seed=row)
        _require_close(obs, first[row])
        _, reward, *_ = env.step({head: values[row] for head, values in actions.items()})
        _require_close(np.asarray(reward), rewards[row])
    return f"{NUM_ENVS} seeds"


def check_adaptive(device: str) -> str:
    """Patients who respond as predicted earn what they do in the first environment."""
    envs = gym.make_vec("HydrogelDesign-v0", NUM_ENVS, horizon=2, device=device)
    adaptive = gym.make_vec(
        "HydrogelAdapt-v0",
        NUM_ENVS,
        horizon=2,
        device=device,
        response_sd=0.0,
        reward_mode="score",
    )
    envs.reset(seed=0), adaptive.reset(seed=0)
    envs.action_space.seed(0)
    for _ in range(2):
        action = envs.action_space.sample()
        _require_close(adaptive.step(action)[1], envs.step(action)[1])
    return f"{NUM_ENVS} patients without a hidden response"


def check_forms(device: str) -> str:
    """The same designs as flat and as discrete actions earn the same."""
    envs = gym.make_vec("HydrogelDesign-v0", NUM_POLYMERS * len(COVERAGES), device=device)
    pairs = np.indices((NUM_POLYMERS, len(COVERAGES))).reshape(2, -1)
    # On the middle of the levels, so that the discrete form has it exactly.
    formulation = np.tile((FORMULATION_LOW + FORMULATION_HIGH) / 2, (envs.num_envs, 1))
    action = {"polymer_id": pairs[0], "formulation": formulation, "coverage": pairs[1]}
    envs.reset()
    _, rewards, *_ = envs.step(action)
    for env_id, wrapper in (
        ("HydrogelDesignFlat-v0", VectorFlattenHybridAction(envs)),
        ("HydrogelDesignDiscrete-v0", VectorDiscretizeHybridAction(envs)),
    ):
        flat = gym.make_vec(env_id, envs.num_envs, device=device)
        flat.reset()
        _require_close(flat.step(wrapper.reverse_actions(action))[1], rewards)
    return f"{envs.num_envs} pairs of polymer and coverage"


CHECKS: dict[str, Callable[[str], str]] = {
    "data": check_data,
    "rewards": check_rewards,
    "single and vector": check_agreement,
    "flat and discrete actions": check_forms,
    "adaptive": check_adaptive,
}


def _require_close(found: np.ndarray, expected: np.ndarray) -> None:
    if not np.allclose(found, expected, rtol=0.0, atol=TOLERANCE):
        raise AssertionError(f"found {np.array2string(found)}, expected {expected}")


def _describe() -> None:
    """Print versions, ids and hashes."""
    print(f"hydrogel_gym {hydrogel_gym.__version__}")
    ids = [
        spec.id
        for spec in gym.registry.values()
        if str(spec.entry_point).startswith("hydrogel_gym.env:")
    ]
    print(f"environments: {', '.join(ids)}")
    libraries = [f"{name} {version(name)}" for name in LIBRARIES]
    print(f"Python {platform.python_version()}, {', '.join(libraries)}")
    for package, names in DATA.items():
        for name in names:
            digest = hashlib.sha256((files(package) / name).read_bytes()).hexdigest()
            print(f"{name}: sha256 {digest}")


@unfailing_output()
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hydrogel_gym", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", default="cpu", help="where to step environments")
    device = parser.parse_args(argv).device
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        print(f"--device is {device!r}, which is not there: {first_line(error)}", file=sys.stderr)
        return 2
    _describe()
    failed = 0
    for name, check in CHECKS.items():
        try:
            print(f"ok: {name}: {check(device)}")
        except Exception as error:  # whatever is broken here is what to print
            failed += 1
            print(f"FAILED: {name}: {type(error).__name__}: {error}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
