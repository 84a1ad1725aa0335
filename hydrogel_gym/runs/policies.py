"""Files of trained policies: weights and plain types, read without running code."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from hydrogel_gym.archives import check_state, load_archive
from hydrogel_gym.errors import UsageError, first_line
from hydrogel_gym.files import write_atomically
from hydrogel_gym.problem.polymers import load_polymers
from hydrogel_gym.runs.directory import POLICY_FILE
from hydrogel_gym.runs.identity import versions

FORMAT = "hydrogel_gym.stage2_policy.v2"
Agent = TypeVar("Agent", bound=nn.Module)


def save_policy(
    path: Path,
    agent: nn.Module,
    architecture: dict[str, Any],
    config: dict[str, Any],
    origin: dict[str, str],
    regret_calibration: dict[str, Any] | None = None,
) -> None:
    """Write a policy: all that `load_policy` needs.

    Args:
        path: where.
        agent: the policy.
        architecture: its arguments, of plain types.
        config: settings of its training, of plain types.
        origin: digests of what it was trained on, by the names of `identity.ORIGIN`.
        regret_calibration: an `uncertainty.Calibration` as a dict; None without an oracle.
    """
    buffer = io.BytesIO()
    torch.save(
        {
            "format": FORMAT,
            "architecture": architecture,
            "policy_state_dict": {k: v.detach().cpu() for k, v in agent.state_dict().items()},
            "training_config": config,
            "origin": origin,
            "regret_calibration": regret_calibration,
            "polymers": list(load_polymers().names),
            "versions": versions(),
        },
        buffer,
    )
    write_atomically(path, buffer.getvalue())


def load_policy(
    path: Path, make: Callable[..., Agent], device: str | torch.device
) -> tuple[Agent, dict[str, Any]]:
    """Rebuild a saved policy; returns it and the whole content of the file.

    Args:
        path: what `save_policy` wrote.
        make: the policy's class.
        device: where to.

    Raises:
        UsageError: the file is missing or is not a policy of this project.
    """
    if not path.is_file():
        raise UsageError(f"policy {path}: no such file")
    try:
        saved = load_archive(path)
        if saved["format"] != FORMAT:
            raise ValueError(f"format {saved['format']!r}")
        if saved["polymers"] != list(load_polymers().names):
            raise ValueError("it was trained on another polymer table")
        with torch.device("meta"):  # of the size that the file claims
            expected = make(**saved["architecture"]).state_dict()
        check_state(saved["policy_state_dict"], expected, path.stat().st_size)
        agent = make(**saved["architecture"])
        agent.load_state_dict(saved["policy_state_dict"])
    except Exception as error:
        raise UsageError(f"policy {path} cannot be used: {first_line(error)}") from error
    return agent.to(device), saved


def agent_of(
    checkpoint: dict[str, Any], make: Callable[..., Agent], device: str | torch.device
) -> Agent:
    """The policy of a checkpoint's content.

    Raises:
        UsageError: it is of another version.
    """
    try:
        agent = make(**checkpoint["architecture"])
        agent.load_state_dict(checkpoint["policy_state_dict"])
    except (RuntimeError, TypeError, KeyError) as error:
        raise UsageError(f"the checkpoint is of another version: {first_line(error)}") from error
    return agent.to(device)


def policy_path(given: Path, flag: str = "--policy") -> Path:
    """File of the policy that a run directory contains, or that is given.

    Raises:
        UsageError: there is none.
    """
    path = given / POLICY_FILE if given.is_dir() or not given.suffix else given
    if not path.exists():
        raise UsageError(
            f"{flag} {given}: there is no {path}; `python train/ppo_hybrid.py --preset quick` "
            "trains one in a minute"
        )
    return path
