"""What the quick preset reaches: heads, value clipping and precision, over seeds.

    python benchmark/quick_preset.py --seeds 1 2 3

Runs the trainer once per variant and seed, alternating, and writes `results/quick_preset.csv` and
`.md`, and the two pictures of the first run. About a minute and a half a run on two cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
VARIANTS = {
    "autoregressive (default)": [],
    "autoregressive, clipped value loss": ["--clip-vloss"],
    "autoregressive, bf16": ["--precision", "bf16"],
    "factored": ["--policy", "factored"],
}
COLUMNS = (
    "train_deterministic_reward",
    "holdout_deterministic_reward",
    "mean_reward",
    "holdout_deterministic_optimal_rate",
    "holdout_deterministic_limit_breach_rate",
    "samples",
    "wall_seconds",
)


def run(flags: list[str], seed: int, *, keep_pictures: bool) -> dict[str, float]:
    """Figures of one run of the quick preset."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train" / "ppo_hybrid.py"), "--preset", "quick"]
        command += ["--seed", str(seed), "--output-dir", f"{folder}/run", *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
        if keep_pictures:
            for name in ("learning_curve", "policy_selection"):
                shutil.copy(f"{folder}/run/{name}.png", RESULTS / f"quick_{name}.png")
    return {name: summary[name] for name in COLUMNS} | {"threads": summary["threads"]}


def main() -> None:
    """Run every variant and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    rows: list[dict[str, float]] = []
    for seed in args.seeds:
        for variant in args.variants:
            figures = run(VARIANTS[variant], seed, keep_pictures=not rows)
            rows.append({"variant": variant, "seed": seed} | figures)
    table = pd.DataFrame(rows)
    table.to_csv(RESULTS / "quick_preset.csv", index=False)
    lines = [
        f"Quick preset, mean ± standard deviation over the seeds {args.seeds}, "
        f"CPU with {rows[0]['threads']} threads; made by `benchmark/quick_preset.py`.",
        "",
        "| variant | training cohort | held-out cohort | sampled | breaks a safety limit | "
        "samples | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, group in table.groupby("variant", sort=False):
        mean, std = group.mean(numeric_only=True), group.std(numeric_only=True)
        rewards = " | ".join(f"{mean[name]:.2f} ± {std[name]:.2f}" for name in COLUMNS[:3])
        breach = mean["holdout_deterministic_limit_breach_rate"]
        lines.append(
            f"| {variant} | {rewards} | {100 * breach:.1f} % | "
            f"{mean['samples'] / 1e6:.1f} M | {mean['wall_seconds']:.0f} |"
        )
    (RESULTS / "quick_preset.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
