"""How good the presets are, and which choices matter: one change at a time, over seeds.

    python benchmark/quality/learning_quality.py --seeds 1 2 3 4 5      # an hour on two cores

Runs the trainer once per variant and seed, each on one thread, two at a time: whole presets, which
three cohorts that `patients/generate.py` draws anew evaluate too, then short runs, the quick preset
with half its samples and one change. The two pictures are of the quick preset's first run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import ORACLE_CACHE, Parser, made_by, run, table, write

from hydrogel_gym.files import write_atomically
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.patients.generate import Split, cohort_csv, draw_cohort
from hydrogel_gym.runs.command_line import run_script
from hydrogel_gym.runs.directory import CURVE_FILE, METRICS_FILE, SELECTION_FILE, SUMMARY_FILE
from hydrogel_gym.train.evaluate import Args, evaluate_saved

MILESTONE_REWARD = 29.2  # the source's final mean reward
TRUE_SAFETY = "--limit-margin 0 --penalty-scale 1"
PRESETS = {
    "quick": "--preset quick",
    "quick, compiled": "--preset quick --compile on",
    "quick, true safety limits and penalties": f"--preset quick {TRUE_SAFETY}",
    "full": "--preset full",
}
SHORT = "--preset quick --num-iterations 50"
SHORT_SEEDS = 3  # the first of those given
CHANGES = {
    "none": "",
    "factored heads": "--policy factored",
    "one learned spread per polymer": "--no-state-std",
    "no temperature: advantages of standard deviation 1": "--temperature None --ent-coef 0.01",
    "temperature 0.1": "--temperature 0.1",
    "temperature 1": "--temperature 1",
    "no baseline of the patient": "--no-patient-baseline",
    "value loss of weight 0.5, the source's": "--vf-coef 0.5",
    "rollouts of 5 steps": "--num-steps 5 --num-iterations 20",
    "learning rate 1e-3": "--learning-rate 1e-3",
    "minibatches of 500": "--minibatch-size 500",
    "2 epochs": "--num-epochs 2",
    "width 128": "--hidden-dim 128",
    "true safety limits and penalties": TRUE_SAFETY,
}
VARIANTS = PRESETS | {name: f"{SHORT} {flags}" for name, flags in CHANGES.items()}
FRESH = [Split(f"fresh-{seed}.csv", "F", 500, seed) for seed in (11, 12, 13)]
UNSEEN = "fraction_of_oracle regret_p95 deterministic_limit_breach_rate".split()
UNSEEN_HEADER = (
    *("", "seeds", "of oracle, mean of cohorts and seeds", "worst", "95th percentile, worst"),
    *("breaks a limit, mean", "worst", "largest fall", "approximate KL, median", "largest"),
    "clipped, median",
)
HEADER = (
    *("", "seeds", "samples", "reward, training", "reward, held out", "of oracle, held out"),
    *("regret, held out", "95th percentile", "breaks a limit, held out (worst seed)"),
    *("breaks a limit, training", "samples to 29.2", "seconds"),
)


def train(
    name: str, seed: int, flags: list[str], pictures: Path | None, fresh: list[Path]
) -> dict[str, Any]:
    """Figures of one run, in a process of its own, and of its policy on fresh cohorts.

    `pictures` is a folder for its pictures.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The oracle's results lie beside a run; every run shares one folder of them.
        Path(folder, "oracle").symlink_to(ORACLE_CACHE)
        output = Path(folder, "run")
        command = ["{python}", "train/ppo_hybrid.py", "--compile", "off", *VARIANTS[name].split()]
        run([*command, "--seed", seed, "--output-dir", output, *flags], threads=1)
        for picture in (CURVE_FILE, SELECTION_FILE) if pictures else ():
            write_atomically(pictures / f"quick_{picture}", (output / picture).read_bytes())
        metrics = pd.read_csv(output / METRICS_FILE)
        summary = json.loads((output / SUMMARY_FILE).read_text())
        unseen = [[summary[f"holdout_{name}"] for name in UNSEEN]]
        for cohort in fresh:
            figures = evaluate_saved(Args(output, cohort=cohort))
            unseen.append([figures[f"train_{name}"] for name in UNSEEN])
    reward = metrics["mean_reward"]
    late = metrics["global_step"] > 50_000
    return summary | {
        "samples_to_milestone": samples_to(metrics, MILESTONE_REWARD),
        "unseen": unseen,
        "fall": (reward.cummax() - reward)[late].max(),
        "kl": metrics["approx_kl"][late].median(),
        "max_kl": metrics["approx_kl"][late].max(),
        "clipped": metrics["clipfrac"][late].median(),
    }


def samples_to(metrics: pd.DataFrame, reward: float) -> float:
    """Samples until the training cohort's mean reward is reached; NaN where it is not."""
    return metrics.loc[metrics["train_deterministic_reward"] >= reward, "global_step"].min()


def row(name: str, runs: pd.DataFrame) -> list[str]:
    """Means of a variant over its seeds."""
    mean = runs.mean(numeric_only=True)
    breach = 100 * runs["holdout_deterministic_limit_breach_rate"]
    spread = f" ± {runs['holdout_regret'].std():.3f}" if len(runs) > 1 else ""
    milestone = runs["samples_to_milestone"].max(skipna=False) / 1e6  # of the slowest
    cells = [name, str(len(runs)), f"{mean['samples'] / 1e6:.1f} M"]
    cells += [f"{mean[f'{cohort}_deterministic_reward']:.2f}" for cohort in ("train", "holdout")]
    cells += [f"{100 * mean['holdout_fraction_of_oracle']:.2f} %"]
    cells += [f"{mean['holdout_regret']:.3f}{spread}", f"{mean['holdout_regret_p95']:.2f}"]
    cells += [f"{breach.mean():.2f} % ({breach.max():.1f} %)"]
    cells += [f"{100 * mean['train_deterministic_limit_breach_rate']:.2f} %"]
    cells += ["–" if pd.isna(milestone) else f"{milestone:.2f} M", f"{mean['wall_seconds']:.0f}"]
    return cells


def unseen_row(name: str, runs: pd.DataFrame) -> list[str]:
    """A preset on the held-out and the fresh cohorts, and how its runs went on the way."""
    fraction, p95, breach = np.array(runs["unseen"].tolist()).reshape(-1, len(UNSEEN)).T
    return [
        name,
        str(len(runs)),
        f"{100 * fraction.mean():.2f} %",
        f"{100 * fraction.min():.2f} %",
        f"{p95.max():.2f}",
        f"{100 * breach.mean():.2f} %",
        f"{100 * breach.max():.1f} %",
        f"{runs['fall'].max():.2f}",
        f"{runs['kl'].median():.2f}",
        f"{runs['max_kl'].max():.2f}",
        f"{100 * runs['clipped'].median():.0f} %",
    ]


def main(argv: list[str] | None = None) -> None:
    """Run every variant, and write the tables."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--seeds", type=int, nargs="+", default=[1, 2, 3], help="a run of each variant for each")
    flag("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="which")
    flag("--flags", default="", help="more flags of the trainer, in one word")
    args = parser.parse_args(argv)
    # Before the runs, so that they find its results instead of searching all at once.
    fresh = [ORACLE_CACHE / split.file for split in FRESH]
    for split, path in zip(FRESH, fresh, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, cohort_csv(draw_cohort(split).patients))
        best_designs(path, cache_dir=ORACLE_CACHE, progress=True)
    jobs = [
        (name, seed)
        for number, seed in enumerate(args.seeds)
        for name in args.variants
        if name in PRESETS or number < SHORT_SEEDS
    ]

    def figures(job: tuple[str, int]) -> dict[str, Any]:
        pictures = args.output_dir if job == ("quick", 1) else None
        also = fresh if job[0] in PRESETS else []
        return {"variant": job[0]} | train(*job, args.flags.split(), pictures, also)

    with ThreadPoolExecutor(2) as pool:
        rows = pd.DataFrame(tqdm(pool.map(figures, jobs), total=len(jobs), unit="run"))
    lines = [
        "Deterministic policy, mean over the seeds, ± standard deviation for the regret; one "
        "thread per run, two runs at a time.",
    ]
    short = "Short runs: the quick preset with half its samples, and one change"
    for title, names in (("Presets", PRESETS), (short, CHANGES)):
        groups = [(name, rows[rows["variant"] == name]) for name in names]
        shown = [row(name, runs) for name, runs in groups if len(runs)]
        lines += ["", f"## {title}", "", *table(HEADER, shown)]
        if names is PRESETS:
            shown = [unseen_row(name, runs) for name, runs in groups if len(runs)]
            lines += ["", "## Presets on four unseen cohorts", "", *table(UNSEEN_HEADER, shown)]
    lines += [
        "",
        "Unseen are the held-out cohort and three of 500 patients that `patients/generate.py` "
        "draws from other seeds. After 50,000 samples: largest fall of an iteration's mean reward "
        "below the best before; approximate KL divergence and clipped ratios of an iteration.",
        "",
        "Samples to 29.2: of the slowest seed, until the mean reward on the training cohort first "
        "reached the source's final mean, looked at after each iteration.",
    ]
    write(args.output_dir, "learning_quality", lines, made=made_by(1))


if __name__ == "__main__":
    sys.exit(run_script(main))
