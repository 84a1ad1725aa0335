"""How long trainers take from the start of their process to a given quality of the policy.

    python benchmark/time_to_quality.py                       # about half an hour on two cores
    python benchmark/time_to_quality.py --trainers "quick, compiled" --seeds 4 5

Milestones: the source's final mean reward, by the deterministic policy on the training cohort, and
two shares of the oracle's mean reward on the held-out one. Every trainer runs at the best settings
that are known of it, to the end of its own schedule, one process at a time with the whole machine.
Time counts from the start of the process: interpreter, imports and compilation are in it. Our
trainer evaluates after every iteration, and that counts too; evaluations of the others do not.

Runs that the table already has are kept: after a change of a trainer pass `--fresh`. Writes
`time_to_quality.csv` (a row per run and iteration), `.md` and `.png` in `results/`. Needs
`pip install -e ".[bench]"` for Stable-Baselines3, and a C++ compiler for what is compiled.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from tqdm import tqdm
from trainers.launch import REWARDS, ROOT, TrainerError, machine, train

from hydrogel_gym.files import write_atomically
from hydrogel_gym.oracle import best_designs

RESULTS = Path(__file__).parent / "results"
ORACLE_CACHE = ROOT / "runs" / "oracle"
TRAIN, HOLDOUT = REWARDS

OURS = "{python} train/ppo_hybrid.py --no-oracle --output-dir {output} --seed {seed} --preset "
# The best of what was tried for each, short rollouts first of all, as in our own presets.
LINES = "--minibatch-size 1000 --num-epochs 4 --evaluate-every 1 --seed {seed} --output {output} "
CLEANRL = (
    "{python} benchmark/trainers/cleanrl_manner.py " + LINES + "--num-iterations 200 "
    "--num-steps 2 --learning-rate 1e-3"
)
BASELINES3 = "{python} benchmark/trainers/stable_baselines3_manner.py " + LINES
TRAINERS = {
    "quick": OURS + "quick",
    "quick, bf16": OURS + "quick --precision bf16",
    "full": OURS + "full",
    "CleanRL manner": CLEANRL,
    "Stable-Baselines3, rollouts of 1 step": (
        BASELINES3 + "--num-iterations 200 --num-steps 1 --learning-rate 2e-3 --log-std-init -1"
    ),
    "Stable-Baselines3, rollouts of 2 steps": (
        BASELINES3 + "--num-iterations 150 --num-steps 2 --learning-rate 2e-3 --log-std-init -0.5"
    ),
}
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#000000")


class Milestone(NamedTuple):
    """What the mean reward on a cohort is to reach."""

    label: str
    column: str
    reward: float


def milestones(best_holdout: float) -> tuple[Milestone, ...]:
    """The three.

    Args:
        best_holdout: mean over the held-out patients of the best possible reward.
    """
    return (
        Milestone("29.2 on the training cohort", TRAIN, 29.2),
        Milestone("98.5 % of the oracle, held out", HOLDOUT, 0.985 * best_holdout),
        Milestone("99.5 % of the oracle, held out", HOLDOUT, 0.995 * best_holdout),
    )


def reached(run: pd.DataFrame, milestone: Milestone) -> float:
    """Seconds until the first evaluation at or above the milestone; NaN where there is none."""
    there = run.loc[run[milestone.column] >= milestone.reward, "seconds"]
    return there.min() if len(there) else math.nan


def cell(runs: pd.DataFrame, milestone: Milestone) -> str:
    """Median and range over the seeds, or what was reached instead."""
    by_seed = [run for _, run in runs.groupby("seed")]
    seconds = pd.Series([reached(run, milestone) for run in by_seed])
    if seconds.isna().all():
        final = pd.Series([run[milestone.column].dropna().iloc[-1] for run in by_seed])
        return f"not reached ({final.median():.2f})"
    # A seed that did not get there counts as slower than all that did.
    median = seconds.fillna(math.inf).median()
    text = f"{median:.0f}" if math.isfinite(median) else "not reached by most"
    text += f" [{seconds.min():.0f}, {seconds.max():.0f}]"
    missed = int(seconds.isna().sum())
    return text + (f", not reached by {missed} of {len(seconds)}" if missed else "")


def markdown(rows: pd.DataFrame, best_holdout: float, where: str) -> str:
    """The table."""
    goals = milestones(best_holdout)
    seeds = rows.groupby("trainer")["seed"].nunique()
    lines = [
        "Seconds from the start of the process to a deterministic mean reward, median [range] over "
        f"{seeds.min()} seeds{'' if seeds.min() == seeds.max() else ' or more'}, one process at a "
        "time; in brackets the final reward, median over the seeds, where it was not reached; made "
        "by `benchmark/time_to_quality.py`.",
        "",
        where,
        "",
        f"| trainer | samples | {' | '.join(goal.label for goal in goals)} | whole run |",
        "|---" * (len(goals) + 3) + "|",
    ]
    for name, runs in rows.groupby("trainer", sort=False):
        last = runs.groupby("seed").last()
        cells = " | ".join(cell(runs, goal) for goal in goals)
        samples = last["samples"].median() / 1e6
        lines.append(f"| {name} | {samples:.1f} M | {cells} | {last['seconds'].median():.0f} |")
    lines += [
        "",
        f"The oracle's mean reward on the held-out cohort is {best_holdout:.3f}. Looked at after "
        "every iteration: the time of our trainer contains these evaluations, that of the others "
        "does not. Commands:",
        "",
        *(f"- {name}: `{TRAINERS[name]}`" for name in rows["trainer"].unique()),
    ]
    return "\n".join(lines) + "\n"


def draw(rows: pd.DataFrame, best_holdout: float) -> bytes:
    """Reward against seconds, a line per run and a panel per cohort."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    names = list(rows["trainer"].unique())
    for axes, column, title in zip(
        panels, REWARDS, ("training cohort", "held-out cohort"), strict=True
    ):
        for (name, seed), run in rows.groupby(["trainer", "seed"], sort=False):
            colour = COLOURS[names.index(name) % len(COLOURS)]
            label = name if seed == rows.loc[rows["trainer"] == name, "seed"].iloc[0] else None
            axes.plot(run["seconds"], run[column], color=colour, lw=1, label=label)
        for goal in milestones(best_holdout):
            if goal.column == column:
                axes.axhline(goal.reward, color="0.5", lw=0.8, ls=":")
        axes.set_xscale("log")
        axes.set(title=title, xlabel="seconds since the process started")
        axes.set_ylim(20, math.ceil(best_holdout))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("mean reward, deterministic policy")
    panels[0].legend(loc="lower right", fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    flag("--seeds", type=int, nargs="+", default=[1, 2, 3])
    flag("--threads", type=int, default=torch.get_num_threads(), help="of every trainer")
    flag("--fresh", action="store_true", help="repeat runs that the table has")
    flag("--output-dir", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error(f"--threads is {args.threads}; allowed: 1 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run what the table lacks and write it again after every run; returns the exit code."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    path = args.output_dir / "time_to_quality.csv"
    jobs = [(seed, name) for seed in args.seeds for name in args.trainers]
    rows = pd.DataFrame()
    if path.exists():
        rows = pd.read_csv(path)
        rows = rows[rows["trainer"].isin(TRAINERS)]
        held = set(zip(rows["seed"], rows["trainer"], strict=True))
        if args.fresh:
            again = [pair in jobs for pair in zip(rows["seed"], rows["trainer"], strict=True)]
            rows = rows[[not repeat for repeat in again]]
        else:
            jobs = [job for job in jobs if job not in held]
    best_holdout = best_designs("holdout", cache_dir=ORACLE_CACHE, progress=True).score.mean()
    columns = ["iteration", "samples", "seconds", *REWARDS]
    order = list(TRAINERS)
    # Seeds outermost, so that noise of the machine hits every trainer.
    for seed, name in tqdm(jobs, unit="run"):
        try:
            run = train(name, TRAINERS[name], columns, args.threads, seed=seed)[columns]
        except TrainerError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        run.insert(0, "trainer", name)
        run.insert(1, "seed", seed)
        rows = pd.concat([rows, run], ignore_index=True)
        rows = rows.sort_values(
            ["trainer", "seed", "iteration"],
            key=lambda column: column.map(order.index) if column.name == "trainer" else column,
        )
        write_atomically(path, rows.to_csv(index=False).encode())
    if rows.empty:
        print("error: nothing was run", file=sys.stderr)
        return 1
    text = markdown(rows, float(best_holdout), machine(args.threads))
    write_atomically(path.with_suffix(".md"), text.encode())
    write_atomically(path.with_suffix(".png"), draw(rows, float(best_holdout)))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
