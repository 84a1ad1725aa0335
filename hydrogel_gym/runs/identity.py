"""What a run is: what has to be the same for it to go on, and what its results depend on."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hydrogel_gym.errors import UsageError
from hydrogel_gym.errors import differences as differences
from hydrogel_gym.problem.cohort import Cohort
from hydrogel_gym.runs.options import plain_config
from hydrogel_gym.runs.ranks import World

# A run may go on with other values of these. Cohorts are compared by what they contain.
MAY_CHANGE = (
    "output_dir overwrite resume checkpoint_interval keep_checkpoints device compile "
    "cohort holdout_cohort reward_model track tensorboard"
).split()
# Settings that earlier versions had, and the value with which a run of theirs is one of ours.
REMOVED = {"reward_precision": "fp32", "true_reward_model": None, "evaluate": None}


def patients_of(cohort: str) -> str:
    """Key of the digest of a run's training or held-out patients."""
    return f"patients of the {cohort} cohort"


MODEL = "reward model"
ORIGIN = (patients_of("train"), MODEL)  # what a policy says of its training


def check_origin(
    saved: Mapping[str, str] | None, here: Mapping[str, str], given: Mapping[str, Any]
) -> None:
    """Compare patients and reward model with those that a policy was trained on.

    Args:
        saved: digests by the names of `ORIGIN`, of training; None if the policy has none.
        here: digests of what is there now, of those names that are to be compared.
        given: by the same names, what the flags say, None where they say nothing.

    Raises:
        UsageError: something has changed that was not given on purpose.
    """
    for name, now in here.items():
        what, flag = (name, "--reward-model") if name == MODEL else ("patients", "--cohort")
        if saved is None:
            print(f"note: the policy does not say which {what} it was trained on", file=sys.stderr)
        elif saved[name] != now and given[name] is None:
            raise UsageError(
                f"{what} changed since the policy was trained (digest {saved[name]} then, {now} "
                f"now); pass {flag} to say which to take"
            )
        elif saved[name] != now and name != MODEL:
            print(f"note: other {what} than the policy was trained on", file=sys.stderr)


def digest(cohort: Cohort) -> str:
    """Short hash of who is in a cohort."""
    ids = json.dumps(cohort.patient_ids).encode()
    return hashlib.sha256(ids + cohort.features.numpy().tobytes()).hexdigest()[:16]


def content_of(reward_model: str) -> str:
    """Short hash of the file of a reward model, or its name where it is no file."""
    path = Path(reward_model)
    if not path.is_file():
        return reward_model
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def identity(args: Any, cohorts: dict[str, Cohort], device: torch.device) -> dict[str, Any]:
    """What has to be the same for a run to go on as if it had never stopped."""
    return {
        **{name: value for name, value in plain_config(args).items() if name not in MAY_CHANGE},
        **{patients_of(name): digest(cohort) for name, cohort in cohorts.items()},
        MODEL: content_of(args.reward_model_name),
        "device type": device.type,
        "hydrogel_gym": versions()["hydrogel_gym"],
    }


def surroundings(world: World, compiled: bool) -> dict[str, Any]:
    """What may differ from the checkpoint's, at the cost of other rounding."""
    libraries = versions()
    del libraries["hydrogel_gym"]  # is part of the identity
    threads = torch.get_num_threads()
    return libraries | {"threads": threads, "ranks": world.size, "compiled": compiled}


def refuse_differences(saved: dict[str, Any] | None, here: dict[str, Any]) -> None:
    """Refuse to go on with another run than the checkpoint's, if there is one.

    Raises:
        UsageError: names what differs.
    """
    if saved is None:
        return
    saved = {k: v for k, v in saved.items() if k not in REMOVED or v != REMOVED[k]}
    if differing := differences(saved, here, "in the checkpoint"):
        raise UsageError(f"--resume: the checkpoint is of another run; {differing}")


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("hydrogel_gym", "torch", "gymnasium", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
