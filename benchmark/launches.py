"""How many kernels an iteration of the trainer launches, and how long launching alone takes.

    python benchmark/launches.py

On a GPU a network of this size is bound by launches rather than by arithmetic. They are counted
here without one: the operations that the plain path dispatches, and the kernels that the compiler
generates for the compiled one, with the matrix products that it leaves to a library. On CUDA the
policy's step and the update are replayed as one CUDA graph each: one launch, beside the copies of
what goes in and comes out. The time of a launch is assumed (`environment.LAUNCH_US`); where there
is a CUDA device, an iteration is measured beside it. Writes `results/launches.md`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from baselines.policy import load_trainer
from environment import LAUNCH_US, CountOperations, count_kernels, hardware
from torch._inductor import metrics
from torch.utils._pytree import tree_leaves

from hydrogel_gym import load_cohort
from hydrogel_gym.files import write_atomically

RESULTS = Path(__file__).parent / "results"
FILLS = 2  # step size and bias correction, put in place before each replayed update


class CountProducts(CountOperations):
    """Counts matrix products alone."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run an operation."""
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm")
        return func(*args, **(kwargs or {}))


def operations(function: Callable[[], Any], counter: CountOperations) -> int:
    """What a call dispatches."""
    with counter:
        function()
    return counter.count


def generated(pure: Callable[..., Any], *inputs: Any) -> int:
    """Kernels and library calls of a compiled function."""
    products = operations(lambda: pure(*inputs), CountProducts())
    metrics.reset()
    torch.compile(pure, fullgraph=True, dynamic=False)(*inputs)
    return metrics.generated_kernel_count + products


def copies(*tensors: Any) -> int:
    """Tensors that are copied into, or out of, a CUDA graph."""
    return len(tree_leaves(tensors))


def count(trainer: ModuleType, args: Any) -> dict[str, tuple[int, int, int]]:
    """Launches of each part: plain, compiled, replayed."""
    learner = trainer.make_learner(args, load_cohort(), torch.device("cpu"), compile=False)
    agent, generator = learner.agent, torch.Generator().manual_seed(0)
    obs, _ = learner.envs.reset(seed=0)
    noise = trainer.draw_noise(len(obs), formulation_dim=agent.formulation_dim, generator=generator)

    def act(obs: torch.Tensor, noise: Any) -> Any:
        return trainer.act(agent, obs, noise)

    with torch.no_grad():
        acted = act(obs, noise)
        plain_act = operations(lambda: act(obs, noise), CountOperations())
        compiled_act = generated(act, obs, noise)
    action, logprob, value, _ = acted
    minibatch = trainer.Batch(obs, action, logprob, value, value, value)
    minibatch = minibatch.rows(slice(args.minibatch_size))
    plain_update = operations(lambda: learner.step(minibatch, 1e-3), CountOperations())
    step = trainer.CompiledStep(agent, args)
    with torch.no_grad():
        parts = step.pure_step(minibatch)
        compiled_update = generated(step.pure_step, minibatch)
    plain_env, compiled_env = count_kernels("cpu")
    replayed_act = 1 + copies(obs, noise, acted)
    replayed_update = 1 + FILLS + copies(minibatch, parts)
    return {
        "policy, a step": (plain_act, compiled_act, replayed_act),
        "environments, a step": (plain_env, compiled_env, compiled_env),
        "update, a minibatch": (plain_update, compiled_update, replayed_update),
    }


def measured_ms(trainer: ModuleType, args: Any, *, compile: bool) -> float:
    """Milliseconds of an iteration on CUDA, the median of five."""
    device = torch.device("cuda")
    learner = trainer.make_learner(args, load_cohort(), device, compile=compile)
    generator = torch.Generator(device).manual_seed(0)
    obs, _ = learner.envs.reset(seed=0)
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        obs, batch, _ = trainer.rollout(
            learner.envs, learner.agent, obs, args, generator, learner.act
        )
        trainer.update(learner.step, batch, args, 1e-4, generator)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 1e3 * sorted(seconds[1:])[2]


def table(parts: dict[str, tuple[int, int, int]], args: Any, note: str) -> str:
    """The report in Markdown."""
    updates = args.num_epochs * args.num_envs * args.num_steps // args.minibatch_size
    times = {name: updates if "minibatch" in name else args.num_steps for name in parts}
    totals = [sum(times[name] * row[k] for name, row in parts.items()) for k in range(3)]
    lines = [
        "Kernels launched, counted without a GPU; made by `benchmark/launches.py`.",
        "",
        note,
        "",
        "| part | times in an iteration of the source preset | plain | compiled "
        "| compiled, with CUDA graphs |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {times[name]:,} | {' | '.join(f'{value:,}' for value in row)} |"
            for name, row in parts.items()
        ),
        f"| an iteration | | {' | '.join(f'{value:,}' for value in totals)} |",
        f"| launching alone, at {LAUNCH_US:g} µs each | | "
        f"{' | '.join(f'{value * LAUNCH_US / 1e6:.2f} s' for value in totals)} |",
    ]
    if torch.cuda.is_available():
        trainer = load_trainer()
        plain, fast = (measured_ms(trainer, args, compile=compile) for compile in (False, True))
        lines.append(f"| measured | | {plain / 1e3:.2f} s | – | {fast / 1e3:.2f} s |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Count, and write the report."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    trainer = load_trainer()
    args = trainer.parse_args(["--preset", "source"])
    text = table(count(trainer, args), args, hardware())
    write_atomically(RESULTS / "launches.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
