"""The learning curve of the source preset beside the source's own table.

    python benchmark/source_preset.py                           # trains: an hour or more
    python benchmark/source_preset.py --run-dir runs/source-s1  # from a finished run

Writes `source_preset.csv`, `.md` and `.png` in `results/`. The source's reward model is not ours:
only the shape of the curve and what it cost can be compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from hydrogel_gym.runs.directory import CONFIG_FILE, CURVE_FILE, METRICS_FILE, SUMMARY_FILE

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
# HYDRA-BERT Stage-2 document, section 6.1: iteration, mean reward, maximum, entropy.
SOURCE = [
    (0, 12.4, 28.3, 1.42),
    (20, 18.7, 31.2, 1.28),
    (50, 23.1, 33.8, 1.15),
    (100, 26.8, 35.2, 0.98),
    (150, 28.4, 36.1, 0.85),
    (200, 29.2, 36.5, 0.72),
]
EVALUATED = ("train_deterministic_reward", "holdout_deterministic_reward", "wall_seconds")


def table(metrics: pd.DataFrame, summary: dict[str, Any], batch_size: int) -> pd.DataFrame:
    """A row per line of the source's table.

    Args:
        metrics: of our run, by iteration.
        summary: of our run.
        batch_size: samples of an iteration.
    """
    rows = []
    for iteration, mean, maximum, entropy in SOURCE:
        # Row k + 1 has the rollout of the policy after k updates, and the evaluation after one
        # more; the summary has both for the final policy.
        ours = summary if iteration >= summary["iterations"] else metrics.loc[iteration + 1]
        rows.append(
            {
                "iteration": iteration,
                "samples": iteration * batch_size,
                "source_mean_reward": mean,
                "mean_reward": ours["mean_reward"],
                "source_max_reward": maximum,
                "max_reward": ours["max_reward"],
                "source_entropy": entropy,
                "entropy": ours["entropy"],
                "optimal_rate": ours["optimal_rate"],
                # Not measured before the first update.
                **metrics.reindex([iteration])[list(EVALUATED)].iloc[0],
            }
        )
    return pd.DataFrame(rows)


def markdown(rows: pd.DataFrame, summary: dict[str, Any], config: dict[str, Any]) -> str:
    """The report."""
    lines = [
        f"Source preset, seed {summary['seed']}, {config['policy']} heads, precision "
        f"{config['precision']}, {summary['device']} with {summary['threads']} threads, "
        f"{summary['wall_seconds'] / 60:.0f} minutes; made by `benchmark/source_preset.py`. "
        "Of two columns under one heading the first is the source's, the second ours.",
        "",
        "| iteration | samples | mean reward | | max reward | | entropy | | optimal rate | "
        "deterministic, training | held out |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.to_dict("records"):
        evaluated = " | ".join("–" if pd.isna(x := row[k]) else f"{x:.2f}" for k in EVALUATED[:2])
        lines.append(
            f"| {row['iteration']} | {row['samples'] / 1e6:g} M | {row['source_mean_reward']} | "
            f"{row['mean_reward']:.1f} | {row['source_max_reward']} | {row['max_reward']:.1f} | "
            f"{row['source_entropy']} | {row['entropy']:.2f} | {100 * row['optimal_rate']:.0f} % | "
            f"{evaluated} |"
        )
    lines.append("")
    lines.append(
        "Our entropy adds a differential entropy of the formulation, which may be negative, to "
        "those of the two categorical heads; the source does not say what its figure counts."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train if need be, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, help="a finished run of the source preset")
    parser.add_argument("--precision", default="bf16", help="of the run, if it is to be made")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    args = parser.parse_args()
    run_dir = args.run_dir or Path("runs/source-s1")
    if args.run_dir is None:
        command = [sys.executable, str(ROOT / "train" / "ppo_hybrid.py"), "--preset", "source"]
        command += ["--precision", args.precision, "--output-dir", str(run_dir)]
        subprocess.run(command, check=True)
    summary = json.loads((run_dir / SUMMARY_FILE).read_text())
    config = json.loads((run_dir / CONFIG_FILE).read_text())
    if summary["interrupted"] or summary["preset"] != "source":
        raise SystemExit(f"{run_dir} is not a finished run of the source preset")
    metrics = pd.read_csv(run_dir / METRICS_FILE).set_index("iteration")
    rows = table(metrics, summary, config["num_envs"] * config["num_steps"])
    text = markdown(rows, summary, config)
    rows.to_csv(args.output_dir / "source_preset.csv", index=False)
    (args.output_dir / "source_preset.png").write_bytes((run_dir / CURVE_FILE).read_bytes())
    (args.output_dir / "source_preset.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
