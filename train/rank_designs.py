"""What Stage 3 reads: the best designs of every patient, with what may go wrong with them.

    python train/rank_designs.py runs/quick-s1/designs

Takes the top designs that `generate_candidates.py` has left for each patient and writes, beside
them, `ranked_designs.parquet` and `ranked_designs.csv` (a row per design, the best of each patient
first) and `stage2_complete.pt` (policy, optimiser, configuration, measured figures and the designs,
as plain types that `torch.load(..., weights_only=True)` reads). `hydrogel_gym.designs.schema`
describes the columns. Outcomes are predictions of the reward model for virtual patients, and no
clinical fact.
"""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from tqdm import tqdm

from hydrogel_gym.designs import load_designs
from hydrogel_gym.designs.ranking import pareto_rank, robustness, safety_margins, window_distance
from hydrogel_gym.designs.schema import (
    FORMULATION_COLUMNS,
    RANKED_FILE,
    RANKED_SCHEMA,
    columns_of,
    ranked_parquet,
)
from hydrogel_gym.designs.store import MANIFEST
from hydrogel_gym.errors import UsageError, differences, first_line
from hydrogel_gym.files import write_atomically
from hydrogel_gym.models.mechanistic import MechanisticModel
from hydrogel_gym.problem.cohort import Cohort
from hydrogel_gym.problem.fields import COVERAGES, Design, Outcomes
from hydrogel_gym.problem.polymers import load_polymers
from hydrogel_gym.runs.checkpoints import newest_checkpoint, unseal
from hydrogel_gym.runs.command_line import read_command_line, run_script
from hydrogel_gym.runs.designing import environments, origin, problem_and_patients
from hydrogel_gym.runs.directory import SUMMARY_FILE
from hydrogel_gym.runs.policies import load_policy, policy_path
from hydrogel_gym.train.ppo_hybrid import Agent

COMPLETE = "stage2_complete.pt"


@dataclass
class Args:
    """Rank the designs of every patient for Stage 3."""

    designs: tyro.conf.Positional[Path]
    """what `generate_candidates.py` wrote"""
    policy: Path | None = None
    """the run directory, or its `stage2_policy.pt`; the folder around the designs by default"""
    cohort: Path | None = None
    """whose patients; those that the policy was trained on by default"""
    reward_model: str | None = None
    """Stage-1 model that evaluates; the one that the policy was trained on by default"""


@torch.no_grad()
def ranked(designs: pd.DataFrame, cohort: Cohort, problem: Any) -> pd.DataFrame:
    """The table of ranked designs.

    Args:
        designs: the top designs, as `load_designs` gives them.
        cohort: the patients.
        problem: reward model and limits.
    """
    model, config = problem.reward_model, problem.params.reward_config
    polymers, mechanistic = load_polymers(), MechanisticModel()
    tables = []
    for patient_id, table in tqdm(designs.groupby("patient_id", sort=False), unit="patient"):
        design = Design(
            torch.tensor(table["polymer_id"].to_numpy(), dtype=torch.int64),
            torch.tensor(table[list(FORMULATION_COLUMNS)].to_numpy()),
            torch.tensor([COVERAGES.index(name) for name in table["coverage"]]),
        )
        patient = problem.params.patients[cohort.index(patient_id)].float()
        patient = patient.expand(len(table), -1)
        outcomes = Outcomes(*model(patient, *design))
        worst, mean = robustness(patient, design, model, config)
        columns = {
            **safety_margins(outcomes, config),
            "feasibility": mechanistic.feasibility(design.polymer_id, design.formulation),
            "window_distance": window_distance(design, polymers),
            "reward_worst_5pct": worst,
            "reward_mean_5pct": mean,
            "pareto_rank": pareto_rank(outcomes),
        }
        table = table.assign(
            rank=range(1, len(table) + 1), **{name: x.numpy() for name, x in columns.items()}
        )
        tables.append(table[list(columns_of(RANKED_SCHEMA))])
    return pd.concat(tables, ignore_index=True)


def complete(run_dir: Path, policy: dict[str, Any], table: pd.DataFrame) -> dict[str, Any]:
    """Content of `stage2_complete.pt`, under the source's keys.

    What the run directory lacks (the optimiser without a checkpoint, figures of a run that has not
    ended) is None.
    """
    sealed = newest_checkpoint(run_dir)
    optimizer = unseal(sealed)["optimizer_state_dict"] if sealed else None
    summary = run_dir / SUMMARY_FILE
    kept = ("polymer_id", "polymer_name", "coverage", "predicted_delta_EF", "reward")
    plain = table.astype({"polymer_name": str, "coverage": str})
    return {
        "format": "hydrogel_gym.stage2_complete.v1",
        "policy_state_dict": policy["policy_state_dict"],
        "architecture": policy["architecture"],
        "optimizer_state_dict": optimizer,
        "training_config": policy["training_config"],
        "final_metrics": json.loads(summary.read_text()) if summary.exists() else None,
        "per_patient_designs": {
            patient_id: [
                {name: row[name] for name in kept}
                | {"formulation": [row[name] for name in FORMULATION_COLUMNS]}
                for row in rows.to_dict("records")
            ]
            for patient_id, rows in plain.groupby("patient_id", sort=False)
        },
    }


def rank(args: Args) -> list[Path]:
    """Rank, and write; returns what was written.

    Raises:
        UsageError: it cannot be done as requested.
        OSError: a file cannot be written.
    """
    path = policy_path(args.policy or Path(os.path.realpath(args.designs)).parent)
    _, saved = load_policy(path, Agent, "cpu")
    options, cohort = problem_and_patients(saved, args.cohort, args.reward_model)
    try:
        manifest = json.loads((args.designs / MANIFEST).read_text())
        designs = load_designs(args.designs)
    except (OSError, ValueError) as error:
        raise UsageError(f"{args.designs}: {first_line(error)}") from error
    here = origin(path, options, cohort)
    there = {name: manifest.get(name) for name in here}
    if differing := differences(there, here, "there"):
        raise UsageError(
            f"{args.designs} is of another policy, cohort or reward model ({differing})"
        )
    envs = environments(saved, options, cohort, torch.device("cpu"))
    table = ranked(designs, cohort, envs.unwrapped.problem)
    archive = io.BytesIO()
    torch.save(complete(path.parent, saved, table), archive)
    content = {
        args.designs / RANKED_FILE: ranked_parquet(table),
        (args.designs / RANKED_FILE).with_suffix(".csv"): table.to_csv(index=False).encode(),
        args.designs / COMPLETE: archive.getvalue(),
    }
    for file, data in content.items():
        write_atomically(file, data)
    return list(content)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""

    def body() -> None:
        for path in rank(read_command_line(Args, argv, prog="rank_designs.py")):
            print(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)")

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())
