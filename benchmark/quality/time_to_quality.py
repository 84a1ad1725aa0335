"""How long trainers take from the start of their process to a given quality of the policy.

    python benchmark/quality/time_to_quality.py               # about half an hour on two cores
    python benchmark/quality/time_to_quality.py --trainers quick --seeds 4 5

Milestones: the source's final mean reward, by the deterministic policy on the training cohort, and
three shares of the oracle's mean reward on the held-out one. Every trainer runs at the best
settings known of it, to the end of its own schedule, one process at a time with the whole machine.
Time counts from the start of the process: interpreter, imports and compilation are in it. Our
trainer evaluates after every iteration, and that counts too; evaluations of the others do not.
Needs `pip install -e ".[bench]"`.
"""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import ORACLE_CACHE, Parser, count, figure, in_turn, made_by, table, write
from speed.trainers.protocol import REWARDS, train

from hydrogel_gym.oracle import best_designs
from hydrogel_gym.runs.command_line import run_script

TRAIN, HOLDOUT = REWARDS
OURS = "{python} train/ppo_hybrid.py --no-oracle --output-dir {output} --seed {seed} --preset "
# The best of what was tried for each, short rollouts first of all, as in our own presets.
LINES = "--minibatch-size 1000 --num-epochs 4 --evaluate-every 1 --seed {seed} --output {output} "
CLEANRL = "{python} benchmark/speed/trainers/cleanrl_manner.py " + LINES
XLA = "{python} benchmark/speed/trainers/xla.py " + LINES
SHORT = "--num-iterations 200 --num-steps 2 --learning-rate 1e-3"
BASELINES3 = "{python} benchmark/speed/trainers/stable_baselines3_manner.py " + LINES
TRAINERS = {
    "quick": OURS + "quick",
    "quick, 65 iterations": OURS + "quick --num-iterations 65",
    "quick, 60 iterations, minibatches of 500, bf16": OURS
    + "quick --num-iterations 60 --minibatch-size 500 --limit-margin 0.0003 --precision bf16",
    "quick, 160 iterations": OURS + "quick --num-iterations 160",
    "CleanRL manner": CLEANRL + SHORT,
    "XLA": XLA + SHORT,
    "XLA bf16": XLA + SHORT + " --precision bf16",
    "Stable-Baselines3, rollouts of 1 step": (
        BASELINES3 + "--num-iterations 200 --num-steps 1 --learning-rate 2e-3 --log-std-init -1"
    ),
    "Stable-Baselines3, rollouts of 2 steps": (
        BASELINES3 + "--num-iterations 150 --num-steps 2 --learning-rate 2e-3 --log-std-init -0.5"
    ),
}


class Milestone(NamedTuple):
    """What the mean reward on a cohort is to reach."""

    label: str
    column: str
    reward: float


def milestones() -> tuple[list[Milestone], float]:
    """The milestones, and the oracle's mean reward on the held-out cohort."""
    best = best_designs("holdout", cache_dir=ORACLE_CACHE, progress=True).score.mean().item()
    goals = [Milestone("29.2 on the training cohort", TRAIN, 29.2)]
    for share in (0.985, 0.995, 0.998):
        label = f"{100 * share:g} % of the oracle, held out"
        goals.append(Milestone(label, HOLDOUT, share * best))
    return goals, best


def reached(run: pd.DataFrame, milestone: Milestone) -> float:
    """Seconds until the first evaluation at or above the milestone; infinite without one."""
    there = run.loc[run[milestone.column] >= milestone.reward, "seconds"]
    return there.min() if len(there) else math.inf


def cell(runs: list[pd.DataFrame], milestone: Milestone) -> str:
    """Median and range over the seeds, or what was reached instead."""
    seconds = [reached(run, milestone) for run in runs]
    there = [value for value in seconds if math.isfinite(value)]
    if not there:
        final = statistics.median(run[milestone.column].iloc[-1] for run in runs)
        return f"not reached ({final:.2f})"
    # A seed that did not get there counts as slower than all that did.
    median = statistics.median(seconds)
    text = f"{median:.0f}" if math.isfinite(median) else "not reached by most"
    text += f" [{min(there):.0f}, {max(there):.0f}]"
    missed = len(seconds) - len(there)
    return text + (f", not reached by {missed} of {len(seconds)}" if missed else "")


def draw(every: dict[str, list[pd.DataFrame]]) -> Any:
    """Reward against seconds, a line per run and a panel per cohort."""
    picture = figure(9, 4.2)
    panels = picture.subplots(1, 2, sharex=True)
    for axes, column in zip(panels, REWARDS, strict=True):
        for k, (name, runs) in enumerate(every.items()):
            for run in runs:
                label = name if run is runs[0] else None
                axes.plot(run["seconds"], run[column], color=f"C{k}", lw=1, label=label)
        axes.set(title=column, xlabel="seconds since the process started", xscale="log")
        axes.set_ylim(20, 31)
        axes.grid(alpha=0.3)
    panels[0].legend(loc="lower right", fontsize="small")
    return picture


def main(argv: list[str] | None = None) -> None:
    """Run every trainer under every seed; write table and picture."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS), help="which")
    flag("--seeds", type=int, nargs="+", default=[1, 2, 3], help="a process of each in every one")
    flag("--threads", type=count, default=torch.get_num_threads(), help="of every trainer")
    flag("--flags", default="", help="more flags of every trainer, in one word")
    args = parser.parse_args(argv)
    goals, best = milestones()

    def measure(name: str, k: int) -> pd.DataFrame:
        return train(f"{TRAINERS[name]} {args.flags}", args.threads, seed=args.seeds[k])

    every = in_turn(args.trainers, len(args.seeds), measure)
    rows = []
    for name, runs in every.items():
        samples, seconds = runs[0]["samples"].iloc[-1], [run["seconds"].iloc[-1] for run in runs]
        cells = [cell(runs, goal) for goal in goals]
        rows.append([name, f"{samples / 1e6:.1f} M", *cells, f"{statistics.median(seconds):.0f}"])
    lines = [
        "Seconds from the start of the process to a deterministic mean reward, median [range] over "
        f"{len(args.seeds)} seeds, one process at a time; in brackets the final reward, median "
        "over the seeds, where it was not reached.",
        "",
        *table(["trainer", "samples", *(goal.label for goal in goals), "whole run"], rows),
        "",
        f"The oracle's mean reward on the held-out cohort is {best:.3f}. Looked at after every "
        "iteration: the time of our trainer contains these evaluations, that of the others does "
        "not. Commands:",
        "",
        *(f"- {name}: `{TRAINERS[name]}`" for name in args.trainers),
    ]
    made = made_by(args.threads, "stable-baselines3", "jax")
    write(args.output_dir, "time_to_quality", lines, draw(every), made)


if __name__ == "__main__":
    sys.exit(run_script(main))
