"""The learning curve of the source preset beside the source's own table.

    python benchmark/quality/source_preset.py                           # trains: an hour or more
    python benchmark/quality/source_preset.py --run-dir runs/source-s1  # of a finished run

The source's reward model is not ours: only the shape of the curve and what it cost can be compared.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import ROOT, Parser, made_by, run, table, write

from hydrogel_gym.errors import UsageError
from hydrogel_gym.runs.command_line import run_script
from hydrogel_gym.runs.directory import CONFIG_FILE, CURVE_FILE, METRICS_FILE, SUMMARY_FILE

# HYDRA-BERT Stage-2 document, section 6.1: iteration, mean reward, maximum, entropy.
SOURCE = [
    (0, 12.4, 28.3, 1.42),
    (20, 18.7, 31.2, 1.28),
    (50, 23.1, 33.8, 1.15),
    (100, 26.8, 35.2, 0.98),
    (150, 28.4, 36.1, 0.85),
    (200, 29.2, 36.5, 0.72),
]


def main(argv: list[str] | None = None) -> None:
    """Train if need be, and write table and picture."""
    parser = Parser(__doc__)
    parser.add_argument("--run-dir", type=Path, help="a finished run of the source preset")
    parser.add_argument("--precision", default="bf16", help="of the run, if it is to be made")
    args = parser.parse_args(argv)
    run_dir = args.run_dir or ROOT / "runs" / "source-s1"
    if args.run_dir is None:
        command = ["{python}", "train/ppo_hybrid.py", "--preset", "source"]
        run([*command, "--precision", args.precision, "--output-dir", run_dir])
    summary = json.loads((run_dir / SUMMARY_FILE).read_text())
    config = json.loads((run_dir / CONFIG_FILE).read_text())
    if summary["interrupted"] or summary["preset"] != "source":
        raise UsageError(f"{run_dir} is not a finished run of the source preset")
    metrics, rows = pd.read_csv(run_dir / METRICS_FILE).set_index("iteration"), []
    for iteration, mean, maximum, entropy in SOURCE:
        # Row k + 1 has the rollout of the policy after k updates, and the evaluation after one
        # more; the summary has both for the final policy.
        ours = summary if iteration >= summary["iterations"] else metrics.loc[iteration + 1]
        evaluated = "–", "–"  # before the first update
        if iteration in metrics.index:
            columns = [f"{name}_deterministic_reward" for name in ("train", "holdout")]
            evaluated = (f"{metrics.loc[iteration, column]:.2f}" for column in columns)
        samples = iteration * config["num_envs"] * config["num_steps"]
        row = [iteration, f"{samples / 1e6:g} M", mean, f"{ours['mean_reward']:.1f}", maximum]
        row += [f"{ours['max_reward']:.1f}", entropy, f"{ours['entropy']:.2f}"]
        rows.append([*row, f"{100 * ours['optimal_rate']:.0f} %", *evaluated])
    columns = ["iteration", "samples", "mean reward", "", "max reward", "", "entropy", ""]
    lines = [
        f"Source preset, seed {summary['seed']}, {config['policy']} heads, precision "
        f"{config['precision']}, {summary['device']} with {summary['threads']} threads, "
        f"{summary['wall_seconds'] / 60:.0f} minutes. "
        "Of two columns under one heading the first is the source's, the second ours.",
        "",
        *table([*columns, "optimal rate", "deterministic, training", "held out"], rows),
        "",
        "Our entropy adds a differential entropy of the formulation, which may be negative, to "
        "those of the two categorical heads; the source does not say what its figure counts.",
    ]
    curve, made = (run_dir / CURVE_FILE).read_bytes(), made_by(summary["threads"])
    write(args.output_dir, "source_preset", lines, curve, made)


if __name__ == "__main__":
    sys.exit(run_script(main))
