"""Whether many ranks learn the same as one, and how much faster they are.

    python benchmark/speed/scaling.py                              # ten minutes on two cores
    python benchmark/speed/scaling.py --only speed --ranks 1 2 4 8 --device cuda

Ranks are processes of `torchrun`. What else the machine does hits two ranks that wait for each
other harder than two that do not: measure on an idle one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Parser, count, in_turn, made_by, ratio, run, spread, table, verdict, write
from speed.trainers.protocol import train

from hydrogel_gym.runs.command_line import run_script
from hydrogel_gym.runs.directory import POLICY_FILE
from hydrogel_gym.runs.policies import load_policy
from hydrogel_gym.train.ppo_hybrid import Agent

CURVE = "--preset quick --num-iterations 5 --no-oracle --compile off --checkpoint-interval 0"
# Learning rate, precision, and the largest difference that is still called the same curve. At the
# preset's own rate the dynamics amplify float32 rounding: there the bar is what rounding alone
# does, shown by another number of threads.
CURVES = (("2e-3", "fp64", 1e-9), ("3e-4", "fp64", 1e-9), ("3e-4", "fp32", 1e-4))
CURVES += (("2e-3", "fp32", None),)
RUNS = {"one": (1, 1), "2 ranks": (2, 1), "4 ranks": (4, 1), "2 threads": (1, 2)}
WHOLE = "--preset source --no-oracle --compile off --checkpoint-interval 0 --output-dir {output} "
WHOLE += "--seed {seed} --num-iterations {iterations} --num-steps {steps}"


def launch(ranks: int) -> str:
    """The trainer's command on so many ranks."""
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node={ranks} "
    return "{python} " + (torchrun if ranks > 1 else "") + "train/ppo_hybrid.py"


def relative_difference(reference: Tensor, other: Tensor) -> float:
    """||reference - other|| / ||reference||."""
    return ((reference - other).norm() / reference.norm()).item()


def trained_weights(ranks: int, threads: int, *flags: str) -> Tensor:
    """All weights and biases after a run, float64."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*f"{launch(ranks)} {CURVE}".split(), *flags]
        run([*command, "--output-dir", f"{folder}/run"], threads=threads)
        agent, _ = load_policy(Path(folder, "run", POLICY_FILE), Agent, "cpu")
    return torch.cat([weight.detach().double().flatten() for weight in agent.parameters()])


def curve(args: argparse.Namespace) -> list[str]:
    """Differences of the weights."""
    rows, exact = [], {}
    for rate, precision, bar in CURVES:
        flags = ["--learning-rate", rate, "--precision", precision, "--device", args.device]
        weights = {name: trained_weights(*sizes, *flags) for name, sizes in RUNS.items()}
        one = weights.pop("one")
        two, four, threads = (relative_difference(one, other) for other in weights.values())
        if precision == "fp64":
            exact[rate] = one
        rounding = f"{relative_difference(one, exact[rate]):.1e}" if precision == "fp32" else "–"
        same = f"{bar:.0e}, {verdict(max(two, four) <= bar)}" if bar else "that of 2 threads"
        cells = [f"{two:.1e}", f"{four:.1e}", same, f"{threads:.1e}", rounding]
        rows.append([f"{precision}, learning rate {rate}", *cells])
    header = ["", "2 ranks", "4 ranks", "bar", "1 process, 2 threads", "1 process, float64"]
    return [
        "## The same curve",
        "",
        "Relative difference ‖a − b‖ / ‖a‖ of all weights and biases after five iterations of the "
        "quick preset, between one process of one thread and ranks of one thread each. As the "
        "measure of what rounding alone does: one process of two threads, which sums in another "
        "order, and one in float64.",
        "",
        *table(header, rows),
    ]


def speed_rows(measured: dict[str, list[pd.Series]]) -> list[list[str]]:
    """A row per way of running: seconds of an iteration and its parts, times as fast as alone."""
    rows, base = [], [each["seconds_iteration"] for each in next(iter(measured.values()))]
    for name, every in measured.items():
        parts = ("seconds_iteration", "seconds_rollout", "seconds_update")
        seconds = [[each[part] for each in every] for part in parts]
        rows.append([name, *map(spread, seconds), f"{ratio(base, seconds[0]):.2f}×"])
    return rows


def speed(args: argparse.Namespace) -> list[str]:
    """Seconds per iteration of one process, with more threads too, and of ranks."""
    ways = {"1 process, 1 thread": (1, 1)}
    for ranks in args.ranks:
        ways |= {f"1 process, {ranks} threads": (1, ranks)} if args.device == "cpu" else {}
        ways[f"{ranks} ranks, 1 thread each"] = (ranks, 1)

    def measure(name: str, k: int) -> pd.Series:
        ranks, threads = ways[name]
        command = f"{launch(ranks)} {WHOLE} --device {args.device}"
        # The first iteration also asks the system for memory.
        return train(command, threads, iterations=3, steps=args.num_steps, seed=k + 1)[1:].mean()

    header = ["", "seconds per iteration", "rollout", "updates", "times as fast as 1 thread"]
    return [
        "## Whole iterations",
        "",
        f"Of the source preset with {args.num_steps} steps instead of 100, `--compile off`; the "
        f"first of a process is left out; median [range] over {args.rounds} rounds:",
        "",
        *table(header, speed_rows(in_turn(ways, args.rounds, measure))),
    ]


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the sections."""
    sections = {"curve": curve, "speed": speed}
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--only", nargs="+", choices=sections, default=list(sections), help="sections")
    flag("--ranks", type=count, nargs="+", default=[2], help="of whole iterations")
    flag("--rounds", type=count, default=3, help="of whole iterations")
    flag("--num-steps", type=count, default=20, help="of whole iterations")
    flag("--device", default="cpu", help="of the ranks")
    args = parser.parse_args(argv)
    lines = [made_by(1)]
    for section in args.only:
        lines += ["", *sections[section](args)]
    write(args.output_dir, "scaling", lines)


if __name__ == "__main__":
    sys.exit(run_script(main))
