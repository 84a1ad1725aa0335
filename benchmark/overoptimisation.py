"""Whether a policy is fooled by a fitted Stage 1: true reward by pessimism and length of training.

    python benchmark/overoptimisation.py                     # some 40 minutes on two cores
    python benchmark/overoptimisation.py --seeds 1 --only made

Two tables of synthetic outcomes, both by `patients/make_outcomes.py`, whose truth is the
mechanistic model: `whole`, formulations from all over the action space, and `made`, of these the
rows that ask of a polymer what it can be made with, as a laboratory's table would. An ensemble is
fitted to each; policies are trained on nothing else, with several values of `--pessimism`, and on
one network in place of the ensemble; and every iteration is evaluated by the truth on the held-out
patients. Long runs have three times the iterations of the quick preset. Writes
`results/overoptimisation.csv`, `.md` and `.png`; needs `pip install -e ".[train,stage1]"`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from tqdm import tqdm
from trainers.launch import machine

from hydrogel_gym import load_polymers
from hydrogel_gym.files import write_atomically
from hydrogel_gym.models.ensemble import DEFAULT_PESSIMISM, load_stage1, save_stage1

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
TABLES = {
    "whole": "all over the action space",
    "made": "what the polymers can be made with",
}
PESSIMISM = (0.0, DEFAULT_PESSIMISM, 1.0)
ONE_NETWORK = "one network"
QUICK_ITERATIONS, LONG = 100, 3
WANTED = 95.0  # % of the true oracle


class Run(NamedTuple):
    """A policy to train."""

    table: str
    reward: str  # a value of --pessimism, or `ONE_NETWORK`
    seed: int
    iterations: int

    @property
    def name(self) -> str:
        """Of its run directory."""
        reward = self.reward.replace(" ", "-")
        return f"{self.table}-{reward}-s{self.seed}-{self.iterations}"


def what_can_be_made(table: pd.DataFrame) -> pd.DataFrame:
    """The rows whose request is within the polymer's windows, or near enough to be tried."""
    polymers = load_polymers()
    row = table["polymer_name"].astype(str).map({name: i for i, name in enumerate(polymers.names)})
    kept = np.ones(len(table), bool)
    for column, window, slack in (
        ("youngs_modulus_kpa", polymers.youngs_modulus_kpa, 2.0),
        ("half_life_days", polymers.half_life_days, 10.0),
        ("conductivity_s_per_m", polymers.conductivity_s_per_m, 0.05),
    ):
        low, high = window.numpy()[row.to_numpy()].T
        kept &= ((table[column] >= low - slack) & (table[column] <= high + slack)).to_numpy()
    return table[kept]


def call(script: str, *flags: object, threads: int) -> None:
    """Run a script of the project to its end."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        last = (ended.stderr.strip() or "no message").splitlines()[-1]
        raise SystemExit(f"{' '.join(command)} ended with {ended.returncode}: {last}")


def fit(table: str, folder: Path) -> Path:
    """Make a table and fit an ensemble to it, unless that is done; returns its directory."""
    output = folder / f"stage1-{table}"
    if (output / "metrics.json").exists():
        return output
    whole, path = folder / "whole.parquet", folder / f"{table}.parquet"
    if not whole.exists():
        call("patients/make_outcomes.py", "--output", whole, threads=2)
    if table == "made":
        what_can_be_made(pd.read_parquet(whole)).to_parquet(path)
    flags = ["--output-dir", output, "--truth", "mechanistic"]
    if table == "made":  # a twelfth of the rows
        flags += ["--batch-size", 256]
    call("train/fit_stage1.py", path, *flags, threads=2)
    ensemble = load_stage1(output / "stage1.pt", pessimism=0.0)
    with torch.no_grad():  # the first member in all places: one network, which never disagrees
        for parameter in ensemble.network.parameters():
            parameter[:] = parameter[:1].clone()
    ensemble.freeze()
    save_stage1(output / "one.pt", ensemble, {})
    return output


def train(run: Run, folder: Path) -> pd.DataFrame:
    """Train a policy, unless that is done; returns a row per iteration."""
    output = folder / run.name
    if not (output / "summary.json").exists():
        one = run.reward == ONE_NETWORK
        model = folder / f"stage1-{run.table}" / ("one.pt" if one else "stage1.pt")
        flags = ["--preset", "quick", "--num-iterations", run.iterations, "--seed", run.seed]
        flags += ["--reward-model", model, "--pessimism", 0.0 if one else run.reward]
        flags += ["--compile", "off", "--checkpoint-interval", 5, "--keep-checkpoints", 1000]
        call("train/ppo_hybrid.py", *flags, "--output-dir", output, "--overwrite", threads=1)
    truth = output / "evaluation-shipped-mechanistic-checkpoints.csv"
    if not truth.exists():
        flags = ["--every-checkpoint", "--reward-model", "mechanistic"]
        call("train/evaluate.py", output, *flags, threads=1)
    evaluated = pd.read_csv(truth).set_index("iteration").add_prefix("true_")
    rows = pd.read_csv(output / "metrics.csv").set_index("iteration").join(evaluated, how="right")
    columns = ["holdout_deterministic_reward", "true_holdout_deterministic_reward"]
    breach = rows["true_holdout_deterministic_limit_breach_rate"].iloc[-1]
    rows = rows[["global_step", *columns, "true_holdout_fraction_of_oracle"]].reset_index()
    return rows.assign(**{**run._asdict(), "breach": breach})


def table_of(results: pd.DataFrame) -> list[str]:
    """A row for each table, length and reward: how the last iteration is evaluated."""
    lines = [
        "| table | samples | reward of | seeds | predicted reward, held out | true reward, "
        "held out | of the true oracle | highest on the way | breaks a limit, truly |",
        "|---" * 9 + "|",
    ]
    for (table, _, reward), runs in results.groupby(["table", "iterations", "reward"], sort=False):
        curves = runs.groupby("seed")
        last = curves.last()
        true = "true_holdout_deterministic_reward"
        label = f"pessimism {reward}" if reward != ONE_NETWORK else ONE_NETWORK
        if reward == f"{DEFAULT_PESSIMISM:g}":
            label += " (default)"
        fraction = 100.0 * last["true_holdout_fraction_of_oracle"]
        cells = [
            table,
            f"{last['global_step'].max() / 1e6:.1f} M",
            label,
            str(len(last)),
            f"{last['holdout_deterministic_reward'].mean():.2f}",
            f"{last[true].mean():.2f} [{last[true].min():.2f}, {last[true].max():.2f}]",
            f"{fraction.mean():.2f} %",
            f"{curves[true].max().mean():.2f}",
            f"{100.0 * last['breach'].mean():.1f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(path: Path, results: pd.DataFrame) -> None:
    """Picture of predicted and true reward of the long runs, over the samples."""
    tables = [name for name in TABLES if name in set(results["table"])]
    figure, axes = plt.subplots(
        1, len(tables), figsize=(6 * len(tables), 4.5), squeeze=False, layout="constrained"
    )
    for ax, table in zip(axes[0], tables, strict=True):
        longest = results[results["table"] == table]
        longest = longest[longest["iterations"] == longest["iterations"].max()]
        for i, (reward, runs) in enumerate(longest.groupby("reward", sort=False)):
            label = f"pessimism {reward}" if reward != ONE_NETWORK else ONE_NETWORK
            curve = runs.groupby("global_step").mean(numeric_only=True)
            samples, color = curve.index / 1e6, f"C{i}"
            ax.plot(samples, curve["true_holdout_deterministic_reward"], color=color, label=label)
            ax.plot(samples, curve["holdout_deterministic_reward"], color=color, linestyle=":")
        best = (
            longest["true_holdout_deterministic_reward"]
            / longest["true_holdout_fraction_of_oracle"]
        )
        ax.axhline(best.median(), color="0.5", linewidth=1)
        ax.set(
            title=f"fitted to {TABLES[table]}",
            xlabel="samples, millions",
            ylabel="mean reward of held-out virtual patients",
            ylim=(18, 32),
        )
        ax.legend(title="solid: true, dotted: predicted; grey: true oracle", loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Fit, train, and write the tables and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", choices=list(TABLES), nargs="+", default=list(TABLES))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "overoptimisation")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rewards = [ONE_NETWORK, *(f"{p:g}" for p in PESSIMISM)]
    runs = [
        Run(table, reward, seed, QUICK_ITERATIONS)
        for seed in args.seeds
        for table in args.only
        for reward in rewards
    ]
    runs += [
        Run(table, reward, args.seeds[0], LONG * QUICK_ITERATIONS)
        for table in args.only
        for reward in (ONE_NETWORK, "0", f"{DEFAULT_PESSIMISM:g}")
    ]
    fits = {
        table: json.loads((fit(table, args.folder) / "metrics.json").read_text())
        for table in args.only
    }
    with ThreadPoolExecutor(2) as pool:  # processes of one thread each
        results = pd.concat(
            tqdm(pool.map(lambda run: train(run, args.folder), runs), total=len(runs), unit="run")
        )
    order = {reward: i for i, reward in enumerate(rewards)}
    results = results.sort_values(
        ["table", "iterations", "reward"],
        key=lambda column: (
            column.map(order | {name: i for i, name in enumerate(TABLES)})
            if column.dtype != "int64"
            else column
        ),
        kind="stable",
    )
    results.to_csv(RESULTS / "overoptimisation.csv", index=False, float_format="%.5g")
    draw(RESULTS / "overoptimisation.png", results)
    lines = [
        "Policies trained on a fitted Stage 1 alone, evaluated by the truth behind its table (the "
        "mechanistic model) on the 500 held-out virtual patients: means over the seeds, range in "
        "brackets; made by `benchmark/overoptimisation.py`.",
        "",
    ]
    for table, report in fits.items():
        held_out = report["held_out"]
        lines.append(
            f"- `{table}`, {TABLES[table]}: {report['rows']:,} rows of {report['patients']} "
            f"virtual patients, fitted in {report['seconds']:.0f} s; on "
            f"{report['held_out_patients']} patients that were not fitted, MAE of the change in "
            f"LVEF {held_out['delta_ef_pct']['mae']:.3f}, R2 {held_out['delta_ef_pct']['r2']:.3f}; "
            f"`optimal` AUROC {held_out['is_optimal']['auroc']:.3f}, F1 "
            f"{held_out['is_optimal']['f1']:.3f}"
        )
    lines += ["", machine(1), "", *table_of(results)]
    write_atomically(RESULTS / "overoptimisation.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
