"""Where an update's time goes: matrix products, the rest of the graph, and threads that meet.

    python benchmark/speed/parts.py                             # a minute on idle cores

The compiled gradient step of the source preset, minibatches of 2,000, as `train/ppo_hybrid.py`
makes it. The products are those of its linear layers, forward and backward, on one share of the
minibatch and by the same library; no float32 trainer on these cores can be faster than they are.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Parser, count, made_by, table, write

import hydrogel_gym
from hydrogel_gym.memory import keep_freed_memory
from hydrogel_gym.runs.command_line import run_script
from hydrogel_gym.runs.compiled import shares_of
from hydrogel_gym.runs.devices import fast_float32
from hydrogel_gym.runs.ranks import ALONE
from hydrogel_gym.train import ppo_hybrid

CPU, CALLS = torch.device("cpu"), 60


def seconds(function: Callable[[], object]) -> float:
    """Median of many calls."""
    times = []
    for _ in range(CALLS):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times[CALLS // 6 :])


def in_threads(number: int, function: Callable[[int], object]) -> float:
    """`seconds` of as many single-threaded threads at once, mean over them."""
    found: list[float] = []

    def measure(k: int) -> None:
        torch.set_num_threads(1)
        found.append(seconds(lambda: function(k)))

    threads = [threading.Thread(target=measure, args=(k,)) for k in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statistics.mean(found)


def products_of(agent: nn.Module, rows: int, precision: str) -> Callable[[int], None]:
    """All products of an update with so many rows: forward, to the weights and to the inputs."""
    wide = {agent.trunk[0], agent.hidden} if precision == "bf16" else set()
    every: list[tuple[Tensor, Tensor, Tensor, bool]] = []
    for layer in (x for x in agent.modules() if isinstance(x, nn.Linear)):
        dtype = torch.bfloat16 if layer in wide else torch.float32
        sizes = (rows, layer.in_features), layer.weight.shape, (rows, layer.out_features)
        inputs, weight, gradient = (torch.randn(size).to(dtype) for size in sizes)
        every.append((inputs, weight, gradient, layer is not agent.encoder[0]))

    def multiply(_: int) -> None:
        for inputs, weight, gradient, is_inner in every:
            inputs @ weight.T
            gradient.T @ inputs
            if is_inner:
                gradient @ weight

    return multiply


def measure(precision: str) -> tuple[list[str], int]:
    """A row of the table, and the number of threads."""
    preset = ppo_hybrid.PRESETS["source"]
    args = ppo_hybrid.Args(**preset, preset="source", precision=precision)
    cohort = hydrogel_gym.load_cohort()
    learner, act, step = ppo_hybrid.make_learner(args, cohort, CPU, ALONE, True)
    obs, _ = learner.envs.reset(seed=0)
    _, batch, _ = ppo_hybrid.rollout(learner.envs, learner.agent, obs, args, learner.generator, act)
    minibatch = ppo_hybrid.rows_of(batch, slice(args.minibatch_size))
    shares = shares_of(minibatch, step.workers)
    products = products_of(learner.agent, len(shares[0].obs), precision)
    figures = {
        "products": in_threads(step.workers, products),
        "graph": in_threads(step.workers, lambda k: step.gradient_of(shares[k])),
        "update": seconds(lambda: step(minibatch)),
    }
    cells = [f"{1e3 * figures['products']:.1f}"]
    cells.append(f"{1e3 * (figures['graph'] - figures['products']):.1f}")
    cells.append(f"{1e3 * (figures['update'] - figures['graph']):.1f}")
    cells.append(f"{1e3 * figures['update']:.1f}")
    return [precision, *cells, f"{figures['products'] / figures['update']:.0%}"], step.workers


def main(argv: list[str] | None = None) -> None:
    """Measure and write the table."""
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=count, default=4, help="of which the fastest is shown")
    args = parser.parse_args(argv)
    keep_freed_memory()
    rows = []
    for precision in ("fp32", "bf16"):
        with fast_float32(CPU):
            rounds = [measure(precision) for _ in range(args.rounds)]
        best, threads = min(rounds, key=lambda each: float(each[0][4]))
        rows.append(best)
    columns = ["precision", "products", "rest of the graph", "meeting, clipping, Adam"]
    lines = [
        f"Milliseconds per update of 2,000 rows on {threads} threads, the fastest of "
        f"{args.rounds} rounds of {CALLS} calls. The last column is the share of the time that the "
        "products alone would take.",
        "",
        *table([*columns, "update", "share of the products"], rows),
    ]
    write(args.output_dir, "parts", lines, made=made_by())


if __name__ == "__main__":
    sys.exit(run_script(main))
