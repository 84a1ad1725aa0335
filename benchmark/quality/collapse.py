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
VARIANTS: dict[str, dict[str, Any]] = {"advantages' spread": BEFORE, "temperature": {}}
FIRST, LAST = 50_000, 160_000  # samples between which the reward fell
MEANS = ("temperature", "polymer entropy", "spread", "formulation", "polymer", "coverage")
SHOWN = ("reward", "temperature", "spread", "formulation")
SHARES = ("clipfrac", "tenth", "at limit")


@torch.no_grad()
def heads(agent: ppo.Agent, batch: ppo.Batch) -> dict[str, Any]:
    """What the policy makes of a batch: two log-probabilities, and the formulation's density."""
    polymer, formulation, coverage, _ = agent.head_inputs(batch.obs)
    polymer_id, _, chosen = batch.action
    return {
        "polymer": agent.polymer_head(polymer).log_softmax(-1),
        "coverage": agent.coverage_head(coverage, polymer_id).log_softmax(-1),
        "formulation": agent.formulation_distribution(formulation, polymer_id, chosen),
    }


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
        new, row = heads(agent, batch), {name: x.item() for name, x in losses.items()}
        moved = old["formulation"].divergence(new["formulation"])
        tenth = moved.topk(len(moved) // 10).indices  # of the samples, where it moved furthest
        for name in ("polymer", "coverage"):
            row[name] = (old[name].exp() * (old[name] - new[name])).sum(-1).mean().item()
        rows.append(
            row
            | {
                "samples": iteration * len(moved),
                "reward": infos["reward"].mean().item(),
                "temperature": args.ent_coef * (unit or batch.advantage.std().item()),
                "polymer entropy": ppo.categorical_entropy(old["polymer"]).mean().item(),
                "spread": old["formulation"].log_std.exp().median().item(),
                "formulation": moved.mean().item(),
                "tenth": (moved[tenth].sum() / moved.sum()).item(),
                "at limit": at_limit.repeat(args.num_steps)[tenth].float().mean().item(),
            }
        )
    return pd.DataFrame(rows).set_index("samples")


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
            for run in runs:
                axes.plot(run[column], f"C{k}", lw=1, label=name if run is runs[0] else None)
            is_reward = column == "reward"
            title = "KL of formulation" if column == "formulation" else column
            axes.set(title=title, xlabel="samples", yscale="linear" if is_reward else "log")
        falls = [(run["reward"].cummax().shift() - run["reward"]).loc[FIRST:].max() for run in runs]
        every = pd.concat(run.loc[FIRST:] for run in runs)
        then = pd.concat(run.loc[FIRST:LAST] for run in runs).mean()
        kl = every["approx_kl"]
        cells = [f"{fall:.2f}" for fall in falls] + [f"{then[column]:.3f}" for column in MEANS]
        cells.append(f"{kl.median():.3f} (largest {kl.max():.2f})")
        rows.append([name, *cells, *(f"{100 * then[column]:.0f} %" for column in SHARES)])
    panels[0].set_ylim(26, 30)
    panels[1].legend(title="unit of advantages")
    header = ["unit of advantages", *(f"fall, seed {seed}" for seed in args.seeds), *MEANS]
    lines = [
        f"Fall: largest of an iteration's mean reward after {FIRST:,} samples below the best "
        f"before. What follows are means from there to {LAST:,} samples: temperature, the reward a "
        "nat of entropy is worth to the learner; entropy of the polymers; median spread before "
        "tanh; KL divergence of each head from the rollout's policy; approximate KL divergence, "
        "here to the end of training; ratios clipped; share of the formulation's divergence in the "
        "tenth of the samples that has most of it; and how many of these are of patients best "
        f"served within 0.01 of a limit, {100 * at_limit.float().mean():.0f} % of all.",
        "",
        *table([*header, "approximate KL", "clipped", "in a tenth", "at a limit"], rows),
    ]
    write(args.output_dir, "collapse", lines, picture, made_by(1))


if __name__ == "__main__":
    sys.exit(run_script(main))
