"""What a reward model costs: the built-in equations, a fitted ensemble, compiled, in bfloat16.

    python benchmark/reward_model.py runs/stage1/stage1.pt

Designs a second of each, for the 2,000 environments of a training step, in alternating rounds on
two threads; and the environment's whole step with it. Writes `results/reward_model.md`; needs
`pip install -e ".[train,stage1]"` and what `train/fit_stage1.py` wrote.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm
from trainers.launch import machine

from hydrogel_gym import load_cohort, load_reward_model
from hydrogel_gym.files import write_atomically
from hydrogel_gym.problem.fields import FORMULATION_HIGH, FORMULATION_LOW

RESULTS = Path(__file__).parent / "results"
NUM_ENVS, CALLS = 2000, 20


def designs() -> tuple[torch.Tensor, ...]:
    """One random design for each patient."""
    generator = torch.Generator().manual_seed(0)
    low, high = torch.from_numpy(FORMULATION_LOW), torch.from_numpy(FORMULATION_HIGH)
    return (
        load_cohort().features[:NUM_ENVS],
        torch.randint(24, (NUM_ENVS,), generator=generator),
        low + torch.rand(NUM_ENVS, 4, generator=generator) * (high - low),
        torch.randint(4, (NUM_ENVS,), generator=generator),
    )


def seconds(model: Callable[..., object], batch: tuple[torch.Tensor, ...]) -> float:
    """Of one call, mean of `CALLS`."""
    began = time.perf_counter()
    for _ in range(CALLS):
        model(*batch)
    return (time.perf_counter() - began) / CALLS


@torch.no_grad()
def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(2)
    models: dict[str, Callable[..., object]] = {"mechanistic": load_reward_model("mechanistic")}
    for name, pessimism, dtype in (
        ("ensemble, mean", 0.0, None),
        ("ensemble, default pessimism", None, None),
        ("ensemble, default pessimism, bf16", None, torch.bfloat16),
    ):
        models[name] = load_reward_model(
            str(args.checkpoint), pessimism=pessimism, compute_dtype=dtype
        )
    for name in list(models):
        models[f"{name}, compiled"] = torch.compile(models[name], fullgraph=True, dynamic=False)
    batch = designs()
    for model in models.values():
        seconds(model, batch)
    rounds: dict[str, list[float]] = {name: [] for name in models}
    for _ in tqdm(range(args.rounds), unit="round"):
        for name, model in models.items():
            rounds[name].append(seconds(model, batch))
    lines = [
        f"Time of a reward model for one step of {NUM_ENVS:,} environments, median of "
        f"{args.rounds} alternating rounds; the ratio is the median of that within a round; made "
        "by `benchmark/reward_model.py`.",
        "",
        machine(2),
        "",
        "| model | ms a step | designs a second | times the mechanistic |",
        "|---|---|---|---|",
    ]
    for name, times in rounds.items():
        median = statistics.median(times)
        ratios = [a / b for a, b in zip(times, rounds["mechanistic"], strict=True)]
        lines.append(
            f"| {name} | {1e3 * median:.2f} | {NUM_ENVS / median / 1e6:.2f} M | "
            f"{statistics.median(ratios):.1f} |"
        )
    write_atomically(RESULTS / "reward_model.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
