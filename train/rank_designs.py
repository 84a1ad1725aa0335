"""What Stage 3 reads: the best designs of every patient, with what may go wrong with them.

    python train/rank_designs.py runs/quick-s1/designs

Takes the top designs that `generate_candidates.py` has left for each patient and writes, beside
them, `designs.parquet` and `designs.csv` (a row per design, the best of each patient first) and
`stage2_complete.pt` (policy, optimiser, configuration, measured figures and the designs, as plain
types that `torch.load(..., weights_only=True)` reads). `COLUMNS` describes the columns. Outcomes
are predictions of the reward model for virtual patients, and no clinical fact.
"""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import generate_candidates
import gymnasium as gym
import pandas as pd
import ppo_hybrid
import pyarrow as pa
import torch
import tyro
from generate_candidates import MANIFEST
from ppo_hybrid import UsageError
from pyarrow import parquet as pq
from tqdm import tqdm

import hydrogel_gym
from hydrogel_gym.designs import load_designs
from hydrogel_gym.designs.ranking import pareto_rank, robustness, safety_margins, window_distance
from hydrogel_gym.designs.schema import FORMULATION_COLUMNS
from hydrogel_gym.files import write_atomically
from hydrogel_gym.models.mechanistic import MechanisticModel
from hydrogel_gym.problem.fields import COVERAGES, Design, Outcomes

SCHEMA = "hydrogel_gym.ranked_designs.v1"
# The first twelve are the source's, section 5.2.
COLUMNS = {
    "patient_id": "virtual patient",
    "polymer_id": "row of the polymer table",
    "polymer_name": "its name",
    "stiffness_kPa": "requested, kPa",
    "degradation_days": "requested half-life, days",
    "conductivity_S_m": "requested, S/m",
    "thickness_mm": "of the patch, mm",
    "coverage": "what the patch covers: the scar and a share of the border zone",
    "predicted_delta_EF": "predicted change in ejection fraction, percentage points",
    "predicted_stress_reduction": "predicted, of border-zone stress, %",
    "optimal_probability": "predicted probability that the design is optimal, 0 to 1",
    "reward": "of the design as a first step, dimensionless",
    "rank": "among the patient's designs by reward; from 1",
    "toxicity_risk": "predicted, 0 to 1",
    "structural_integrity": "predicted, 0 to 1",
    "fibrosis_risk": "predicted, 0 to 1",
    "toxicity_margin": "limit less risk; below 0 the limit is broken",
    "integrity_margin": "integrity less limit; below 0 the limit is broken",
    "fibrosis_margin": "limit less risk; below 0 the limit is broken",
    "feasibility": "how nearly the polymer can be made as requested, 0 to 1; 1 within its windows",
    "window_distance": "to the nearest edge of the polymer's windows, share of a whole range",
    "reward_worst_5pct": "worst reward if each parameter may be missed by 5 %",
    "reward_mean_5pct": "mean reward over the same 81 cases",
    "pareto_rank": "1 if none of the patient's designs is better in gain, relief and both risks",
}


@dataclass
class Args:
    """Rank the designs of every patient for Stage 3."""

    designs: tyro.conf.Positional[Path]
    """what `generate_candidates.py` wrote"""
    policy: Path | None = None
    """the run directory, or its `stage2_policy.pt`; the folder around the designs by default"""
    cohort: Path | None = None
    """whose patients; those that the policy was trained on by default"""


@torch.no_grad()
def ranked(designs: pd.DataFrame, cohort: Any, problem: Any) -> pd.DataFrame:
    """The table of `COLUMNS`.

    Args:
        designs: the top designs, as `load_designs` gives them.
        cohort: the patients.
        problem: reward model and limits.
    """
    model, config = problem.reward_model, problem.params.reward_config
    polymers, mechanistic = hydrogel_gym.load_polymers(), MechanisticModel()
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
        tables.append(table[list(COLUMNS)])
    return pd.concat(tables, ignore_index=True)


def complete(run_dir: Path, policy: dict[str, Any], table: pd.DataFrame) -> dict[str, Any]:
    """Content of `stage2_complete.pt`, under the source's keys.

    What the run directory lacks (the optimiser without a checkpoint, figures of a run that has not
    ended) is None.
    """
    sealed = ppo_hybrid.newest_checkpoint(run_dir)
    optimizer = ppo_hybrid.unseal(sealed)["optimizer_state_dict"] if sealed else None
    summary = run_dir / "summary.json"
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
        UsageError: it cannot be done as asked.
    """
    path = args.policy or args.designs.resolve().parent
    path = path / "stage2_policy.pt" if path.is_dir() else path
    agent, saved = ppo_hybrid.load_policy(path, "cpu")
    trained = saved["training_config"]
    cohort = hydrogel_gym.load_cohort(args.cohort or trained["cohort"])
    try:
        manifest = json.loads((args.designs / MANIFEST).read_text())
        designs = load_designs(args.designs)
    except (OSError, ValueError) as error:
        raise UsageError(f"{args.designs}: {ppo_hybrid.reason(error)}") from error
    here = generate_candidates.origin(path, cohort)
    if differing := ppo_hybrid.differences({name: manifest.get(name) for name in here}, here):
        differing = differing.replace("in the checkpoint", "there")
        raise UsageError(f"{args.designs} is of another policy or cohort ({differing})")
    envs = generate_candidates.environments(trained, cohort, torch.device("cpu"))
    table = ranked(designs, cohort, envs.unwrapped.problem)

    folder = args.designs
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    arrow = arrow.replace_schema_metadata({"hydrogel_gym": SCHEMA, "columns": json.dumps(COLUMNS)})
    buffer, archive = pa.BufferOutputStream(), io.BytesIO()
    pq.write_table(arrow, buffer, compression="zstd")
    torch.save(complete(path.parent, saved, table), archive)
    content = {
        "designs.parquet": buffer.getvalue(),
        "designs.csv": table.to_csv(index=False).encode(),
        "stage2_complete.pt": archive.getvalue(),
    }
    for name, data in content.items():
        write_atomically(folder / name, data)
    return [folder / name for name in content]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        paths = rank(ppo_hybrid.read_command_line(Args, args=argv, prog="rank_designs.py"))
    except (UsageError, hydrogel_gym.CohortError, gym.error.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in paths:
        print(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
