"""A trained policy's designs for new patients: without a call to choose, or the best of samples.

The policy is read by its trainer, `train/ppo_hybrid.py`, which is loaded from its path because it
is a script and no part of the package.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hydrogel_gym.problem import dynamics
from hydrogel_gym.problem.fields import Design

TRAINER = Path(__file__).parents[2] / "train" / "ppo_hybrid.py"


def load_trainer() -> ModuleType:
    """The trainer's module, loaded once."""
    name = TRAINER.stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TRAINER)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    return sys.modules[name]


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
    agent: Any
    horizon: int
    summary: dict[str, Any]

    @torch.no_grad()
    def propose(
        self, patients: Tensor, *, deterministic: bool, generator: torch.Generator | None = None
    ) -> Design:
        """One design for each of (B, 11) patients, at the start of an episode."""
        params = dynamics.EnvParams(patients.to(torch.float32), horizon=self.horizon)
        state = dynamics.initial(torch.zeros(len(patients), dtype=torch.int64), params)
        noise = None
        if not deterministic:
            noise = load_trainer().draw_noise(
                len(patients), formulation_dim=self.agent.formulation_dim, generator=generator
            )
        output = self.agent(dynamics.observation(state, params), noise=noise)
        return Design(**self.agent.to_env(output.action))

    def best_of(self, patient: Tensor, num_designs: int, seed: int) -> Design:
        """The deterministic design of one (11,) patient, then `num_designs - 1` samples.

        The deterministic design comes first because it is what one would try first: the trace of
        the best so far then starts at the zero-shot policy.
        """
        generator = torch.Generator().manual_seed(seed)
        first = self.propose(patient[None], deterministic=True)
        samples = self.propose(
            patient.expand(num_designs - 1, -1), deterministic=False, generator=generator
        )
        return Design(*(torch.cat(parts) for parts in zip(first, samples, strict=True)))


def load_policy(run_dir: Path) -> TrainedPolicy:
    """Read a finished run of the trainer.

    Raises:
        ValueError: the directory does not hold one; the message names what is missing.
    """
    trainer = load_trainer()
    try:
        summary = json.loads((run_dir / trainer.SUMMARY_FILE).read_text())
        agent, saved = trainer.load_policy(run_dir / trainer.POLICY_FILE, "cpu")
        if summary["interrupted"]:
            raise ValueError("it was interrupted")
        for name in ("samples", "wall_seconds"):
            float(summary[name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"policy {run_dir} is not a finished run of train/ppo_hybrid.py: "
            f"{type(error).__name__}: {error}"
        ) from error
    horizon = saved["training_config"]["horizon"]
    return TrainedPolicy(run_dir, agent.eval(), horizon, summary)
