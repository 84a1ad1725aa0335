"""A trained policy's designs for new patients: without a call to choose, or the best of samples."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hydrogel_gym.problem import dynamics
from hydrogel_gym.problem.fields import Design
from hydrogel_gym.runs import policies
from hydrogel_gym.runs.directory import POLICY_FILE, SUMMARY_FILE
from hydrogel_gym.train.ppo_hybrid import Agent


@dataclass(frozen=True)
class TrainedPolicy:
    """A policy and what its training cost.

    Attributes:
        run_dir: the trainer's run directory.
        agent: the network.
        horizon: steps per episode it was trained for; only its first design is used here.
        summary: content of the run's `summary.json`.
    """

    run_dir: Path
    agent: Agent
    horizon: int
    summary: dict[str, Any]

    @torch.no_grad()
    def propose(self, patients: Tensor, generator: torch.Generator | None = None) -> Design:
        """One design for each of (B, 11) patients at the start of an episode.

        Sampled by the generator; deterministic without one.
        """
        params = dynamics.EnvParams(patients.to(torch.float32), horizon=self.horizon)
        state = dynamics.initial(torch.zeros(len(patients), dtype=torch.int64), params)
        design, _ = self.agent.design(dynamics.observation(state, params), generator)
        return Design(**design)

    def best_of(self, patient: Tensor, num_designs: int, seed: int) -> Design:
        """The deterministic design of one (11,) patient, then `num_designs - 1` samples.

        The deterministic design comes first because it is what one would try first: the trace of
        the best so far then starts at the zero-shot policy.
        """
        generator = torch.Generator().manual_seed(seed)
        first = self.propose(patient[None])
        samples = self.propose(patient.expand(num_designs - 1, -1), generator)
        return Design(*(torch.cat(parts) for parts in zip(first, samples, strict=True)))


def load_policy(run_dir: Path) -> TrainedPolicy:
    """Read a finished run of the trainer.

    Raises:
        ValueError: the directory does not contain one; the message names what is missing.
    """
    try:
        summary = json.loads((run_dir / SUMMARY_FILE).read_text())
        agent, saved = policies.load_policy(run_dir / POLICY_FILE, Agent, "cpu")
        if summary["interrupted"]:
            raise ValueError("it was interrupted")
        for name in ("samples", "wall_seconds"):
            float(summary[name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"policy {run_dir} is not a finished run of train/ppo_hybrid.py: "
            f"{type(error).__name__}: {error}"
        ) from error
    return TrainedPolicy(run_dir, agent.eval(), saved["training_config"]["horizon"], summary)
