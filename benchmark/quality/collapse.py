"""Why the reward fell in mid-training: temperature, spread and divergence of every iteration.

    python benchmark/quality/collapse.py        # ten minutes on one core

Trains the quick preset with advantages in units of their own spread, and at its temperature.
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

BEFORE = dict(temperature=None, ent_coef=0.01, patient_baseline=False, limit_margin=0.01)
BEFORE |= dict(minibatch_size=1000, learning_rate=2e-3)
VARIANTS: dict[str, dict[str, Any]] = {"their spread": BEFORE, "temperature": {}}
FIRST, LAST = 50_000, 160_000  # samples between which the reward fell
SHOWN = ("reward", "temperature", "spread", "KL, formulation")
MEANS = (*SHOWN[1:], "KL, polymer", "polymer entropy", "clipfrac", "in a tenth", "at a limit")


@torch.no_grad()
def heads(agent: ppo.Agent, batch: ppo.Batch) -> tuple[Tensor, ppo.SquashedNormal]:
    """Log-probabilities of the polymers and density of the formulation, for a batch."""
    polymer, formulation, _, _ = agent.head_inputs(batch.obs)
    chosen = (batch.action.polymer_id, batch.action.coverage)
    logp = agent.polymer_head(polymer).log_softmax(-1)
    return logp, agent.formulation_distribution(formulation, *chosen)


def curve(args: ppo.Args, at_limit: Tensor) -> pd.DataFrame:
    """A row per iteration of one training; `at_limit` says who is best served at a limit."""
    device, cohort = torch.device("cpu"), load_cohort("train")
    learner, act, step = ppo.make_learner(args, cohort, device, ppo.runs.ALONE, False)
    envs, agent, _, optimizer, generator = learner
    obs, rows = first_reset(envs, args, args.seed, len(cohort)), {}
    for iteration in range(1, args.num_iterations + 1):
        obs, batch, infos = ppo.rollout(envs, agent, obs, args, generator, act)
        if iteration == 1:
            agent.set_return_scale(batch.returns)
        optimizer.param_groups[0]["lr"] = ppo.learning_rate_at(iteration, args)
        unit, (old, density) = ppo.advantage_unit_at(iteration, args), heads(agent, batch)
        losses = ppo.update(step, batch, args, generator, unit=unit)
        new, changed = heads(agent, batch)
        moved = density.divergence(changed)
        tenth = moved.topk(len(moved) // 10).indices  # of the samples, where it moved furthest
        row = losses | {
            "reward": infos["reward"].mean(),
            "temperature": args.ent_coef * (unit or batch.advantage.std()),
            "spread": density.log_std.exp().median(),
            "KL, formulation": moved.mean(),
            "KL, polymer": (old.exp() * (old - new)).sum(-1).mean(),
            "polymer entropy": ppo.categorical_entropy(old).mean(),
            "in a tenth": moved[tenth].sum() / moved.sum(),
            "at a limit": at_limit.repeat(args.num_steps)[tenth].float().mean(),
        }
        rows[iteration * len(moved)] = {name: float(value) for name, value in row.items()}
    return pd.DataFrame.from_dict(rows, orient="index")


def main(argv: list[str] | None = None) -> None:
    """Train every variant under every seed; write table and picture."""
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of each")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    best = best_designs("train", cache_dir=ORACLE_CACHE, progress=True)
    margins = torch.stack(list(safety_margins(best.outcomes, RewardConfig()).values()))
    at_limit, rows, picture = margins.amin(0) < 0.01, [], figure(10, 6)
    panels = picture.subplots(2, 2).flatten()
    for k, (name, changes) in enumerate(VARIANTS.items()):
        settings = ppo.PRESETS["quick"] | changes
        runs = [curve(ppo.Args(preset="quick", seed=s, **settings), at_limit) for s in args.seeds]
        for axes, column in zip(panels, SHOWN, strict=True):
            axes.set(title=column, xlabel="samples, millions", yscale="log")
            for run in runs:
                axes.plot(
                    run.index / 1e6,
                    run[column],
                    f"C{k}",
                    lw=1,
                    label=name if run is runs[0] else None,
                )
        falls = [(run["reward"].cummax().shift() - run["reward"]).loc[FIRST:].max() for run in runs]
        kl = pd.concat(run.loc[FIRST:, "approx_kl"] for run in runs)
        means = pd.concat(run.loc[FIRST:LAST] for run in runs).mean()
        cells = [f"{value:.2f}" for value in (*falls, kl.median(), kl.max())]
        rows.append([name, *cells, *(f"{means[column]:.3f}" for column in MEANS)])
    panels[0].set(yscale="linear", ylim=(26, 30))
    panels[1].legend(title="unit of advantages")
    header = ["unit of advantages", *(f"fall, seed {seed}" for seed in args.seeds)]
    lines = [
        f"Fall: largest, after {FIRST:,} samples, of an iteration's mean reward below the best "
        "before; then median and largest approximate KL divergence of these iterations. The rest "
        f"are means up to {LAST:,} samples: temperature, the reward that a nat of entropy is worth "
        "to the learner; median spread of the formulation before tanh; KL divergence of two heads "
        "from the rollout's policy; entropy of the polymers; share of clipped ratios; share of the "
        "formulation's divergence in the tenth of samples with most of it, and share of these of "
        f"patients best served within 0.01 of a limit ({at_limit.float().mean():.3f} of all).",
        "",
        *table([*header, "approximate KL", "largest", *MEANS], rows),
    ]
    write(args.output_dir, "collapse", lines, picture, made_by(1))


if __name__ == "__main__":
    sys.exit(run_script(main))
