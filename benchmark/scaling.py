"""Whether many ranks learn the same as one, and what they, and checkpoints, cost.

    python benchmark/scaling.py                              # a quarter of an hour on two cores
    python benchmark/scaling.py --only overhead --rounds 60

Three sections; `--only` does some and keeps what the files have of the others:

- `curve`: weights after five iterations on 2 and 4 gloo ranks, against those of one process.
- `overhead`: an update on two ranks of one thread each, with and without averaging the gradients
  over them, beside torch's `DistributedDataParallel`; rounds alternate over the variants within one
  run, and a round takes as long as its slower rank. Then whole iterations of one and two ranks.
- `checkpoint`: a checkpoint, and the table that is written every iteration, as a share of the run.

Writes `results/scaling.csv` (every figure of every round) and `results/scaling.md`. Ranks are
processes of `torchrun`. What else the machine does hits two ranks that wait for each other harder
than two that do not: measure on an idle one.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from environment import hardware
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from trainers.launch import TrainerError, complete, environment, train

from hydrogel_gym import load_cohort
from hydrogel_gym.files import write_atomically
from hydrogel_gym.memory import keep_freed_memory
from hydrogel_gym.runs.checkpoints import Learner, checkpoint_at, run_state, seal, unseal
from hydrogel_gym.runs.compiled import flatten_weights
from hydrogel_gym.runs.devices import fast_float32
from hydrogel_gym.runs.directory import METRICS_FILE, POLICY_FILE, write_csv
from hydrogel_gym.runs.environments import first_reset
from hydrogel_gym.runs.policies import load_policy
from hydrogel_gym.runs.presets import read_run_options
from hydrogel_gym.runs.ranks import ALONE, World, averaging, joined, world_from_environment
from hydrogel_gym.train import ppo_hybrid as trainer

RESULTS = Path(__file__).parent / "results"
SECTIONS = ("curve", "overhead", "checkpoint")
TRAINER = "train/ppo_hybrid.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
CPU = torch.device("cpu")

CURVE = "--preset quick --num-iterations 5 --no-oracle --compile off --checkpoint-interval 0"
# Learning rate, precision, and the largest difference that is still called the same curve. At the
# preset's own rate the dynamics amplify float32 rounding: there the bar is what rounding alone
# does, shown by another number of threads.
CURVES = (("2e-3", "fp64", 1e-9), ("3e-4", "fp64", 1e-9), ("3e-4", "fp32", 1e-4))
CURVES += (("2e-3", "fp32", None),)
# Ranks, and threads of each.
RUNS = {"one": (1, 1), "2 ranks": (2, 1), "4 ranks": (4, 1), "2 threads": (1, 2)}

UPDATES_PER_ROUND = 10
WHOLE = "--preset source --no-oracle --compile off --checkpoint-interval 0 --seed {seed} "
WHOLE += "--num-iterations {iterations} --num-steps {steps} --output-dir {output}"

CHECKPOINT_BAR = 0.01
# Flags that shorten a run without changing what its checkpoints hold, and by how much its
# iterations are shorter.
SHORTENED = {
    "quick": (["--num-iterations", "30"], 1),
    "full": (["--num-iterations", "12"], 1),
    "source": (["--num-iterations", "3", "--num-steps", "10"], 10),
}


def options(*flags: str) -> trainer.Args:
    """Options of the trainer's command line."""
    return read_run_options(trainer.Args, trainer.PRESETS, flags, prog=TRAINER)


def met(is_met: bool) -> str:
    """Whether a bar is."""
    return "met" if is_met else "**not met**"


def relative_difference(reference: Tensor, other: Tensor) -> float:
    """||reference - other|| / ||reference||."""
    return ((reference - other).norm() / reference.norm()).item()


def trained_weights(folder: Path, ranks: int, threads: int, flags: list[str]) -> Tensor:
    """All weights and biases after a run, float64.

    Raises:
        TrainerError: it failed.
    """
    launcher = [*TORCHRUN, f"--nproc-per-node={ranks}"] if ranks > 1 else [sys.executable]
    command = [*launcher, TRAINER, *CURVE.split(), *flags, "--output-dir", str(folder)]
    complete(f"{ranks} ranks", command, environment(threads))
    agent, _ = load_policy(folder / POLICY_FILE, trainer.Agent, CPU)
    return torch.cat([weight.detach().double().flatten() for weight in agent.parameters()])


def measure_curve(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Differences of the weights."""
    exact: dict[str, Tensor] = {}  # by learning rate
    for rate, precision, _ in tqdm(CURVES, unit="setting", desc="curve"):
        setting = f"{precision}, learning rate {rate}"
        flags = ["--learning-rate", rate, "--precision", precision]
        with tempfile.TemporaryDirectory() as folder:
            weights = {
                name: trained_weights(Path(folder, name), ranks, threads, flags)
                for name, (ranks, threads) in RUNS.items()
            }
        one = weights.pop("one")
        if precision == "fp64":
            exact[rate] = one
        else:
            weights["fp64"] = exact[rate]
        for name, others in weights.items():
            difference = relative_difference(one, others)
            yield dict(setting=setting, name=f"weights, {name}", value=difference)


def curve_text(table: pd.DataFrame) -> list[str]:
    """The section in Markdown."""
    values = table.pivot_table(index="setting", columns="name", values="value")
    names = ("weights, 2 ranks", "weights, 4 ranks", "weights, 2 threads", "weights, fp64")
    lines = [
        "## The same curve",
        "",
        "Relative difference ‖a − b‖ / ‖a‖ of all weights and biases after five iterations of the "
        "quick preset, between one process of one thread and gloo ranks of one thread each. As the "
        "measure of what rounding alone does: one process of two threads, which sums in another "
        "order, and one in float64.",
        "",
        "| | 2 ranks | 4 ranks | bar | 1 process, 2 threads | 1 process, float64 |",
        "|---" * 6 + "|",
    ]
    for rate, precision, bar in CURVES:
        row = values.loc[f"{precision}, learning rate {rate}"].reindex(names)
        cells = ["–" if math.isnan(value) else f"{value:.1e}" for value in row]
        is_met = met(row.iloc[:2].max() <= (bar or math.inf))
        cells.insert(2, "that of 2 threads" if bar is None else f"{bar:.0e}, {is_met}")
        lines.append(f"| {precision}, learning rate {rate} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "The ranks compute what one process computes: in float64 they differ by its rounding. At "
        "the preset's own learning rate a difference of the size of float32 rounding, whatever its "
        "cause, in time tips a clipped ratio or a sampled category, and from there the runs "
        "differ, as those of a single process with another number of threads do.",
    ]


def variants(
    learner: Learner, args: trainer.Args, world: World, minibatch: trainer.Batch
) -> dict[str, Callable[[], Any]]:
    """What is timed, each on an agent of its own."""
    mean = averaging(list(learner.agent.parameters()), world)  # as in training

    def plain(
        average: Callable[[Tensor], Tensor] | None = None,
        wrap: Callable[[nn.Module], nn.Module] = lambda agent: agent,
    ) -> Callable[[], Any]:
        agent = copy.deepcopy(learner.agent)
        optimizer = torch.optim.Adam(agent.parameters(), lr=1e-4, fused=True)
        wrapped = wrap(agent)
        wrapped.return_std = agent.return_std  # the loss needs it, and torch's wrapper has it not
        return lambda: trainer.gradient_step(wrapped, optimizer, args, minibatch, average)

    def compiled(
        world: World = ALONE, average: Callable[[Tensor], Tensor] | None = None
    ) -> Callable[[], Any]:
        agent = copy.deepcopy(learner.agent)
        optimizer = torch.optim.Adam([flatten_weights(agent)], lr=1e-4, fused=True)
        # Of this rank's rows, whether or not it knows of the other.
        rows = len(minibatch.logprob) * world.size
        sizes = dataclasses.replace(args, minibatch_size=rows, num_envs=rows)
        _, step = trainer.compile_learner(agent, optimizer, sizes, world)
        return lambda: step(minibatch, average)

    vector = torch.zeros(sum(weight.numel() for weight in learner.agent.parameters()))
    number = torch.zeros(1)
    return {
        "plain, nothing averaged": plain(),
        "plain, ours": plain(mean),
        "plain, ours by gloo": plain(world.average),
        "plain, DDP by default": plain(wrap=DistributedDataParallel),
        "compiled, nothing averaged": compiled(),
        "compiled, ours": compiled(world, mean),
        "compiled, ours by gloo": compiled(world, world.average),
        "ours alone": lambda: mean(vector),
        "gloo's all-reduce alone": lambda: dist.all_reduce(vector),
        "gloo's all-reduce alone, of one number": lambda: dist.all_reduce(number),
    }


def overhead_worker(preset: str, output: Path, rounds: int) -> None:
    """One of the ranks; the first writes a CSV of milliseconds per update."""
    args, cohort = options("--preset", preset), load_cohort()
    keep_freed_memory()
    with joined(world_from_environment(), CPU) as world, fast_float32(CPU):
        learner, _, _ = trainer.make_learner(args, cohort, CPU, world, False)
        obs = first_reset(learner.envs, args, args.seed, len(cohort), world)
        one_step = dataclasses.replace(args, num_steps=1)
        _, batch, _ = trainer.rollout(
            learner.envs, learner.agent, obs, one_step, learner.generator, world=world
        )
        batch = batch.rows(slice(args.minibatch_size))
        advantage = trainer.normalize_advantage(batch.advantage.unsqueeze(0)).squeeze(0)
        minibatch = batch._replace(advantage=advantage).rows(world.share(args.minibatch_size))
        setting = f"{preset}, {len(minibatch.logprob)} rows per rank"
        calls = variants(learner, args, world, minibatch)
        rows, names = [], list(calls)
        for k in range(-2, rounds):
            shift = k % len(names)
            for name in names[shift:] + names[:shift]:
                milliseconds = timed(calls[name], world)
                if k >= 0:  # the first two warm up
                    rows.append(dict(setting=setting, name=name, round=k, value=milliseconds))
        if world.rank == 0:
            pd.DataFrame(rows).to_csv(output, index=False)
        world.wait()
        os._exit(0)  # what is left of torch's wrappers may hang an interpreter that is taken down


def timed(call: Callable[[], Any], world: World) -> float:
    """Milliseconds of a call, of the slower rank."""
    call()  # what waiting has cooled
    world.wait()
    start = time.perf_counter()
    for _ in range(UPDATES_PER_ROUND):
        call()
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return 1e3 * seconds.item() / UPDATES_PER_ROUND


def measure_overhead(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Milliseconds per update, then seconds per iteration."""
    for preset in tqdm(("quick", "source"), unit="preset", desc="overhead"):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "rows.csv")
            worker = [__file__, "--worker", preset, "--worker-output", str(output)]
            worker += ["--rounds", str(args.rounds)]
            complete(preset, [*TORCHRUN, "--nproc-per-node=2", *worker], environment(1))
            yield from pd.read_csv(output).to_dict("records")
    alone = f"{{python}} {TRAINER} "
    two = f"{{python}} -m torch.distributed.run --standalone --nproc-per-node=2 {TRAINER} "
    ways = {
        "1 process, 1 thread": (alone, 1),
        "1 process, 2 threads": (alone, 2),
        "2 ranks, 1 thread each": (two, 1),
    }
    for k in tqdm(range(args.whole_rounds), desc="whole iterations", unit="round"):
        for name, (launcher, threads) in ways.items():
            sizes = dict(iterations=3, steps=20, seed=k + 1)
            run = train(name, launcher + WHOLE, ("seconds_iteration",), threads, **sizes)
            for part in ("seconds_iteration", "seconds_rollout", "seconds_update"):
                # The first iteration also asks the system for memory.
                value = run[part].iloc[1:].mean()
                yield dict(setting=f"whole, {part}", name=name, round=k, value=value)


def overhead_text(table: pd.DataFrame) -> list[str]:
    """The section in Markdown."""
    is_whole = table["setting"].str.startswith("whole")
    lines = [
        "## What averaging gradients costs",
        "",
        f"Two gloo ranks on two cores, one thread each; {UPDATES_PER_ROUND} updates a round, the "
        "rounds alternating over the variants within one run; milliseconds per update of the "
        "slower rank. The overhead is that over an update of this rank's share without averaging: "
        "the median over the rounds of the ratio within a round, which what changes on the machine "
        "from round to round leaves alone.",
    ]
    for setting, rows in table[~is_whole].groupby("setting", sort=False):
        times = rows.pivot_table(index="round", columns="name", values="value", sort=False)
        lines += ["", f"{setting}; {len(times)} rounds:", ""]
        lines += ["| | median ms | fastest ms | overhead |", "|---" * 4 + "|"]
        for name in times:
            base, over = f"{name.split(',')[0]}, nothing averaged", "–"
            if base in times and name != base:
                over = f"{100 * ((times[name] / times[base]).median() - 1):.1f} %"
            lines.append(
                f"| {name} | {times[name].median():.2f} | {times[name].min():.2f} | {over} |"
            )
    return [*lines, "", *whole_text(table[is_whole])]


def whole_text(table: pd.DataFrame) -> list[str]:
    """Whole iterations, in Markdown."""
    lines = [
        "Whole iterations of the source preset with 20 steps instead of 100 (200 updates), "
        "`--compile off`; the first of a process is left out; median [range] over "
        f"{table['round'].nunique()} rounds:",
        "",
        "| | seconds per iteration | rollout | updates | times as fast as 1 thread |",
        "|---" * 5 + "|",
    ]
    seconds = table.pivot_table(index="round", columns=["setting", "name"], values="value")
    whole = seconds["whole, seconds_iteration"]
    for name in table["name"].unique():
        cells = []
        for part in ("iteration", "rollout", "update"):
            times = seconds[f"whole, seconds_{part}", name]
            cells.append(f"{times.median():.2f} [{times.min():.2f}, {times.max():.2f}]")
        ratio = (whole["1 process, 1 thread"] / whole[name]).median()
        lines.append(f"| {name} | {' | '.join(cells)} | {ratio:.2f}× |")
    return lines


def measure_checkpoint(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Milliseconds of a checkpoint and of the table of metrics, and of an iteration."""
    for preset, (flags, shorter) in SHORTENED.items():
        with tempfile.TemporaryDirectory() as folder:
            run_dir, path = Path(folder, "run"), Path(folder, "checkpoint.pt")
            flags = ["--preset", preset, "--no-oracle", "--compile", "off", *flags]
            trainer.train(options(*flags, "--output-dir", str(run_dir)))
            metrics = pd.read_csv(run_dir / METRICS_FILE)
            # Evaluation and all; not that the table grows.
            seconds = metrics["wall_seconds"].diff().median()
            parts = metrics[["rollout_seconds", "update_seconds"]].iloc[1:].median().sum()
            iteration = 1e3 * (seconds + (shorter - 1) * parts)
            yield dict(setting=preset, name="iteration", value=iteration)
            content = unseal(checkpoint_at(run_dir))
            # As long as at the end of a run: the largest of its checkpoints.
            rows, length = content["metrics"], options("--preset", preset).num_iterations
            content["metrics"] = [rows[k % len(rows)] for k in range(length)]
            yield dict(setting=preset, name="bytes", value=len(seal(content)))
            learner, _, _ = trainer.make_learner(options(*flags), load_cohort(), CPU, ALONE, False)
            obs, _ = learner.envs.reset(seed=0)
            for k in range(args.repetitions):
                start = time.perf_counter()
                run_state(learner, obs, ALONE)
                write_atomically(path, seal(content))
                whole = time.perf_counter()
                write_csv(path.with_suffix(".csv"), content["metrics"][: length // 2])
                table = time.perf_counter()
                row = dict(setting=preset, round=k)
                yield row | dict(name="whole", value=1e3 * (whole - start))
                yield row | dict(name="table, half as long", value=1e3 * (table - whole))


def checkpoint_text(table: pd.DataFrame) -> list[str]:
    """The section in Markdown."""
    interval = trainer.Args().checkpoint_interval
    medians = table.pivot_table(index="setting", columns="name", values="value", aggfunc="median")
    spread = table[table["name"] == "whole"].groupby("setting")["value"]
    lines = [
        "## What a checkpoint costs",
        "",
        f"Medians of {table['round'].nunique()} repetitions, in milliseconds; a checkpoint with "
        "its range. It is the last of a run, whose table of metrics is the longest, and is flushed "
        "to the disk before it takes its place. The share of a run is at the default interval of "
        f"{interval} iterations; the bar is {100 * CHECKPOINT_BAR:.0f} %. The table is "
        "`metrics.csv`, which is written every iteration, at half its final length.",
        "",
        "| preset | bytes | checkpoint | an iteration | share of the run | table "
        "| share of the run |",
        "|---" * 7 + "|",
    ]
    for preset in SHORTENED:
        row, table_ms = medians.loc[preset], medians.loc[preset, "table, half as long"]
        shares = [share / row["iteration"] for share in (row["whole"] / interval, table_ms)]
        cells = [f"{100 * share:.2f} %, {met(share <= CHECKPOINT_BAR)}" for share in shares]
        lines.append(
            f"| {preset} | {row['bytes']:,.0f} "
            f"| {row['whole']:.1f} [{spread.min()[preset]:.1f}, {spread.max()[preset]:.1f}] "
            f"| {row['iteration']:,.0f} | {cells[0]} | {table_ms:.1f} | {cells[1]} |"
        )
    return [*lines, "", "An iteration of the source preset is scaled from one of 10 steps."]


MEASURE = {
    "curve": (measure_curve, curve_text),
    "overhead": (measure_overhead, overhead_text),
    "checkpoint": (measure_checkpoint, checkpoint_text),
}


def write(folder: Path, section: str, rows: list[dict[str, Any]]) -> None:
    """Put a section in its place in both files."""
    path = folder / "scaling.csv"
    table = pd.DataFrame(rows).assign(section=section, where=hardware())
    if path.exists():
        kept = pd.read_csv(path)
        table = pd.concat([kept[kept["section"] != section], table])
    table = table.reindex(columns=["section", "setting", "name", "round", "value", "where"])
    table = table.sort_values("section", key=lambda x: x.map(SECTIONS.index), kind="stable")
    write_atomically(path, table.to_csv(index=False).encode())
    write_atomically(folder / "scaling.md", markdown(table).encode())


def markdown(table: pd.DataFrame) -> str:
    """The report of the sections that the table has."""
    lines = ["Data-parallel training and checkpoints; made by `benchmark/scaling.py`."]
    for section in SECTIONS:
        rows = table[table["section"] == section]
        if len(rows):
            lines += ["", *MEASURE[section][1](rows), "", f"{rows['where'].iloc[0]}."]
    return "\n".join(lines) + "\n"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    flag("--rounds", type=int, default=30, help="of the overhead")
    flag("--whole-rounds", type=int, default=3, help="of whole iterations")
    flag("--repetitions", type=int, default=100, help="of a checkpoint")
    flag("--output-dir", type=Path, default=RESULTS)
    flag("--worker", help=argparse.SUPPRESS)
    flag("--worker-output", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, and write after every section; returns the exit code."""
    args = parse_args(argv)
    if args.worker:
        overhead_worker(args.worker, args.worker_output, args.rounds)
        return 0
    try:
        for section in SECTIONS:
            if section in args.only:
                write(args.output_dir, section, list(MEASURE[section][0](args)))
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print((args.output_dir / "scaling.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
