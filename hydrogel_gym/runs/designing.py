"""Designing with a saved policy: which policy for whom, and what its designs depend on."""

from __future__ import annotations

import contextlib
import dataclasses
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
from hydrogel_gym.problem.cohort import Cohort, CohortError, load_cohort
from hydrogel_gym.runs.command_line import check_ranges
from hydrogel_gym.runs.environments import make_envs
from hydrogel_gym.runs.identity import (
    MODEL,
    ORIGIN,
    check_origin,
    content_of,
    digest,
    versions,
)
from hydrogel_gym.runs.options import ADAPTIVE, ProblemOptions
from hydrogel_gym.runs.policies import load_policy, policy_path

MAX_TOP_K = 1_000_000  # they are kept in memory, by several threads


@dataclass
class PatientArgs:
    """Which policy designs for whom; of every script that does."""

    policy: Path = Path("runs/quick-s1")
    """a run directory, or a `stage2_policy.pt`"""
    patient: tuple[str, ...] = ()
    """one patient or several; everybody by default"""
    cohort: Path | None = None
    """whose patients, CSV or Parquet; those that the policy was trained on by default"""
    reward_model: str | None = None
    """Stage-1 model that evaluates; the one that the policy was trained on by default"""
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
    options: ProblemOptions
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
    check_ranges(
        args,
        ("top_k", f"1 to {MAX_TOP_K:,}", lambda x: 1 <= x <= MAX_TOP_K),
        ("seed", "0 or more", lambda x: x >= 0),
    )
    path = policy_path(args.policy)
    agent, saved = load_policy(path, make, device)
    options, cohort = problem_and_patients(saved, args.cohort, args.reward_model)
    try:
        # Once each, however often they are named.
        rows = list(dict.fromkeys(map(cohort.index, args.patient or cohort.patient_ids)))
    except ValueError as error:
        raise UsageError(f"--patient: {error}") from error
    envs: Any = environments(saved, options, cohort, device)
    obs, _ = envs.reset()
    if (width := obs.shape[-1]) != (known := saved["architecture"]["obs_dim"]):
        raise UsageError(f"policy {path} observes {known} numbers, its environments give {width}")
    return Start(path, saved, agent, options, cohort, rows, envs.unwrapped.problem, obs)


def problem_and_patients(
    saved: Mapping[str, Any], cohort: Path | None, reward_model: str | None
) -> tuple[ProblemOptions, Cohort]:
    """The problem to design for, and whom.

    Args:
        saved: content of the policy.
        cohort: other patients than those of training, if given.
        reward_model: another model than that of training, if given.

    Raises:
        UsageError: patients or model are no longer those of training, and no others are given.
    """
    options = ProblemOptions.of(saved["training_config"])
    if options.env_id == ADAPTIVE:
        raise UsageError(
            f"the policy is of {ADAPTIVE}, which designs by what was measured before; allowed: one "
            "of HydrogelDesign-v0"
        )
    if reward_model is not None:
        options = dataclasses.replace(options, reward_model=reward_model, pessimism=None)
    try:
        patients = load_cohort(cohort or options.cohort)
    except CohortError as error:
        why = "" if cohort else "; the policy was trained on it: pass --cohort to say where it is"
        raise UsageError(f"{error}{why}") from error
    model = model_content(options, reward_model)
    here = dict(zip(ORIGIN, (digest(patients), model), strict=True))
    given = dict(zip(ORIGIN, (cohort, reward_model), strict=True))
    check_origin(saved.get("origin"), here, given)
    return options, patients


def model_content(options: ProblemOptions, given: str | None) -> str:
    """Digest of the reward model of some options.

    Args:
        options: the problem.
        given: the model that the flags name, if they do.

    Raises:
        UsageError: it is that of training, and its file is gone.
    """
    name, path = options.reward_model_name, Path(options.reward_model_name)
    if given is None and path.suffix in (".pt", ".pt2") and not path.is_file():
        raise UsageError(
            f"reward_model {name!r}: there is no such file; the policy was trained on it: pass "
            "--reward-model to say where it is"
        )
    return content_of(name)


def environments(
    saved: Mapping[str, Any], options: ProblemOptions, cohort: Cohort, device: torch.device
) -> gym.vector.VectorEnv:
    """One environment per patient, in the precision that a policy was trained in.

    Args:
        saved: content of the policy.
        options: the problem.
        cohort: the patients.
        device: where.
    """
    is_double = saved["training_config"].get("precision") == "fp64"
    return make_envs(options, cohort, device, dtype="float64" if is_double else "float32")


def origin(path: Path, options: ProblemOptions, cohort: Cohort) -> dict[str, str]:
    """Hashes of the policy, the patients and the reward model that designs are of."""
    return {
        "policy": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        "patients": digest(cohort),
        MODEL: content_of(options.reward_model_name),
    }


def manifest(start: Start, device: torch.device, args: PatientArgs, names: str) -> dict[str, Any]:
    """What makes designs what they are, with the flags of these names."""
    return {
        "format": SCHEMA,
        "hydrogel_gym": versions()["hydrogel_gym"],
        **origin(start.path, start.options, start.cohort),
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
        note = (
            f"{done:,} of {len(patient_ids):,} patients were completed and {store.output_dir} can "
            "be read" + (f"; the same command goes on with {left[0]}" if left else "")
        )
        notes: list[str] = getattr(error, "__notes__", [])  # `add_note` is of Python 3.11
        setattr(error, "__notes__", [*notes, note])  # noqa: B010
        raise
