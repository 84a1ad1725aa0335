"""How fast trainers are at equal work, how near that is to the machine's limit, in what memory.

    python benchmark/throughput.py                        # a quarter of an hour on two cores
    python benchmark/throughput.py --trainers plain "fast fp32" --rounds 3

Every trainer learns with the network and table of the source preset: 2,000 environments,
minibatches of 2,000, 10 epochs. Rounds alternate over the trainers, a process at a time, so that
whatever else the machine does hits all of them; a process's first iteration (compilation,
allocation) is left out. The unit is 200,000 samples, 10 epochs each, which is an iteration of the
source preset; processes do shorter ones, and the figures are scaled to the unit by their samples.

Writes `throughput.csv` (every figure of every round), `.md` and `.png` in `results/`. Needs
`pip install -e ".[bench]"` for Stable-Baselines3, and a C++ compiler for what is compiled.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm
from trainers.launch import TrainerError, complete, environment, fill, machine, train

from hydrogel_gym.files import write_atomically
from hydrogel_gym.runs.directory import SUMMARY_FILE

RESULTS = Path(__file__).parent / "results"
UNIT_SAMPLES, UNIT_EPOCHS = 200_000, 10
MINIBATCH = 2000
# What a user would pick instead, and our own plain path.
REFERENCES = ("CleanRL manner", "LeanRL manner", "Stable-Baselines3", "plain")
MEMORY_TARGET_MB = 700

# Inputs and outputs of every linear layer; the hidden layers of the four heads count as one.
Layers = tuple[tuple[int, int], ...]
SOURCE_LAYERS: Layers = ((13, 256), (256, 256), (256, 448), (128, 24), (128, 4), (64, 4), (128, 1))
BASELINES3_LAYERS: Layers = ((13, 256), (256, 256), (256, 320), (256, 128), (320, 32), (128, 1))


class Trainer(NamedTuple):
    """A command, the layers it multiplies by, and the arithmetic that limits it."""

    command: str
    layers: Layers = SOURCE_LAYERS
    bf16: bool = False


OURS = (
    "{python} train/ppo_hybrid.py --preset source --no-oracle --overwrite --output-dir {output} "
    "--num-iterations {iterations} --num-steps {steps} --seed {seed}"
)
SIZES = (
    "--num-envs 2000 --minibatch-size 2000 --num-epochs 10 --num-iterations {iterations} "
    "--num-steps {steps} --seed {seed} --output {output}"
)
CLEANRL = "{python} benchmark/trainers/cleanrl_manner.py " + SIZES
TRAINERS = {
    "plain": Trainer(OURS + " --compile off --precision fp32"),
    "fast fp32": Trainer(OURS + " --compile on --precision fp32"),
    "fast bf16": Trainer(OURS + " --compile on --precision bf16", bf16=True),
    "CleanRL manner": Trainer(CLEANRL),
    "LeanRL manner": Trainer(CLEANRL + " --compile"),
    "Stable-Baselines3": Trainer(
        "{python} benchmark/trainers/stable_baselines3_manner.py " + SIZES, BASELINES3_LAYERS
    ),
}

# Peak of the process's own memory map: `ru_maxrss` also remembers the parent it was forked from.
MEMORY_SCRIPT = """
import runpy, sys
import torch

def kib(field):
    with open("/proc/self/status") as status:
        return int(next(line.split()[1] for line in status if line.startswith(field)))

before = kib("VmRSS")
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    if stop.code:
        raise
print("\\n" + str((kib("VmHWM") - before) * 1024))
"""


def flops_per_sample(layers: Layers) -> int:
    """Floating-point operations of one sample in one epoch: 3 x 2 x multiply-accumulates.

    A multiply-accumulate is two operations, and the backward pass has two products for every one
    of the forward pass. Only linear layers count.
    """
    return 3 * 2 * sum(inputs * outputs for inputs, outputs in layers)


def products(layers: Layers, dtype: torch.dtype) -> list[tuple[str, Tensor, Tensor]]:
    """Operands of every matrix product of a minibatch's update, with a name that gives the shape.

    Forward, gradient of the weight, and gradient of the input where there is something before it,
    in the memory layouts of `nn.Linear`.
    """
    operands = []
    for i, (inputs, outputs) in enumerate(layers):
        x, y = torch.randn(MINIBATCH, inputs), torch.randn(MINIBATCH, outputs)
        weight = torch.randn(outputs, inputs)
        pairs = [(x, weight.t()), (y.t(), x), *([(y, weight)] if i else [])]
        for a, b in pairs:
            name = f"{a.shape[0]}×{a.shape[1]}×{b.shape[1]}"
            operands.append((name, a.to(dtype), b.to(dtype)))
    return operands


def matmul_ceiling(
    precision: str, dtype: torch.dtype, layers: Layers, seconds: float = 0.05
) -> list[dict[str, object]]:
    """Rows with the best rate of each product, and of all of them together (`"network"`).

    Args:
        precision: of `torch.set_float32_matmul_precision`.
        dtype: of operands and result.
        layers: of the network.
        seconds: to spend on each product.
    """
    name = f"float32, {precision}" if dtype is torch.float32 else "bfloat16"
    rows, flops, total = [], 0, 0.0
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for shape, a, b in products(layers, dtype):
            out = torch.mm(a, b)
            best, until = math.inf, time.perf_counter() + seconds
            while (start := time.perf_counter()) < until:
                torch.mm(a, b, out=out)
                best = min(best, time.perf_counter() - start)
            count = 2 * a.shape[0] * a.shape[1] * b.shape[1]
            flops, total = flops + count, total + best
            rows.append(
                {"kind": "matmul", "name": name, "shape": shape, "gflops": count / best / 1e9}
            )
    finally:
        torch.set_float32_matmul_precision(before)
    return [
        *rows,
        {"kind": "matmul", "name": name, "shape": "network", "gflops": flops / total / 1e9},
    ]


def figures(iterations: pd.DataFrame, layers: Layers) -> dict[str, float]:
    """Seconds per unit and arithmetic rate of one process, its first iteration left out."""
    samples = iterations["samples"].diff().iloc[1:]
    scale = UNIT_SAMPLES / samples.sum()
    measured = iterations.iloc[1:]
    row = {
        "seconds": measured["seconds_iteration"].sum() * scale,
        "first_iteration_seconds": iterations["seconds_iteration"].iloc[0],
        "samples_measured": int(samples.sum()),
    }
    flops = UNIT_SAMPLES * UNIT_EPOCHS * flops_per_sample(layers)
    rollout = update = math.nan  # where a trainer does not say
    if {"seconds_rollout", "seconds_update"} <= set(measured):
        rollout, update = measured[["seconds_rollout", "seconds_update"]].sum() * scale
    return row | {
        "rollout_seconds": rollout,
        "update_seconds": update,
        "gflops": flops / update / 1e9,
    }


def peak_memory_mb(command: str, threads: int) -> float:
    """Peak memory of a trainer of ours beyond that of `import torch`, over one whole iteration."""
    with tempfile.TemporaryDirectory() as folder:
        # One epoch: the next ones use the same memory again.
        argv = fill(command, output=Path(folder, "run"), iterations=1, steps=100, seed=1)
        argv = [sys.executable, "-c", MEMORY_SCRIPT, *argv[1:], "--num-epochs", "1"]
        return int(complete("memory", argv, environment(threads)).splitlines()[-1]) / 1e6


def compile_seconds(command: str, threads: int) -> dict[str, float]:
    """Seconds that a trainer of ours takes to compile, with an empty cache and with a full one."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        variables = environment(threads) | {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder, "cache"))}
        for state in ("cold", "warm"):
            run_dir = Path(folder, state)
            argv = fill(command, output=run_dir, iterations=1, steps=1, seed=1)
            complete("compilation", argv, variables)
            seconds[state] = json.loads((run_dir / SUMMARY_FILE).read_text())["compile_seconds"]
    return seconds


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Per trainer: medians and ranges over the rounds, and how many times as fast as others it is.

    A ratio is taken within each round, where both met the same machine, and then its median.
    """
    runs = rows[rows["kind"] == "trainer"]
    seconds = runs.pivot(index="round", columns="name", values="seconds")
    rates = rows[(rows["kind"] == "matmul") & (rows["shape"] == "network")]
    ceiling = rates.groupby("name")["gflops"].max()
    table = []
    for name in runs["name"].unique():
        own = runs[runs["name"] == name]
        others = [other for other in REFERENCES if other in seconds]
        ratios = {other: seconds[other] / seconds[name] for other in others}
        quietest = {other: seconds[other].min() / own["seconds"].min() for other in others}
        limits = ceiling[
            [("bfloat16" == key) == bool(own["bf16"].iloc[0]) for key in ceiling.index]
        ]
        table.append(
            {
                "name": name,
                "seconds": own["seconds"].median(),
                "fastest": own["seconds"].min(),
                "slowest": own["seconds"].max(),
                **{f"against {other}": ratio.median() for other, ratio in ratios.items()},
                **{f"fastest against {other}": ratio for other, ratio in quietest.items()},
                "rollout_seconds": own["rollout_seconds"].median(),
                "update_seconds": own["update_seconds"].median(),
                "first_iteration_seconds": own["first_iteration_seconds"].median(),
                "gflops": own["gflops"].median(),
                "of_ceiling": own["gflops"].median() / limits.max(),
            }
        )
    return pd.DataFrame(table).set_index("name")


def markdown(rows: pd.DataFrame, where: str) -> str:
    """The tables."""
    table = summarise(rows)
    others = [column for column in table if column.startswith("against ")]
    rounds = rows["round"].nunique()
    samples = int(rows.loc[rows["kind"] == "trainer", "samples_measured"].median())
    lines = [
        f"Seconds for {UNIT_SAMPLES:,} samples, {UNIT_EPOCHS} epochs each, scaled from "
        f"{samples:,} samples a process; the first iteration of a process is left out. Median "
        f"[range] over {rounds} rounds that alternate over the trainers; made by "
        "`benchmark/throughput.py`.",
        "",
        f"{where}",
        "",
        f"| trainer | seconds | {' | '.join(others)} | rollout | updates "
        "| first iteration (as run) | GFLOP/s of the updates | of the ceiling |",
        "|---" * (7 + len(others)) + "|",
    ]
    for name, row in table.iterrows():
        lines.append(
            f"| {name} | {row['seconds']:.2f} [{row['fastest']:.2f}, {row['slowest']:.2f}] "
            f"| {' | '.join(ratio(row, other) for other in others)} "
            f"| {shown(row['rollout_seconds'], '.2f')} "
            f"| {shown(row['update_seconds'], '.2f')} "
            f"| {row['first_iteration_seconds']:.1f} "
            f"| {shown(row['gflops'], '.0f')} | {shown(100 * row['of_ceiling'], '.0f', ' %')} |"
        )
    lines += [
        "",
        "“Against” says how many times as fast a trainer is as another: the median of the ratios "
        "within each round, and in brackets the ratio of the fastest rounds of the two, which "
        "other work on the machine's host disturbs least. Floating-point operations: 3 × 2 × "
        "multiply-accumulates of the linear layers, samples and epochs: "
        f"{flops_per_sample(SOURCE_LAYERS) / 1e6:.3f} MFLOP per sample and epoch for the source's "
        f"network, {flops_per_sample(BASELINES3_LAYERS) / 1e6:.3f} for Stable-Baselines3's. The "
        "ceiling is the rate of the matrix products alone at the network's own shapes, best of all "
        "rounds: for a trainer in bf16 that of bfloat16, else the better of the two float32.",
    ]
    lines += ["", "## Matrix products alone", "", *matmul_table(rows), *once_lines(rows)]
    return "\n".join(lines) + "\n"


def once_lines(rows: pd.DataFrame) -> list[str]:
    """The sections of what is measured once: compilation and memory."""
    lines = []
    compiling = rows[rows["kind"] == "compile"]
    if len(compiling):
        lines += [
            "",
            "## Compilation",
            "",
            "Seconds before training begins, all graphs together, once.",
            "",
            "| trainer | nothing cached | cached by an earlier run |",
            "|---|---|---|",
            *(
                f"| {row['name']} | {row['cold']:.0f} | {row['warm']:.0f} |"
                for _, row in compiling.iterrows()
            ),
        ]
    memory = rows[rows["kind"] == "memory"]
    if len(memory):
        lines += [
            "",
            "## Memory",
            "",
            "Peak memory of the process beyond what `import torch` takes, source preset, one "
            f"iteration of 100 steps and one epoch; the target is {MEMORY_TARGET_MB} MB.",
            "",
            "| trainer | MB |",
            "|---|---|",
            *(f"| {row['name']} | {row['megabytes']:.0f} |" for _, row in memory.iterrows()),
        ]
    return lines


def matmul_table(rows: pd.DataFrame) -> list[str]:
    """Best rate over the rounds of the six large products and of the whole network, GFLOP/s."""
    matmul = rows[rows["kind"] == "matmul"]
    best = matmul.pivot_table(index="shape", columns="name", values="gflops", aggfunc="max")
    large = [shape for shape, *_ in products(((13, 256), (256, 256), (256, 448)), torch.float32)]
    shapes = list(dict.fromkeys(large[2:])) + ["network"]
    names = list(best.columns)
    lines = [f"| GFLOP/s | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for shape in shapes:
        label = "all of the network's" if shape == "network" else shape
        lines.append(f"| {label} | {' | '.join(f'{best.loc[shape, n]:.0f}' for n in names)} |")
    return [
        *lines,
        "",
        '`"highest"` and `"medium"` are those of `torch.set_float32_matmul_precision`: the first '
        "multiplies with MKL, the second with oneDNN, which may round operands to bfloat16.",
    ]


def ratio(row: pd.Series, other: str) -> str:
    """How many times as fast: within rounds, and of the fastest ones."""
    return f"{row[other]:.2f}× [{row[f'fastest {other}']:.2f}×]"


def shown(value: float, form: str, unit: str = "") -> str:
    """A figure, or a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:{form}}{unit}"


def draw(rows: pd.DataFrame) -> bytes:
    """Bars of the seconds per unit, with the range over the rounds."""
    from matplotlib.figure import Figure

    table = summarise(rows).iloc[::-1]
    figure = Figure(figsize=(7, 0.6 + 0.45 * len(table)), layout="constrained")
    axes = figure.subplots()
    ranges = [table["seconds"] - table["fastest"], table["slowest"] - table["seconds"]]
    axes.barh(list(table.index), table["seconds"], xerr=ranges, color="#0072B2", capsize=3)
    axes.set_xlabel("seconds for 200,000 samples × 10 epochs (median and range over rounds)")
    axes.grid(axis="x", alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line; `trainers` becomes a dict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    flag("--rounds", type=int, default=5)
    flag("--num-iterations", type=int, default=3, help="per process; the first is left out")
    flag("--num-steps", type=int, default=20, help="per environment and iteration")
    flag("--threads", type=int, default=torch.get_num_threads(), help="of every trainer")
    flag(
        "--once",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure memory and compilation too, which take one run each",
    )
    flag("--output-dir", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    for name, least in (("rounds", 1), ("num_iterations", 2), ("num_steps", 1), ("threads", 1)):
        if (value := getattr(args, name)) < least:
            parser.error(f"--{name.replace('_', '-')} is {value}; allowed: {least} or more")
    args.trainers = {name: TRAINERS[name] for name in args.trainers}
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, and write after every round; returns the exit code."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    rows: list[dict[str, object]] = []
    try:
        if args.once:
            for name, trainer in args.trainers.items():
                if trainer.command.startswith(OURS):
                    megabytes = peak_memory_mb(trainer.command, args.threads)
                    rows.append({"kind": "memory", "name": name, "megabytes": megabytes})
                if "--compile on" in trainer.command:
                    seconds = compile_seconds(trainer.command, args.threads)
                    rows.append({"kind": "compile", "name": name} | seconds)
        with tqdm(total=args.rounds * len(args.trainers), unit="run") as bar:
            for round_number in range(1, args.rounds + 1):
                measured = measure_round(round_number, args, bar)
                rows += [{"round": round_number} | row for row in measured]
                write(args.output_dir, pd.DataFrame(rows), args.threads)
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print((args.output_dir / "throughput.md").read_text())
    return 0


def measure_round(
    round_number: int, args: argparse.Namespace, bar: tqdm
) -> list[dict[str, object]]:
    """The ceilings, then every trainer once; every other round goes backwards."""
    rows = []
    for precision, dtype in (
        ("highest", torch.float32),
        ("medium", torch.float32),
        ("highest", torch.bfloat16),
    ):
        rows += matmul_ceiling(precision, dtype, SOURCE_LAYERS)
    names = list(args.trainers)
    for name in names if round_number % 2 else names[::-1]:
        bar.set_description(name)
        trainer = args.trainers[name]
        iterations = train(
            name,
            trainer.command,
            ("samples", "seconds_iteration"),
            args.threads,
            iterations=args.num_iterations,
            steps=args.num_steps,
            seed=round_number,
        )
        row = {"kind": "trainer", "name": name, "bf16": trainer.bf16}
        rows.append(row | figures(iterations, trainer.layers))
        bar.update()
    # In the order of the trainers, whichever way the round went.
    return sorted(rows, key=lambda row: names.index(row["name"]) if row["name"] in names else -1)


def write(folder: Path, rows: pd.DataFrame, threads: int) -> None:
    """Write the three results."""
    write_atomically(folder / "throughput.csv", rows.to_csv(index=False).encode())
    write_atomically(folder / "throughput.md", markdown(rows, machine(threads)).encode())
    write_atomically(folder / "throughput.png", draw(rows))


if __name__ == "__main__":
    sys.exit(main())
