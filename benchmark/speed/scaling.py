"""Whether many ranks learn the same as one, and what they cost.

    python benchmark/speed/scaling.py                              # ten minutes on two cores
    python benchmark/speed/scaling.py --only overhead --rounds 60

Two sections:

- `curve`: weights after five iterations on 2 and 4 gloo ranks, against those of one process.
- `overhead`: an update on two ranks of one thread each, with and without averaging the gradients
  over them, beside torch's `DistributedDataParallel`; rounds alternate over the variants within one
  run, and a round takes as long as its slower rank. Then whole iterations of one and two ranks.

Ranks are processes of `torchrun`. What else the machine does hits two ranks that wait for each
other harder than two that do not: measure on an idle one.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Parser, count, in_turn, made_by, ratio, run, spread, table, verdict, write
from speed.trainers.protocol import train

from hydrogel_gym import load_cohort
from hydrogel_gym.memory import keep_freed_memory
from hydrogel_gym.runs.checkpoints import Learner
from hydrogel_gym.runs.command_line import run_script
from hydrogel_gym.runs.compiled import flatten_weights
from hydrogel_gym.runs.devices import fast_float32
from hydrogel_gym.runs.directory import POLICY_FILE
from hydrogel_gym.runs.environments import first_reset
from hydrogel_gym.runs.policies import load_policy
from hydrogel_gym.runs.presets import read_run_options
from hydrogel_gym.runs.ranks import ALONE, World, averaging, joined, world_from_environment
from hydrogel_gym.train import ppo_hybrid as trainer

TRAINER = "train/ppo_hybrid.py"
TORCHRUN = "{python} -m torch.distributed.run --standalone --nproc-per-node="
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
WHOLE = f"{TRAINER} --preset source --no-oracle --compile off --checkpoint-interval 0 "
WHOLE += "--seed {seed} --num-iterations {iterations} --num-steps {steps} --output-dir {output}"
WAYS = {
    "1 process, 1 thread": ("{python} " + WHOLE, 1),
    "1 process, 2 threads": ("{python} " + WHOLE, 2),
    "2 ranks, 1 thread each": (f"{TORCHRUN}2 {WHOLE}", 1),
}


def options(*flags: str) -> trainer.Args:
    """Options of the trainer's command line."""
    return read_run_options(trainer.Args, trainer.PRESETS, flags, prog=TRAINER)


def relative_difference(reference: Tensor, other: Tensor) -> float:
    """||reference - other|| / ||reference||."""
    return ((reference - other).norm() / reference.norm()).item()


def trained_weights(ranks: int, threads: int, *flags: str) -> Tensor:
    """All weights and biases after a run, float64."""
    launcher = f"{TORCHRUN}{ranks}" if ranks > 1 else "{python}"
    with tempfile.TemporaryDirectory() as folder:
        command = [*f"{launcher} {TRAINER} {CURVE}".split(), *flags, "--output-dir", f"{folder}/r"]
        run(command, threads=threads)
        agent, _ = load_policy(Path(folder, "r", POLICY_FILE), trainer.Agent, CPU)
    return torch.cat([weight.detach().double().flatten() for weight in agent.parameters()])


def curve(args: argparse.Namespace) -> list[str]:
    """Differences of the weights."""
    rows, exact = [], {}
    for rate, precision, bar in CURVES:
        flags = ["--learning-rate", rate, "--precision", precision]
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
        "quick preset, between one process of one thread and gloo ranks of one thread each. As the "
        "measure of what rounding alone does: one process of two threads, which sums in another "
        "order, and one in float64.",
        "",
        *table(header, rows),
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
    """One of the ranks; the first writes how many rows it had, and milliseconds per update."""
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
        calls = variants(learner, args, world, minibatch)
        warm_up = 2
        times = in_turn(calls, warm_up + rounds, lambda name, _: milliseconds(calls[name], world))
        if world.rank == 0:
            measured = {name: values[warm_up:] for name, values in times.items()}
            output.write_text(json.dumps([len(minibatch.logprob), measured]))
        world.wait()
        os._exit(0)  # what is left of torch's wrappers may hang an interpreter that is taken down


def milliseconds(call: Callable[[], Any], world: World) -> float:
    """Of a call, of the slower rank."""
    call()  # what waiting has cooled
    world.wait()
    start = time.perf_counter()
    for _ in range(UPDATES_PER_ROUND):
        call()
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return 1e3 * seconds.item() / UPDATES_PER_ROUND


def overhead_rows(times: dict[str, list[float]]) -> list[list[str]]:
    """A row per variant: its times, and how much longer than without averaging it takes."""
    rows = []
    for name, values in times.items():
        base, over = f"{name.split(',')[0]}, nothing averaged", "–"
        if base in times and name != base:
            over = f"{100 * (ratio(values, times[base]) - 1):.1f} %"
        rows.append([name, f"{statistics.median(values):.2f}", f"{min(values):.2f}", over])
    return rows


def overhead(args: argparse.Namespace) -> list[str]:
    """Milliseconds per update, then seconds per iteration."""
    lines = [
        "## What averaging gradients costs",
        "",
        f"Two gloo ranks on two cores, one thread each; {UPDATES_PER_ROUND} updates a round, the "
        "rounds alternating over the variants within one run; milliseconds per update of the "
        "slower rank. The overhead is that over an update of this rank's share without averaging: "
        "the median over the rounds of the ratio within a round, which what changes on the machine "
        "from round to round leaves alone.",
    ]
    for preset in ("quick", "source"):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "times.json")
            worker = [__file__, "--worker", preset, "--worker-output", output]
            run([*f"{TORCHRUN}2".split(), *worker, "--rounds", args.rounds], threads=1)
            size, times = json.loads(output.read_text())
        lines += ["", f"{preset}, {size} rows per rank; {args.rounds} rounds:", ""]
        lines += table(["", "median ms", "fastest ms", "overhead"], overhead_rows(times))

    def whole(name: str, k: int) -> pd.Series:
        command, threads = WAYS[name]
        # The first iteration also asks the system for memory.
        return train(command, threads, iterations=3, steps=20, seed=k + 1).iloc[1:].mean()

    rows, measured = [], in_turn(WAYS, args.whole_rounds, whole)
    base = [each["seconds_iteration"] for each in measured["1 process, 1 thread"]]
    for name, each in measured.items():
        parts = ("seconds_iteration", "seconds_rollout", "seconds_update")
        seconds = [[values[part] for values in each] for part in parts]
        rows.append([name, *map(spread, seconds), f"{ratio(base, seconds[0]):.2f}×"])
    header = ["", "seconds per iteration", "rollout", "updates", "times as fast as 1 thread"]
    return [
        *lines,
        "",
        "Whole iterations of the source preset with 20 steps instead of 100 (200 updates), "
        "`--compile off`; the first of a process is left out; median [range] over "
        f"{args.whole_rounds} rounds:",
        "",
        *table(header, rows),
    ]


SECTIONS = {"curve": curve, "overhead": overhead}


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the sections."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections")
    flag("--rounds", type=count, default=30, help="of the overhead")
    flag("--whole-rounds", type=count, default=3, help="of whole iterations")
    flag("--worker", help=argparse.SUPPRESS)
    flag("--worker-output", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return overhead_worker(args.worker, args.worker_output, args.rounds)
    lines = [made_by()]
    for section in args.only:
        lines += ["", *SECTIONS[section](args)]
    write(args.output_dir, "scaling", lines)


if __name__ == "__main__":
    sys.exit(run_script(main))
