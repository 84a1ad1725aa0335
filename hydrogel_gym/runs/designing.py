"""Designing with a saved policy: which policy for whom, and what its designs depend on."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import torch
from torch import Tensor

from hydrogel_gym.designs.grid import RESOLUTION
from hydrogel_gym.designs.schema import SCHEMA
from hydrogel_gym.designs.store import Store
from hydrogel_gym.envs.design_problem import DesignProblem
from hydrogel_gym.errors import UsageError
from hydrogel_gym.problem.cohort import Cohort, load_cohort
from hydrogel_gym.runs.environments import make_envs
from hydrogel_gym.runs.identity import digest, versions
from hydrogel_gym.runs.options import ProblemOptions
from hydrogel_gym.runs.policies import load_policy, policy_path


@dataclass
class PatientArgs:
    """Which policy designs for whom; of every script that does."""

    policy: Path = Path("runs/quick-s1")
    """a run directory, or a `stage2_policy.pt`"""
    patient: tuple[str, ...] = ()
    """one patient or several; everybody by default"""
    cohort: Path | None = None
    """whose patients, CSV or Parquet; those that the policy was trained on by default"""
    top_k: int = 100
    """how many of a patient's best designs to keep, all unlike each other"""
    seed: int = 1
    """of everything drawn"""
    output_dir: Path | None = None
    """where to; a folder beside the policy by default"""
    device: str = "auto"
    """`cpu`, `cuda`, ...; `auto` takes a GPU if there is one"""


class Start(NamedTuple):
    """What designing for patients begins with."""

    path: Path  # of the policy
    saved: dict[str, Any]  # its content
    agent: Any  # the policy
    cohort: Cohort
    rows: list[int]  # of the patients to design for
    problem: DesignProblem  # reward model, limits, patients
    obs: Tensor  # (P, obs_dim) what the policy sees of each patient before it designs


def begin(args: PatientArgs, make: Callable[..., torch.nn.Module], device: torch.device) -> Start:
    """Load the policy, its problem and the patients to design for.

    Args:
        args: which.
        make: the policy's class.
        device: where.

    Raises:
        UsageError: one of them is missing, or they do not belong together.
    """
    path = policy_path(args.policy)
    agent, saved = load_policy(path, make, device)
    trained = saved["training_config"]
    cohort = load_cohort(args.cohort or trained["cohort"])
    try:
        # Once each, however often they are named.
        rows = list(dict.fromkeys(map(cohort.index, args.patient or cohort.patient_ids)))
    except ValueError as error:
        raise UsageError(f"--patient: {error}") from error
    envs: Any = environments(trained, cohort, device)
    obs, _ = envs.reset()
    if (width := obs.shape[-1]) != (known := saved["architecture"]["obs_dim"]):
        raise UsageError(f"policy {path} observes {known} numbers, its environments give {width}")
    return Start(path, saved, agent, cohort, rows, envs.unwrapped.problem, obs)


def environments(
    trained: Mapping[str, Any], cohort: Cohort, device: torch.device
) -> gym.vector.VectorEnv:
    """One environment per patient, of the problem that a policy was trained on.

    Args:
        trained: its `training_config`.
        cohort: the patients.
        device: where.
    """
    return make_envs(
        ProblemOptions.of(trained),
        cohort,
        device,
        dtype="float64" if trained.get("precision") == "fp64" else "float32",
    )


def origin(path: Path, cohort: Cohort) -> dict[str, str]:
    """Hashes of the policy and the patients that designs are of."""
    return {
        "policy": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        "patients": digest(cohort),
    }


def manifest(start: Start, device: torch.device, args: PatientArgs, names: str) -> dict[str, Any]:
    """What makes designs what they are, with the flags of these names."""
    return {
        "format": SCHEMA,
        "hydrogel_gym": versions()["hydrogel_gym"],
        **origin(start.path, start.cohort),
        "env_id": start.saved["training_config"]["env_id"],
        "device type": device.type,
        **{name: getattr(args, name) for name in names.split()},
        "resolution": list(RESOLUTION),
    }


@contextlib.contextmanager
def explaining_interruptions(store: Store, patient_ids: list[str]) -> Iterator[None]:
    """Say of what ends a run early which patients are done, and with whom it goes on.

    Args:
        store: is closed at the end.
        patient_ids: whom to design for.

    Raises:
        OSError: as it was, with a note.
        KeyboardInterrupt: as it was, with a note.
    """
    try:
        with store:
            yield
    except (OSError, KeyboardInterrupt) as error:
        left = [patient_id for patient_id in patient_ids if not store.is_done(patient_id)]
        done = len(patient_ids) - len(left)
        error.add_note(
            f"{done:,} of {len(patient_ids):,} patients were completed and {store.output_dir} can "
            "be read" + (f"; the same command goes on with {left[0]}" if left else "")
        )
        raise
