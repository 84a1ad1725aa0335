"""How fast trainers are at equal work, and what compiling and memory they need for it.

    python benchmark/speed/throughput.py                        # a quarter of an hour on two cores
    python benchmark/speed/throughput.py --trainers plain "fast fp32" --rounds 3

Every trainer learns with the network and table of the source preset: 2,000 environments,
minibatches of 2,000, 10 epochs. Rounds alternate over the trainers, a process at a time; a
process's first iteration (compilation, allocation) is left out. The unit is 200,000 samples, 10
epochs each, which is an iteration of the source preset; processes do shorter ones, and the figures
are scaled to the unit by their samples. XLA's one program counts as updates. Needs a C++ compiler
and `pip install -e ".[bench]"`.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Parser, count, in_turn, made_by, ratio, run, spread, table, write
from speed.trainers.protocol import train

from hydrogel_gym.runs.command_line import run_script
from hydrogel_gym.runs.directory import SUMMARY_FILE

UNIT_SAMPLES = 200_000
# What a user would pick instead, and our own plain path.
REFERENCES = ("CleanRL manner", "LeanRL manner", "Stable-Baselines3", "XLA", "XLA bf16", "plain")

OURS = (
    "{python} train/ppo_hybrid.py --preset source --no-oracle --overwrite --output-dir {output} "
    "--num-iterations {iterations} --num-steps {steps} --seed {seed}"
)
SIZES = " --num-iterations {iterations} --num-steps {steps} --seed {seed} --output {output}"
CLEANRL = "{python} benchmark/speed/trainers/cleanrl_manner.py" + SIZES
XLA = "{python} benchmark/speed/trainers/xla.py" + SIZES
TRAINERS = {
    "plain": OURS + " --compile off --precision fp32",
    "fast fp32": OURS + " --compile on --precision fp32",
    "fast bf16": OURS + " --compile on --precision bf16",
    "CleanRL manner": CLEANRL,
    "LeanRL manner": CLEANRL + " --compile",
    "Stable-Baselines3": "{python} benchmark/speed/trainers/stable_baselines3_manner.py" + SIZES,
    "XLA": XLA,
    "XLA bf16": XLA + " --precision bf16",
}


def per_unit(iterations: pd.DataFrame) -> dict[str, float]:
    """Seconds per unit of one process and their parts, its first iteration left out."""
    scale = UNIT_SAMPLES / iterations["samples"].diff().iloc[1:].sum()
    columns = {name: f"seconds_{name}" for name in ("iteration", "rollout", "update")}
    figures = {name: iterations[column].iloc[1:].sum() for name, column in columns.items()}
    first = iterations["seconds_iteration"].iloc[0]
    return {name: value * scale for name, value in figures.items()} | {"first": first}


def once(command: str, threads: int, *, steps: int) -> tuple[float, float]:
    """Peak memory of one iteration of a trainer of ours, MB, and the seconds it compiled for."""
    with tempfile.TemporaryDirectory() as folder:
        # One epoch: the next ones use the same memory again.
        filled = f"{command} --num-epochs 1".format(
            python="{python}", output=f"{folder}/run", iterations=1, steps=steps, seed=1
        )
        ended = run(shlex.split(filled), threads=threads)
        summary = json.loads(Path(folder, "run", SUMMARY_FILE).read_text())
    return ended.megabytes, summary["compile_seconds"] or 0.0


def speed_rows(measured: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """A row per trainer: seconds, how many times as fast as the references, and its parts."""
    seconds = {name: [each["iteration"] for each in runs] for name, runs in measured.items()}
    references, rows = [seconds[name] for name in REFERENCES if name in seconds], []
    for name, runs in measured.items():
        own = seconds[name]
        against = [f"{ratio(x, own):.2f}× [{min(x) / min(own):.2f}×]" for x in references]
        parts = {part: statistics.median(each[part] for each in runs) for part in runs[0]}
        cells = [f"{parts['rollout']:.2f}", f"{parts['update']:.2f}", f"{parts['first']:.1f}"]
        rows.append([name, spread(own), *against, *cells])
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the tables."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS), help="which")
    flag("--rounds", type=count, default=5, help="a process of each trainer in every one")
    flag("--num-steps", type=count, default=20, help="per environment and iteration")
    flag("--threads", type=count, default=torch.get_num_threads(), help="of every trainer")
    args = parser.parse_args(argv)

    def measure(name: str, k: int) -> dict[str, float]:
        sizes = dict(iterations=3, steps=args.num_steps, seed=k + 1)
        return per_unit(train(TRAINERS[name], args.threads, **sizes))

    measured = in_turn(args.trainers, args.rounds, measure)
    base = run(["{python}", "-c", "import torch"], threads=args.threads).megabytes
    costs = []
    for name in args.trainers:
        if TRAINERS[name].startswith(OURS):
            with tempfile.TemporaryDirectory() as cache:
                command = f"env TORCHINDUCTOR_CACHE_DIR={cache} {TRAINERS[name]}"
                compiling = [once(command, args.threads, steps=1)[1] for _ in range(2)]
                megabytes, _ = once(command, args.threads, steps=5 * args.num_steps)
            shown = [f"{x:.0f}" if x else "–" for x in compiling]
            costs.append([name, *shown, f"{megabytes - base:.0f}"])
    others = [f"against {other}" for other in REFERENCES if other in measured]
    columns = ["trainer", "seconds", *others, "rollout", "updates", "first iteration (as run)"]
    lines = [
        f"Seconds for {UNIT_SAMPLES:,} samples, 10 epochs each, scaled from "
        f"{2 * args.num_steps * 2000:,} samples a process; the first iteration of a process is "
        f"left out. Median [range] over {args.rounds} rounds that alternate over the trainers.",
        "",
        *table(columns, speed_rows(measured)),
        "",
        "“Against” says how many times as fast a trainer is as another: the median of the ratios "
        "within each round, and in brackets the ratio of the fastest rounds of the two, which "
        "other work on the machine's host disturbs least.",
    ]
    if costs:
        columns = ["trainer", "compiling, nothing cached, s", "cached by an earlier run, s"]
        columns.append("peak memory beyond `import torch`, MB")
        lines += ["", "What is paid once; memory is of one iteration of one epoch:", ""]
        lines += table(columns, costs)
    made = made_by(args.threads, "stable-baselines3", "jax")
    write(args.output_dir, "throughput", lines, made=made)


if __name__ == "__main__":
    sys.exit(run_script(main))
