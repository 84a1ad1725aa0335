"""What a reward model costs: the built-in equations, a fitted ensemble, compiled, in bfloat16.

    python benchmark/speed/reward_model.py runs/stage1/stage1.pt

Designs a second of each, for the environments of a training step, in alternating rounds. Needs
`pip install -e ".[train,stage1]"` and what `train/fit_stage1.py` wrote.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Parser, count, in_turn, made_by, ratio, table, write
from quality.baselines.search import DIM, design_of_unit

from hydrogel_gym import load_cohort, load_reward_model
from hydrogel_gym.runs.command_line import run_script

CALLS = 20
HEADER = ("model", "ms a step", "designs a second", "times the mechanistic")


@torch.no_grad()
def measure(checkpoint: Path, num_envs: int, rounds: int, device: str = "cpu") -> list[list[str]]:
    """A row per model: milliseconds a step, designs a second, times the mechanistic model's."""
    models: dict[str, Callable[..., object]] = {}
    models["mechanistic"] = load_reward_model("mechanistic", device)
    for name, pessimism, dtype in (
        ("ensemble, mean", 0.0, None),
        ("ensemble, default pessimism", None, None),
        ("ensemble, default pessimism, bf16", None, torch.bfloat16),
    ):
        settings = dict(pessimism=pessimism, compute_dtype=dtype)
        models[name] = load_reward_model(str(checkpoint), device, **settings)
    for name in list(models):
        models[f"{name}, compiled"] = torch.compile(models[name], fullgraph=True, dynamic=False)
    patients, generator = load_cohort().features[:num_envs], torch.Generator().manual_seed(0)
    unit = torch.rand(len(patients), DIM + 2, generator=generator)
    batch = [part.to(device) for part in (patients, *design_of_unit(unit))]

    def seconds(name: str, _: int = 0) -> float:
        began = time.perf_counter()
        for _ in range(CALLS):
            models[name](*batch)
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / CALLS

    for name in models:
        seconds(name)  # compile
    times, rows = in_turn(models, rounds, seconds), []
    for name, values in times.items():
        median, times_as_long = statistics.median(values), ratio(values, times["mechanistic"])
        rate = f"{len(patients) / median / 1e6:.2f} M"
        rows.append([name, f"{1e3 * median:.2f}", rate, f"{times_as_long:.1f}"])
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the table."""
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="a fitted ensemble")
    parser.add_argument("--rounds", type=count, default=15, help=f"of {CALLS} calls each")
    parser.add_argument("--num-envs", type=count, default=2000, help="designs in a call")
    args = parser.parse_args(argv)
    rows = measure(args.checkpoint, args.num_envs, args.rounds)
    lines = [
        f"Time of a reward model for one step of {args.num_envs:,} environments, median of "
        f"{args.rounds} alternating rounds; the ratio is the median of that within a round.",
        "",
        *table(HEADER, rows),
    ]
    write(args.output_dir, "reward_model", lines, made=made_by())


if __name__ == "__main__":
    sys.exit(run_script(main))
