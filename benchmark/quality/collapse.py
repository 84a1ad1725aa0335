"""Why the reward fell in mid-training: temperature, spread and divergence of every iteration.

    python benchmark/quality/collapse.py                      # ten minutes on one core

Trains the quick preset with advantages in units of their own standard deviation, and as it is, at a
temperature in units of the reward.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import ORACLE_CACHE, Parser, figure, made_by, table, write

from hydrogel_gym.oracle import best_designs
from hydrogel_gym.problem.cohort import load_cohort
from hydrogel_gym.problem.reward import RewardConfig, safety_margins
from hydrogel_gym.runs.command_line import run_script
from hydrogel_gym.runs.environments import first_reset
from hydrogel_gym.train import ppo_hybrid as ppo

VARIANTS: dict[str, dict[str, Any]] = {
    "unit: standard deviation": dict(temperature=None, ent_coef=0.01, patient_baseline=False),
    "unit: temperature": {},
}
SHOWN = ("reward", "temperature", "spread", "divergence")
SHARES = ("of worst tenth", "of these at a limit")
AFTER = 50_000  # samples: before them the policy is still nearly random


@torch.no_grad()
def heads(agent: ppo.Agent, batch: ppo.Batch) -> tuple[Tensor, ppo.SquashedNormal, Tensor]:
    """What the policy makes of a batch: polymers, formulation, coverages."""
    polymer, formulation, coverage, _ = agent.head_inputs(batch.obs)
    polymer_id, _, chosen = batch.action
    return (
        agent.polymer_head(polymer).log_softmax(-1),
        agent.formulation_distribution(formulation, polymer_id, chosen),
        agent.coverage_head(coverage, polymer_id).log_softmax(-1),
    )


def curve(args: ppo.Args, at_limit: Tensor) -> pd.DataFrame:
    """A row per iteration of one training; `at_limit` says who is best served at a limit."""
    device, cohort = torch.device("cpu"), load_cohort("train")
    learner, act, step = ppo.make_learner(args, cohort, device, ppo.runs.ALONE, False)
    envs, agent, _, optimizer, generator = learner
    obs, rows = first_reset(envs, args, args.seed, len(cohort)), []
    for iteration in range(1, args.num_iterations + 1):
        obs, batch, infos = ppo.rollout(envs, agent, obs, args, generator, act)
        if iteration == 1:
            agent.set_return_scale(batch.returns)
        optimizer.param_groups[0]["lr"] = ppo.learning_rate_at(iteration, args)
        unit, old = ppo.advantage_unit_at(iteration, args), heads(agent, batch)
        losses = ppo.update(step, batch, args, generator, unit=unit)
        new = heads(agent, batch)
        moved = old[1].divergence(new[1])
        worst = moved.topk(len(moved) // 10).indices
        row = {"samples": iteration * len(moved), "reward": infos["reward"].mean().item()}
        row["temperature"] = args.ent_coef * (unit or batch.advantage.std().item())
        row |= {"spread": old[1].log_std.exp().median().item(), "divergence": moved.mean().item()}
        for name, k in (("polymer", 0), ("coverage", 2)):
            row[name] = (old[k].exp() * (old[k] - new[k])).sum(-1).mean().item()
        row["polymer entropy"] = ppo.categorical_entropy(old[0]).mean().item()
        row |= {name: losses[name].item() for name in ("approx_kl", "clipfrac")}
        row["of worst tenth"] = (moved[worst].sum() / moved.sum()).item()
        row["of these at a limit"] = at_limit.repeat(args.num_steps)[worst].float().mean().item()
        rows.append(row)
    return pd.DataFrame(rows)


def table_row(name: str, runs: list[pd.DataFrame]) -> list[str]:
    """A variant after the first samples: mean over iterations and seeds, and the worst of them."""
    rows = pd.concat(run[run["samples"] > AFTER] for run in runs)
    falls = [
        (run["reward"].cummax().shift() - run["reward"])[run["samples"] > AFTER] for run in runs
    ]
    third = rows[rows["samples"] <= 160_000]  # where the reward fell
    mean, early = rows.mean(), third.mean()
    return [
        name,
        *(f"{fall.max():.2f}" for fall in falls),
        *(f"{early[column]:.3g}" for column in ("temperature", "polymer entropy", "spread")),
        *(f"{early[column]:.3f}" for column in ("divergence", "polymer", "coverage")),
        f"{rows['approx_kl'].median():.3f} ({rows['approx_kl'].max():.2f})",
        *(f"{100 * mean[column]:.0f} %" for column in ("clipfrac", *SHARES)),
        f"{runs[0]['reward'].iloc[-1]:.2f}",
    ]


def main(argv: list[str] | None = None) -> None:
    """Train every variant under every seed; write table and picture."""
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of each")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    margins = safety_margins(
        best_designs("train", cache_dir=ORACLE_CACHE, progress=True).outcomes, RewardConfig()
    )
    at_limit = torch.stack(list(margins.values())).amin(0) < 0.01
    rows, picture = [], figure(10, 6)
    panels = picture.subplots(2, 2).flatten()
    for color, (name, changes) in enumerate(VARIANTS.items()):
        settings = ppo.PRESETS["quick"] | changes
        runs = [curve(ppo.Args(preset="quick", seed=k, **settings), at_limit) for k in args.seeds]
        rows.append(table_row(name, runs))
        for axes, column in zip(panels, SHOWN, strict=True):
            for run in runs:
                axes.plot(
                    run["samples"],
                    run[column],
                    f"C{color}",
                    lw=1,
                    label=name if run is runs[0] else None,
                )
            axes.set(
                title=column, xlabel="samples", yscale="linear" if axes is panels[0] else "log"
            )
    panels[0].set_ylim(26, 30)
    panels[1].legend()
    falls = [f"fall, seed {seed}" for seed in args.seeds]
    header = ["advantages in", *falls, "temperature", "polymer entropy", "spread"]
    header += ["KL of formulation", "of polymer", "of coverage", "approximate KL (largest)"]
    header += ["clipped", "KL in a tenth of samples", "of these at a limit", "last reward, seed 1"]
    lines = [
        "Fall: of an iteration's mean reward below the best before it. The next six columns are "
        f"means from {AFTER:,} to 160,000 samples, the others of all after {AFTER:,}. Temperature: "
        "the reward that a nat of entropy is worth to the learner. Spread: median standard "
        f"deviation before tanh. Best served at a limit: {100 * at_limit.float().mean():.0f} % of "
        "all patients.",
        "",
        *table(header, rows),
    ]
    write(args.output_dir, "collapse", lines, picture, made_by(1))


if __name__ == "__main__":
    sys.exit(run_script(main))
