"""Whether many ranks learn the same as one, and what they, and checkpoints, cost.

    python benchmark/scaling.py                              # a quarter of an hour on two cores
    python benchmark/scaling.py --only roofline              # nothing is timed: seconds
    python benchmark/scaling.py --only overhead --rounds 60

Four sections; `--only` does some and keeps what the files hold of the others:

- `curve`: weights after five iterations on 2 and 4 gloo ranks, against those of one process.
- `overhead`: an update on two ranks of one thread each, with and without averaging the gradients
  over them, beside torch's `DistributedDataParallel`; rounds alternate over the variants within one
  run, and a round takes as long as its slower rank. Then whole iterations of one and two ranks.
- `checkpoint`: a checkpoint, and the table that is written every iteration, as a share of the run.
- `roofline`: an iteration of the source preset on 1, 8 and 16 A100s, on paper.

Writes `results/scaling.csv` (every figure of every round) and `results/scaling.md`. Ranks are
processes of `torchrun`. What else the machine does hits two ranks that wait for each other harder
than two that do not. So a round begins when other processes leave the processor alone, for which
it waits a little (`--patience`); and where enough rounds were left alone to their end (`QUIET`),
only they are reported.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import io
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.distributed as dist
from baselines.policy import TRAINER, load_trainer
from environment import LAUNCH_US, CountOperations, hardware
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from trainers.launch import ROOT, TrainerError, environment, train

from hydrogel_gym import load_cohort
from hydrogel_gym.files import write_atomically
from hydrogel_gym.memory import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
SECTIONS = ("curve", "overhead", "checkpoint", "roofline")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
CPU = torch.device("cpu")

CURVE = "--preset quick --num-iterations 5 --no-oracle --compile off --checkpoint-interval 0"
# Learning rate, precision, and the largest difference that is still called the same curve. At the
# preset's own rate the dynamics amplify float32 rounding: there the bar is what rounding alone
# does, shown by another number of threads.
CURVES = (("2e-3", "fp64", 1e-9), ("3e-4", "fp64", 1e-9), ("3e-4", "fp32", 1e-4))
CURVES += (("2e-3", "fp32", None),)
RANKS_THREADS = ((1, 1), (2, 1), (4, 1), (1, 2))

OVERHEAD_PRESETS = ("quick", "source")
OVERHEAD_BAR = 0.15
UPDATES_PER_ROUND = 10
QUIET = 0.15  # cores that others may take of a quiet round
LEAST_QUIET_ROUNDS = 5
LOOK_SECONDS = 0.1
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

# Of an A100 (SXM, 80 GB): NVIDIA A100 Tensor Core GPU data sheet.
TF32_FLOPS = 156e12  # dense; what float32 is multiplied in by the trainer on CUDA
MEMORY_BYTES_PER_S = 2.0e12  # 1.6e12 with 40 GB
NVLINK_BYTES_PER_S = 300e9  # one direction of 600 GB/s
# Of a DGX A100: its data sheet has one 200 Gbit/s HDR adapter for each of eight GPUs.
GPUS_PER_NODE = 8
NETWORK_BYTES_PER_S = 25e9
# Assumed: no source, of the order that such systems show.
PRODUCT_SHARE = 0.3  # of the peak, for products of this size
KERNEL_US = 2.0  # what a kernel takes on the device, however little it does
REDUCE_US = {1: 30.0, 2: 75.0}  # latency of a collective, by nodes
SORTED_KEYS_PER_S = 2e9  # of a permutation
TABLE_US = 5000.0  # to write metrics.csv, where this script has not measured it
# What averaging adds to the launches of an update. Plain: copies into and out of one vector, the
# all-reduce, the division. Compiled: the last two. As CUDA graphs: one graph more, and the copies
# of the gradient into and out of it.
WAYS = {"plain": 4, "compiled": 2, "replayed": 5}
GPUS = (1, 8, 16)


def relative_difference(reference: Tensor, other: Tensor) -> float:
    """||reference - other|| / ||reference||."""
    return ((reference - other).norm() / reference.norm()).item()


# The same curve


def trained(
    trainer: ModuleType, folder: Path, ranks: int, threads: int, flags: list[str]
) -> tuple[Tensor, pd.DataFrame]:
    """All weights and biases, float64, and the metrics of a run.

    Raises:
        TrainerError: it failed.
    """
    launcher = [*TORCHRUN, f"--nproc-per-node={ranks}"] if ranks > 1 else [sys.executable]
    ended = subprocess.run(
        [*launcher, str(TRAINER), *CURVE.split(), *flags, "--output-dir", str(folder)],
        cwd=ROOT,
        env=environment(threads),
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        raise TrainerError(f"{ranks} ranks: {''.join(ended.stderr.strip().splitlines()[-1:])}")
    agent, _ = trainer.load_policy(folder / trainer.POLICY_FILE, "cpu")
    weights = torch.cat([weight.detach().double().flatten() for weight in agent.parameters()])
    return weights, pd.read_csv(folder / trainer.METRICS_FILE)


def largest_difference(reference: pd.DataFrame, other: pd.DataFrame) -> float:
    """Largest relative difference of the metrics, those that tell of time left out."""
    names = [name for name in reference if "second" not in name]
    a, b = (table[names].dropna(axis=1) for table in (reference, other))
    return ((a - b).abs() / a.abs().clip(lower=1e-6)).max().max()


def measure_curve(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Differences of weights and metrics."""
    trainer = load_trainer()
    exact: dict[str, Tensor] = {}  # by learning rate
    for rate, precision, _ in tqdm(CURVES, unit="setting", desc="curve"):
        setting = f"{precision}, learning rate {rate}"
        flags = ["--learning-rate", rate, "--precision", precision]
        runs = {}
        with tempfile.TemporaryDirectory() as folder:
            for ranks, threads in RANKS_THREADS:
                run_dir = Path(folder, f"{ranks}-{threads}")
                runs[ranks, threads] = trained(trainer, run_dir, ranks, threads, flags)
        weights, metrics = runs.pop((1, 1))
        exact.setdefault(rate, weights)
        for (ranks, threads), (others, table) in runs.items():
            name = f"{ranks} ranks" if ranks > 1 else f"{threads} threads"
            yield dict(
                setting=setting, name=f"weights, {name}", value=relative_difference(weights, others)
            )
            yield dict(
                setting=setting, name=f"metrics, {name}", value=largest_difference(metrics, table)
            )
        if precision != "fp64":
            difference = relative_difference(exact[rate], weights)
            yield dict(setting=setting, name="weights, fp64", value=difference)


def tell_curve(table: pd.DataFrame) -> list[str]:
    """The section in Markdown."""
    values = table.pivot_table(index="setting", columns="name", values="value")
    names = ("weights, 2 ranks", "weights, 4 ranks", "weights, 2 threads", "weights, fp64")
    names += ("metrics, 2 ranks", "metrics, 4 ranks")
    lines = [
        "## The same curve",
        "",
        "Relative difference ‖a − b‖ / ‖a‖ of all weights and biases after five iterations of the "
        "quick preset, between one process of one thread and gloo ranks of one thread each. As the "
        "measure of what rounding alone does: one process of two threads, which sums in another "
        "order, and one in float64. Of the metrics, the largest relative difference of any cell "
        "of `metrics.csv` that does not tell of time.",
        "",
        "| | 2 ranks | 4 ranks | bar | 1 process, 2 threads | 1 process, float64 "
        "| metrics, 2 ranks | metrics, 4 ranks |",
        "|---" * 8 + "|",
    ]
    for rate, precision, bar in CURVES:
        row = values.loc[f"{precision}, learning rate {rate}"]
        told = [row.get(name, math.nan) for name in names]
        cells = ["–" if math.isnan(value) else f"{value:.1e}" for value in told]
        worst = max(row["weights, 2 ranks"], row["weights, 4 ranks"])
        is_met = "that of 2 threads" if bar is None else f"{bar:.0e}, {met(worst <= bar)}"
        cells.insert(2, is_met)
        lines.append(f"| {precision}, learning rate {rate} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "The ranks compute what one process computes: in float64 they differ by its rounding. At "
        "the preset's own learning rate a difference of the size of float32 rounding, whatever its "
        "cause, in time tips a clipped ratio or a sampled category, and from there the runs "
        "differ, as those of a single process with another number of threads do.",
    ]


def met(is_met: bool) -> str:
    """Whether a bar is."""
    return "met" if is_met else "**not met**"


# What averaging gradients costs


def cpu_seconds() -> float:
    """That all processes took since the machine started; NaN where it cannot be known."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(text) for text in file.readline().split()[1:9]]
    except OSError:
        return math.nan
    idle = ticks[3] + ticks[4]
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")


def distributed_step(trainer: ModuleType, agent: nn.Module, args: Any, **options: Any) -> Any:
    """`PlainStep` whose gradients torch's own wrapper averages."""
    step = trainer.PlainStep(agent, args)
    step.agent = DistributedDataParallel(agent, **options)
    step.agent.return_std = agent.return_std  # the loss asks for it, and the wrapper does not
    return step


def variants(
    trainer: ModuleType, learner: Any, args: Any, world: Any, minibatch: Any
) -> dict[str, Callable[[], Any]]:
    """What is timed, each on an agent of its own."""

    def agent() -> nn.Module:
        return copy.deepcopy(learner.agent)

    def shared(step: Any) -> Any:
        step.average = trainer.averaging(learner.agent, world)  # as in training
        return step

    views = dict(gradient_as_bucket_view=True, static_graph=True)
    steps = {
        "plain, nothing averaged": trainer.PlainStep(agent(), args),
        "plain, ours": shared(trainer.PlainStep(agent(), args, world)),
        "plain, ours by gloo": trainer.PlainStep(agent(), args, world),
        "plain, DDP by default": distributed_step(trainer, agent(), args),
        "plain, DDP with views, static": distributed_step(trainer, agent(), args, **views),
        "compiled, nothing averaged": trainer.CompiledStep(agent(), args),
        "compiled, ours": shared(trainer.CompiledStep(agent(), args, world)),
        "compiled, ours by gloo": trainer.CompiledStep(agent(), args, world),
    }
    for name, step in steps.items():
        if name.startswith("compiled"):
            step.warm_up(minibatch)
    vector = torch.zeros(sum(weight.numel() for weight in learner.agent.parameters()))
    number = torch.zeros(1)
    mean = trainer.averaging(learner.agent, world)
    return {
        **{name: (lambda step=step: step(minibatch, 1e-4)) for name, step in steps.items()},
        "ours alone": lambda: mean(vector),
        "gloo's all-reduce alone": lambda: dist.all_reduce(vector),
        "gloo's all-reduce alone, of one number": lambda: dist.all_reduce(number),
    }


def overhead_worker(preset: str, output: Path, rounds: int, patience: float) -> None:
    """One of the ranks; the first writes a CSV of milliseconds per update."""
    trainer = load_trainer()
    args = trainer.parse_args(["--preset", preset])
    keep_freed_memory()
    with (
        trainer.joined(trainer.world_from_environment(), CPU) as world,
        trainer.fast_float32(CPU),
    ):
        learner = trainer.make_learner(args, load_cohort(), CPU, compile=False, world=world)
        obs = trainer.first_reset(learner.envs, args, args.num_envs, world)
        one_step = dataclasses.replace(args, num_steps=1)
        generator = torch.Generator().manual_seed(0)
        _, batch, _ = trainer.rollout(
            learner.envs, learner.agent, obs, one_step, generator, world=world
        )
        batch = batch.rows(slice(args.minibatch_size))
        advantage = trainer.normalize_advantage(batch.advantage.unsqueeze(0)).squeeze(0)
        minibatch = batch._replace(advantage=advantage).rows(world.share(args.minibatch_size))
        calls = variants(trainer, learner, args, world, minibatch)
        rows, names, looks = [], list(calls), int(patience / LOOK_SECONDS)
        for k in tqdm(range(-2, rounds), desc=preset, unit="round", disable=world.rank > 0):
            shift = k % len(names)
            for name in names[shift:] + names[:shift]:
                looks -= wait_for_quiet(world, looks)
                told = timed(calls[name], world)
                if k >= 0:  # the first two warm up
                    setting = f"{preset}, {minibatch.num_samples} rows per rank"
                    rows.append(dict(setting=setting, name=name, round=k) | told)
        if world.rank == 0:
            pd.DataFrame(rows).to_csv(output, index=False)
        world.wait()
        # What is left of torch's wrappers may hang or abort an interpreter that is taken down.
        sys.stderr.flush()
        os._exit(0)


def wait_for_quiet(world: Any, looks: int) -> int:
    """Wait until others take little of the processor; returns how many looks that took."""
    for k in range(looks):
        busy = cpu_seconds()
        time.sleep(LOOK_SECONDS)
        is_busy = cpu_seconds() - busy > QUIET * LOOK_SECONDS
        # The ranks look together, and agree.
        if not world.any(torch.tensor([is_busy], dtype=torch.int32)).item():
            return k + 1
    return looks


def timed(call: Callable[[], Any], world: Any) -> dict[str, float]:
    """Milliseconds of a call: of the slower rank, and on the processor; cores that others took."""
    call()  # what waiting has cooled
    world.wait()
    busy, own, start = cpu_seconds(), time.process_time(), time.perf_counter()
    for _ in range(UPDATES_PER_ROUND):
        call()
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    own = torch.tensor(time.process_time() - own, dtype=torch.float64)
    world.wait()
    busy = cpu_seconds() - busy
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    dist.all_reduce(own)
    return {
        "value": 1e3 * seconds.item() / UPDATES_PER_ROUND,
        "processor": 1e3 * own.item() / world.size / UPDATES_PER_ROUND,
        "others": (busy - own.item()) / seconds.item(),
    }


def measure_overhead(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Milliseconds per update, then seconds per iteration."""
    for preset in OVERHEAD_PRESETS:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "rows.csv")
            worker = [__file__, "--worker", preset, "--worker-output", str(output)]
            worker += ["--rounds", str(args.rounds), "--patience", str(args.patience)]
            ended = subprocess.run(
                [*TORCHRUN, "--nproc-per-node=2", *worker],
                env=environment(1),
            )
            if ended.returncode:
                raise TrainerError(f"overhead, {preset}: exit code {ended.returncode}")
            yield from pd.read_csv(output).to_dict("records")
    alone, two = "{python} train/ppo_hybrid.py ", "{python} -m torch.distributed.run --standalone "
    two += "--nproc-per-node=2 train/ppo_hybrid.py "
    ways = {
        "1 process, 1 thread": (alone, 1),
        "1 process, 2 threads": (alone, 2),
        "2 ranks, 1 thread each": (two, 1),
    }
    for k in tqdm(range(args.whole_rounds), desc="whole iterations", unit="round"):
        for name, (launcher, threads) in ways.items():
            sizes = dict(iterations=3, steps=20, seed=k + 1)
            told = train(name, launcher + WHOLE, ("seconds_iteration",), threads, **sizes)
            for part in ("seconds_iteration", "seconds_rollout", "seconds_update"):
                # The first iteration also asks the system for memory.
                value = told[part].iloc[1:].mean()
                yield dict(setting=f"whole, {part}", name=name, round=k, value=value)


def quiet_rounds(table: pd.DataFrame) -> tuple[pd.DataFrame, bool]:
    """The rounds of all variants that others left alone, or all if too few are."""
    quiet = table[table["others"] < QUIET]
    timed_rounds = quiet[quiet["name"].str.contains("plain|compiled")]
    counts = timed_rounds.groupby("name").size()
    names = table.loc[table["name"].str.contains("plain|compiled"), "name"].nunique()
    enough = len(counts) == names and counts.min() >= LEAST_QUIET_ROUNDS
    if not enough:
        return table, False
    # An all-reduce alone is over too soon for what others took to be known.
    short = table[~table["name"].isin(timed_rounds["name"])]
    return pd.concat([timed_rounds, short]), True


def tell_overhead(table: pd.DataFrame) -> list[str]:
    """The section in Markdown."""
    lines = [
        "## What averaging gradients costs",
        "",
        f"Two gloo ranks on two cores, one thread each; {UPDATES_PER_ROUND} updates a round, the "
        "rounds alternating over the variants within one run; milliseconds per update of the "
        "slower rank. The overhead is that over an update of this rank's share without averaging: "
        "the median over the rounds of the ratio within a round, which what changes on the machine "
        "from round to round leaves alone; that of the medians; and that of the fastest rounds. "
        f"The bar is {100 * OVERHEAD_BAR:.0f} %. Time "
        "on the processor is the mean of the ranks, all threads, and has no waiting in it.",
    ]
    parts = table[~table["setting"].str.startswith("whole")]
    for setting, rows in parts.groupby("setting", sort=False):
        chosen, is_quiet = quiet_rounds(rows)
        rounds = rows["round"].nunique()
        which = f"rounds in which others took less than {QUIET:g} cores"
        if not is_quiet:
            took = rows["others"].median()
            which = f"all rounds: too few were quiet, others took {took:.1f} cores"
        lines += [
            "",
            f"{setting}; {rounds} rounds; {which}:",
            "",
            "| | rounds | median ms | fastest ms | on the processor, ms | overhead within a round "
            "| of medians | of fastest |",
            "|---" * 8 + "|",
        ]
        groups = dict(list(chosen.groupby("name", sort=False)))
        for name in rows["name"].unique():
            base_name = f"{name.split(',')[0]}, nothing averaged"
            own, base, over = groups[name], groups.get(base_name), ["–"] * 3
            if base is not None and name != base_name:
                times, base_times = (x.set_index("round")["value"] for x in (own, base))
                ratios = [
                    (times / base_times).median(),  # of rounds that both have
                    times.median() / base_times.median(),
                    times.min() / base_times.min(),
                ]
                over = [f"{100 * (ratio - 1):.1f} %" for ratio in ratios]
            lines.append(
                f"| {name} | {len(own)} | {own['value'].median():.2f} | {own['value'].min():.2f} "
                f"| {own['processor'].median():.2f} | {' | '.join(over)} |"
            )
    lines += [
        "",
        "Whole iterations of the source preset with 20 steps instead of 100 (200 updates), "
        "`--compile off`; the first of a process is left out; median [range] over "
        f"{whole_rounds(table)} rounds:",
        "",
        "| | seconds per iteration | rollout | updates | times as fast as 1 thread |",
        "|---" * 5 + "|",
    ]
    whole = {
        part: table[table["setting"] == f"whole, seconds_{part}"].pivot(
            index="round", columns="name", values="value"
        )
        for part in ("iteration", "rollout", "update")
    }
    for name in table.loc[table["setting"] == "whole, seconds_iteration", "name"].unique():
        cells = [
            f"{whole[part][name].median():.2f} [{whole[part][name].min():.2f}, "
            f"{whole[part][name].max():.2f}]"
            for part in whole
        ]
        seconds = whole["iteration"]
        ratio = (seconds["1 process, 1 thread"] / seconds[name]).median()
        lines.append(f"| {name} | {' | '.join(cells)} | {ratio:.2f}× |")
    return lines


def whole_rounds(table: pd.DataFrame) -> int:
    """Rounds of whole iterations."""
    return table.loc[table["setting"].str.startswith("whole"), "round"].nunique()


# What a checkpoint costs


def measure_checkpoint(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Milliseconds of each part of a checkpoint, and of an iteration."""
    trainer = load_trainer()
    for preset, (flags, shorter) in SHORTENED.items():
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            captured: dict[str, Any] = {}
            run_state, seal = trainer.run_state, trainer.seal

            def keep_state(*inputs: Any, run_state: Any = run_state, into: dict = captured) -> Any:
                into["state"] = inputs
                return run_state(*inputs)

            def keep_content(content: Any, seal: Any = seal, into: dict = captured) -> bytes:
                into["content"] = content
                return seal(content)

            trainer.run_state, trainer.seal = keep_state, keep_content
            try:
                argv = ["--preset", preset, "--no-oracle", "--compile", "off", *flags]
                run_args = trainer.parse_args([*argv, "--output-dir", f"{folder}/run"])
                run_args.checkpoint_interval = run_args.num_iterations  # one, at the end
                trainer.train(run_args)
            finally:
                trainer.run_state, trainer.seal = run_state, seal
            metrics = pd.read_csv(Path(folder, "run", trainer.METRICS_FILE))
            full = trainer.parse_args(["--preset", preset])
            # Evaluation and all; not that the table grows.
            seconds = metrics["wall_seconds"].diff().median()
            parts = metrics[["rollout_seconds", "update_seconds"]].iloc[1:].median().sum()
            yield dict(
                setting=preset,
                name="iteration",
                value=1e3 * (seconds + (shorter - 1) * parts),
            )
            content = captured["content"]
            # As long as at the end of a run: the largest of its checkpoints.
            kept = content["metrics"]
            content["metrics"] = [kept[k % len(kept)] for k in range(full.num_iterations)]
            yield from checkpoint_parts(trainer, preset, captured, Path(folder), args.repetitions)


def checkpoint_parts(
    trainer: ModuleType, preset: str, captured: dict[str, Any], folder: Path, repetitions: int
) -> Iterator[dict[str, Any]]:
    """Milliseconds of the parts, repeated, and the size in bytes."""
    content = captured["content"]
    sealed = trainer.seal(content)
    yield dict(setting=preset, name="bytes", value=len(sealed))
    calls = {
        "state": lambda: trainer.run_state(*captured["state"]),
        "to bytes": lambda: torch.save(content, io.BytesIO()),
        "hash": lambda: hashlib.sha256(sealed).hexdigest(),
        "write": lambda: write_atomically(folder / "checkpoint.pt", sealed),
        "whole": lambda: (
            trainer.run_state(*captured["state"]),
            write_atomically(folder / "checkpoint.pt", trainer.seal(content)),
        ),
        "table": lambda: trainer.write_csv(folder / "metrics.csv", content["metrics"]),
        "table, half as long": lambda: trainer.write_csv(
            folder / "metrics.csv", content["metrics"][: len(content["metrics"]) // 2]
        ),
    }
    for k in range(repetitions):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            yield dict(setting=preset, name=name, round=k, value=1e3 * elapsed)


def tell_checkpoint(table: pd.DataFrame) -> list[str]:
    """The section in Markdown."""
    interval = load_trainer().Args().checkpoint_interval
    repetitions = table["round"].nunique()
    medians = table.pivot_table(index="setting", columns="name", values="value", aggfunc="median")
    spread = table[table["name"] == "whole"].groupby("setting")["value"]
    lines = [
        "## What a checkpoint costs",
        "",
        f"Medians of {repetitions} repetitions, in turn, in milliseconds; the whole with its "
        "range. The checkpoint is the last of a run, whose table of metrics is the longest; it is "
        "flushed to the disk before it takes its place. The share of a run is at the default "
        f"interval of {interval} iterations; the bar is {100 * CHECKPOINT_BAR:.0f} %. The table is "
        "`metrics.csv`, which is written every iteration, at half its final length.",
        "",
        "| preset | bytes | state | to bytes | hash | write | the whole | an iteration "
        "| share of the run | table | share of the run |",
        "|---" * 11 + "|",
    ]
    for preset in SHORTENED:
        row = medians.loc[preset]
        low, high = spread.min()[preset], spread.max()[preset]
        parts = " | ".join(f"{row[name]:.1f}" for name in ("state", "to bytes", "hash", "write"))
        shares = (row["whole"] / interval, row["table, half as long"])
        shares = [share / row["iteration"] for share in shares]
        told = [f"{100 * share:.2f} %, {met(share <= CHECKPOINT_BAR)}" for share in shares]
        lines.append(
            f"| {preset} | {row['bytes']:,.0f} | {parts} | {row['whole']:.1f} [{low:.1f}, "
            f"{high:.1f}] | {row['iteration']:,.0f} | {told[0]} "
            f"| {row['table, half as long']:.1f} | {told[1]} |"
        )
    return [*lines, "", "An iteration of the source preset is scaled from one of 10 steps."]


# Many GPUs, on paper


class Work(NamedTuple):
    """What an iteration has to do, of all ranks."""

    parameters: int
    multiply_adds: int  # of the forward pass, a row
    minibatch_rows: int
    updates: int
    steps: int
    epochs: int
    samples: int
    bytes_gathered: int  # a sample
    tensors_gathered: int
    fixed_bytes: float  # that the operations of an update read and write
    row_bytes: float  # the same for each row


class Launches(NamedTuple):
    """Kernels that the host launches, and that the device executes, in one way of running."""

    update: int
    update_kernels: int
    step: int
    step_kernels: int
    evaluation: int  # an iteration, on rank 0


class CountBytes(CountOperations):
    """Sums the sizes of what operations read and write."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run an operation."""
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.count += sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        return result


def nodes(gpus: int) -> int:
    """Machines that so many GPUs fill."""
    return math.ceil(gpus / GPUS_PER_NODE)


def bandwidth(gpus: int) -> float:
    """Bytes a second of the slowest link of a ring."""
    return NVLINK_BYTES_PER_S if nodes(gpus) == 1 else NETWORK_BYTES_PER_S


def reduce_us(size: float, gpus: int) -> float:
    """Microseconds of a ring all-reduce of so many bytes."""
    if gpus == 1:
        return 0.0
    latency = REDUCE_US[min(nodes(gpus), 2)]
    return latency + 1e6 * 2 * (gpus - 1) / gpus * size / bandwidth(gpus)


def gather_us(size: float, messages: int, gpus: int) -> float:
    """Microseconds to give every rank all of so many bytes."""
    if gpus == 1:
        return 0.0
    latency = REDUCE_US[min(nodes(gpus), 2)]
    return messages * latency + 1e6 * (gpus - 1) / gpus * size / bandwidth(gpus)


def flops_per_update(work: Work, rows: float) -> float:
    """Two a multiply-accumulate, and the backward pass has two products for one of the forward."""
    return 6.0 * work.multiply_adds * rows


def compute_us(work: Work, rows: float) -> float:
    """Microseconds of products and memory traffic of an update of so many rows."""
    products = flops_per_update(work, rows) / (TF32_FLOPS * PRODUCT_SHARE)
    traffic = (work.fixed_bytes + work.row_bytes * rows) / MEMORY_BYTES_PER_S
    return 1e6 * (products + traffic)


def shuffle_us(work: Work) -> float:
    """Microseconds of an iteration that every rank spends on the minibatches of all."""
    # Per sample: a sorted key; the advantage and its place, read and written a few times.
    seconds = 1.0 / SORTED_KEYS_PER_S + 40.0 / MEMORY_BYTES_PER_S
    return 1e6 * work.epochs * work.samples * seconds


def on_paper(
    work: Work, launches: Launches, gpus: int, averaging: int, table_us: float
) -> dict[str, float]:
    """An iteration on so many GPUs: microseconds, by part.

    Args:
        work: of all ranks.
        launches: of the way of running.
        gpus: ranks.
        averaging: launches that it adds to an update.
        table_us: to write the table of metrics on rank 0.
    """
    rows = work.minibatch_rows / gpus
    extra = averaging if gpus > 1 else 0
    host = (launches.update + extra) * LAUNCH_US
    compute = compute_us(work, rows)
    # A kernel takes its least time besides the work; host and device go on side by side.
    kernels = launches.update_kernels * KERNEL_US
    reduce = reduce_us(4.0 * work.parameters, gpus)
    update = max(host, kernels + compute) + reduce
    step = max(launches.step * LAUNCH_US, launches.step_kernels * KERNEL_US)
    gather = gather_us(work.bytes_gathered * work.samples, work.tensors_gathered, gpus)
    evaluation = launches.evaluation * LAUNCH_US + table_us
    serial = evaluation + gather + shuffle_us(work)
    return {
        "rows per rank": rows,
        "compute": compute,
        "launches": host,
        "kernels": kernels,
        "all-reduce": reduce,
        "update": update,
        "rollout": work.steps * step,
        "evaluation": evaluation,
        "gather": gather,
        "serial": serial,
        "iteration": work.updates * update + work.steps * step + serial,
    }


def read_launches() -> dict[str, dict[str, int]]:
    """What `launches.py` counted: part, then way."""
    counts = {}
    for line in (RESULTS / "launches.md").read_text().splitlines():
        if found := re.match(r"\| (\w+), an? \w+ \|[^|]*\|(.+)\|", line):
            values = [int(cell.replace(",", "")) for cell in found[2].split("|")]
            counts[found[1]] = dict(zip(WAYS, values, strict=True))
    return counts


def count_launches(evaluation: int) -> dict[str, Launches]:
    """By way of running; `evaluation` as it is, which no way of running changes."""
    counts = read_launches()
    told = {}
    for way in WAYS:
        update, policy, envs = (counts[part][way] for part in ("update", "policy", "environments"))
        update_kernels, step_kernels = update, policy + envs
        if way == "replayed":  # what the graph holds, besides what is launched
            update_kernels += counts["update"]["compiled"]
            step_kernels += counts["policy"]["compiled"]
        told[way] = Launches(update, update_kernels, policy + envs, step_kernels, evaluation)
    return told


def count_work(trainer: ModuleType, preset: str) -> tuple[Work, int]:
    """What an iteration of a preset does, and operations of its evaluation."""
    args = trainer.parse_args(["--preset", preset])
    cohorts = (load_cohort(), load_cohort("holdout"))
    learner = trainer.make_learner(args, cohorts[0], CPU, compile=False)
    agent = learner.agent
    obs, _ = learner.envs.reset(seed=0)
    one_step = dataclasses.replace(args, num_steps=1)
    generator = torch.Generator().manual_seed(0)
    _, batch, told = trainer.rollout(learner.envs, agent, obs, one_step, generator)
    gathered = tree_leaves((batch, told))
    traffic = {}
    for rows in (500, 1000):
        minibatch = batch.rows(slice(rows))
        learner.step(minibatch, 1e-4)  # Adam's state is made by the first
        with CountBytes() as counter:
            learner.step(minibatch, 1e-4)
        traffic[rows] = counter.count
    row_bytes = (traffic[1000] - traffic[500]) / 500
    samples = args.num_envs * args.num_steps
    layers = [layer for layer in agent.modules() if isinstance(layer, nn.Linear)]
    work = Work(
        parameters=sum(weight.numel() for weight in agent.parameters()),
        multiply_adds=sum(layer.in_features * layer.out_features for layer in layers),
        minibatch_rows=args.minibatch_size,
        updates=args.num_epochs * samples // args.minibatch_size,
        steps=args.num_steps,
        epochs=args.num_epochs,
        samples=samples,
        bytes_gathered=sum(x.numel() * x.itemsize for x in gathered) // args.num_envs,
        tensors_gathered=len(gathered),
        fixed_bytes=traffic[500] - 500 * row_bytes,
        row_bytes=row_bytes,
    )
    with CountOperations() as counter:
        for cohort in cohorts:
            trainer.evaluate(agent, trainer.make_envs(args, cohort, CPU), args)
    return work, counter.count


def scaled(work: Work, gpus: int) -> Work:
    """So many times the environments and the minibatch."""
    return work._replace(minibatch_rows=work.minibatch_rows * gpus, samples=work.samples * gpus)


def measure_roofline(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Counts of both networks, and the source preset on many GPUs."""
    trainer = load_trainer()
    table_us = TABLE_US
    if (args.output_dir / "scaling.csv").exists():
        held = pd.read_csv(args.output_dir / "scaling.csv")
        written = held[(held["section"] == "checkpoint") & (held["name"] == "table, half as long")]
        if len(written):
            table_us = 1e3 * written.loc[written["setting"] == "source", "value"].median()
    for preset in ("quick", "source"):
        work, evaluation = count_work(trainer, preset)
        for name, value in (work._asdict() | {"evaluation": evaluation}).items():
            yield dict(setting=preset, name=name, value=value)
    for way, launches in count_launches(evaluation).items():
        for kind in ("strong", "weak"):
            for gpus in GPUS:
                done = scaled(work, gpus) if kind == "weak" else work
                parts = on_paper(done, launches, gpus, WAYS[way], table_us)
                for name, value in parts.items():
                    yield dict(setting=f"{kind}, {gpus}, {way}", name=name, value=value)


def tell_roofline(table: pd.DataFrame) -> list[str]:
    """The section in Markdown."""
    values = table.pivot_table(index="setting", columns="name", values="value")
    works = {p: Work(*(values.loc[p, name] for name in Work._fields)) for p in ("quick", "source")}
    lines = [
        "## Many A100s, on paper",
        "",
        "Nothing here is measured on a GPU.",
        "",
        "| counted | quick | source |",
        "|---|---|---|",
    ]
    for label, figure in (
        ("parameters", lambda w: f"{w.parameters:,.0f}"),
        ("bytes all-reduced per update", lambda w: f"{4 * w.parameters:,.0f}"),
        ("updates per iteration", lambda w: f"{w.updates:,.0f}"),
        ("bytes gathered per sample", lambda w: f"{w.bytes_gathered:,.0f}"),
        ("MB gathered per iteration", lambda w: f"{w.bytes_gathered * w.samples / 1e6:.1f}"),
        (
            "GFLOP per update (6 × multiply-accumulates × rows)",
            lambda w: f"{flops_per_update(w, w.minibatch_rows) / 1e9:.2f}",
        ),
        (
            "MB read and written per update, operation by operation",
            lambda w: f"{(w.fixed_bytes + w.row_bytes * w.minibatch_rows) / 1e6:.0f}",
        ),
    ):
        lines.append(f"| {label} | {figure(works['quick'])} | {figure(works['source'])} |")
    lines += [
        "",
        "| quantity | value | source |",
        "|---|---|---|",
        f"| TF32 products, dense | {TF32_FLOPS / 1e12:.0f} TFLOP/s | NVIDIA A100 data sheet |",
        f"| share of it that products of this size reach | {PRODUCT_SHARE:.0%} | assumed |",
        f"| memory | {MEMORY_BYTES_PER_S / 1e12:.1f} TB/s | NVIDIA A100 data sheet (80 GB SXM; "
        "1.6 with 40 GB) |",
        f"| NVLink, each way | {NVLINK_BYTES_PER_S / 1e9:.0f} GB/s | NVIDIA A100 data sheet (600 "
        "GB/s both ways) |",
        f"| between nodes of {GPUS_PER_NODE} GPUs, one adapter | {NETWORK_BYTES_PER_S / 1e9:.0f} "
        "GB/s | 200 Gbit/s HDR InfiniBand, DGX A100 data sheet |",
        f"| latency of a collective, one node / two | {REDUCE_US[1]:.0f} / {REDUCE_US[2]:.0f} µs "
        "| assumed |",
        f"| a launch | {LAUNCH_US:g} µs of the host | assumed; counts: `launches.md` |",
        f"| a kernel, besides its work | {KERNEL_US:g} µs of the device | assumed |",
        f"| sorting, for a permutation | {SORTED_KEYS_PER_S / 1e9:g}e9 keys/s | assumed |",
        "",
        "An update takes the longer of what the host launches and what the device executes, then "
        "the ring all-reduce: latency + 2 (N − 1) / N × bytes / bandwidth. Serial is what more "
        "GPUs do not share, spread over the updates: evaluation of both cohorts and the table of "
        "metrics on rank 0, the gathering of the batch, and the permutation of all samples, which "
        "every rank draws. An iteration has the rollout besides. Speed-up and efficiency are those "
        "of samples per second of whole iterations, against one GPU run the same way.",
    ]
    titles = {
        "strong": "The source preset as it is: 2,000 rows per minibatch over all GPUs (strong "
        "scaling).",
        "weak": "2,000 rows per GPU and update, N × 2,000 environments (weak scaling); another "
        "problem for the optimiser, whose minibatch is N times as large.",
    }
    for kind, title in titles.items():
        lines += [
            "",
            title,
            "",
            "| GPUs | run | rows per rank | compute µs | kernels µs | launches µs | all-reduce µs "
            "| µs per update | serial, µs per update | rollout, ms | ms per iteration | speed-up "
            "| efficiency |",
            "|---" * 13 + "|",
        ]
        for way in WAYS:
            base = values.loc[f"{kind}, 1, {way}", "iteration"]
            for gpus in GPUS:
                row = values.loc[f"{kind}, {gpus}, {way}"]
                speed_up = base / row["iteration"] * (gpus if kind == "weak" else 1)
                lines.append(
                    f"| {gpus} | {way} | {row['rows per rank']:,.0f} | {row['compute']:.0f} "
                    f"| {row['kernels']:.0f} | {row['launches']:.0f} | {row['all-reduce']:.0f} "
                    f"| {row['update']:.0f} | {row['serial'] / works['source'].updates:.0f} "
                    f"| {row['rollout'] / 1e3:.0f} | {row['iteration'] / 1e3:,.0f} "
                    f"| {speed_up:.2f}× | {100 * speed_up / gpus:.0f} % |"
                )
    return [
        *lines,
        "",
        conclusion(values),
    ]


def conclusion(values: pd.DataFrame) -> str:
    """What limits it."""
    one, eight = values.loc["strong, 1, replayed"], values.loc["strong, 8, replayed"]
    weak = [values.loc[f"weak, {gpus}, replayed", "iteration"] for gpus in GPUS]
    best = max(
        values.loc[f"strong, 1, {way}", "iteration"]
        / values.loc[f"strong, {gpus}, {way}", "iteration"]
        for way in WAYS
        for gpus in GPUS
    )
    return (
        f"A network of {values.loc['source', 'parameters'] / 1e3:.0f} thousand parameters is bound "
        f"by latency. Even as CUDA graphs, {one['kernels']:.0f} of the {one['update']:.0f} µs of "
        "an update are the least times of its kernels, which no further GPU shortens; products "
        f"and memory traffic, all that GPUs can share, are {one['compute']:.0f} µs, and the "
        f"all-reduce between eight costs {eight['all-reduce']:.0f} µs. So more GPUs make the "
        f"source preset hardly faster, if at all: {best:.1f} times at the most, and sixteen are "
        "slower than one. They give more samples per second where environments and minibatch "
        f"grow with them ({100 * weak[0] / weak[1]:.0f} % efficiency on 8 and "
        f"{100 * weak[0] / weak[2]:.0f} % on 16 as CUDA graphs; more without them, of a slower "
        "single GPU), which is another problem for the optimiser; or with a run per GPU, of seeds "
        "and settings, which scale without loss."
    )


MEASURE = {
    "curve": (measure_curve, tell_curve),
    "overhead": (measure_overhead, tell_overhead),
    "checkpoint": (measure_checkpoint, tell_checkpoint),
    "roofline": (measure_roofline, tell_roofline),
}


def write(folder: Path, section: str, rows: list[dict[str, Any]]) -> None:
    """Put a section in its place in both files."""
    path = folder / "scaling.csv"
    table = pd.DataFrame(rows).assign(section=section, where=hardware())
    if path.exists():
        held = pd.read_csv(path)
        table = pd.concat([held[held["section"] != section], table])
    columns = ["section", "setting", "name", "round", "value", "processor", "others", "where"]
    table = table.reindex(columns=columns)
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
    flag("--patience", type=float, default=60, help="seconds in all to wait for quiet rounds")
    flag("--whole-rounds", type=int, default=3, help="of whole iterations")
    flag("--repetitions", type=int, default=100, help="of a checkpoint")
    flag("--folder", type=Path, help="where checkpoints are written, default that of the system")
    flag("--output-dir", type=Path, default=RESULTS)
    flag("--worker", help=argparse.SUPPRESS)
    flag("--worker-output", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, and write after every section; returns the exit code."""
    args = parse_args(argv)
    if args.worker:
        overhead_worker(args.worker, args.worker_output, args.rounds, args.patience)
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
