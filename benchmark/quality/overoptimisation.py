"""Whether a policy is fooled by a fitted Stage 1: true reward by pessimism and length of training.

    python benchmark/quality/overoptimisation.py                     # some 40 minutes on two cores
    python benchmark/quality/overoptimisation.py --seeds 1 --only made

Two tables of synthetic outcomes, both by `patients/make_outcomes.py`, whose truth is the
mechanistic model: `whole`, formulations from all over the action space, and `made`, of these the
rows that ask of a polymer what it can be made with, as a laboratory's table would. An ensemble is
fitted to each; policies are trained on nothing else, with several values of `--pessimism`, and on
one network in place of the ensemble; and every iteration is evaluated by the truth on the held-out
patients. Fits and runs that `--folder` has are kept. Needs `pip install -e ".[train,stage1]"`.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import ROOT, Parser, count, figure, made_by, run, table, write

from hydrogel_gym import load_polymers
from hydrogel_gym.models.ensemble import DEFAULT_PESSIMISM, load_stage1, save_stage1
from hydrogel_gym.runs.command_line import run_script

TABLES = {"whole": "all over the action space", "made": "what the polymers can be made with"}
ONE_NETWORK, DEFAULT = "one network", f"{DEFAULT_PESSIMISM:g}"
REWARDS = (ONE_NETWORK, "0", DEFAULT, "1")
TRUE, PREDICTED = "true_holdout_deterministic_reward", "holdout_deterministic_reward"


class Run(NamedTuple):
    """A policy to train; the reward is a value of --pessimism, or `ONE_NETWORK`."""

    table: str
    reward: str
    seed: int
    iterations: int


def what_can_be_made(outcomes: pd.DataFrame) -> pd.DataFrame:
    """The rows whose request is within the polymer's windows, or near enough to be tried."""
    polymers = load_polymers()
    names = {name: i for i, name in enumerate(polymers.names)}
    row = outcomes["polymer_name"].astype(str).map(names).to_numpy()
    kept = np.ones(len(outcomes), bool)
    slacks = {"youngs_modulus_kpa": 2.0, "half_life_days": 10.0, "conductivity_s_per_m": 0.05}
    for column, slack in slacks.items():
        low, high = getattr(polymers, column).numpy()[row].T
        kept &= outcomes[column].between(low - slack, high + slack).to_numpy()
    return outcomes[kept]


def fit(name: str, folder: Path, flags: list[str]) -> Path:
    """Make a table and fit an ensemble to it, unless that is done; returns its directory."""
    output = folder / f"stage1-{name}"
    if (output / "one.pt").exists():
        return output
    whole, path = folder / "whole.parquet", folder / f"{name}.parquet"
    if not whole.exists():
        run(["{python}", "patients/make_outcomes.py", "--output", whole])
    if name == "made":
        what_can_be_made(pd.read_parquet(whole)).to_parquet(path)
        flags = ["--batch-size", "256", *flags]  # a twelfth of the rows
    command = ["{python}", "train/fit_stage1.py", path, "--output-dir", output]
    run([*command, "--truth", "mechanistic", *flags])
    ensemble = load_stage1(output / "stage1.pt", pessimism=0.0)
    with torch.no_grad():  # the first member in all places: one network, which never disagrees
        for parameter in ensemble.network.parameters():
            parameter[:] = parameter[:1].clone()
    ensemble.freeze()
    save_stage1(output / "one.pt", ensemble, {})
    return output


def train(policy: Run, folder: Path) -> pd.DataFrame:
    """Train a policy, unless that is done; returns a row per iteration."""
    output = folder / "-".join(map(str, policy)).replace(" ", "-")
    truth = output / "evaluation-shipped-mechanistic-checkpoints.csv"
    if not truth.exists():
        one = policy.reward == ONE_NETWORK
        model = folder / f"stage1-{policy.table}" / ("one.pt" if one else "stage1.pt")
        flags = ["--num-iterations", policy.iterations, "--seed", policy.seed]
        flags += ["--reward-model", model, "--pessimism", "0" if one else policy.reward]
        flags += ["--checkpoint-interval", 5, "--keep-checkpoints", 1000, "--compile", "off"]
        command = ["{python}", "train/ppo_hybrid.py", "--preset", "quick", *flags]
        run([*command, "--output-dir", output, "--overwrite"], threads=1)
        command = ["{python}", "train/evaluate.py", output, "--every-checkpoint"]
        run([*command, "--reward-model", "mechanistic"], threads=1)
    evaluated = pd.read_csv(truth).set_index("iteration").add_prefix("true_")
    rows = pd.read_csv(output / "metrics.csv").set_index("iteration").join(evaluated, how="right")
    return rows.reset_index().assign(**policy._asdict())


def label_of(reward: str) -> str:
    """What a policy learns from, in words."""
    if reward == ONE_NETWORK:
        return reward
    return f"pessimism {reward}" + " (default)" * (reward == DEFAULT)


def row(policy: Run, runs: list[pd.DataFrame]) -> list[str]:
    """How the last iteration is evaluated, mean over the seeds."""
    last = pd.concat([curve.tail(1) for curve in runs])
    mean, true = last.mean(numeric_only=True), last[TRUE]
    highest = [curve[TRUE].max() for curve in runs]
    cells = [policy.table, f"{mean['global_step'] / 1e6:.1f} M", label_of(policy.reward)]
    cells += [str(len(runs)), f"{mean[PREDICTED]:.2f}"]
    cells += [f"{true.mean():.2f} [{true.min():.2f}, {true.max():.2f}]"]
    cells += [f"{100 * mean['true_holdout_fraction_of_oracle']:.2f} %"]
    cells += [f"{sum(highest) / len(highest):.2f}"]
    return [*cells, f"{100 * mean['true_holdout_deterministic_limit_breach_rate']:.1f} %"]


def draw(axes: Any, name: str, long: dict[str, pd.DataFrame]) -> None:
    """Predicted and true reward of the long runs, over the samples."""
    for k, (reward, rows) in enumerate(long.items()):
        samples, label = rows["global_step"] / 1e6, label_of(reward)
        axes.plot(samples, rows[TRUE], color=f"C{k}", label=label)
        axes.plot(samples, rows[PREDICTED], color=f"C{k}", linestyle=":")
        best = (rows[TRUE] / rows["true_holdout_fraction_of_oracle"]).median()
    axes.axhline(best, color="0.5", linewidth=1)
    axes.set(title=f"fitted to {TABLES[name]}", xlabel="samples, millions", ylim=(18, 32))
    axes.set_ylabel("mean reward of held-out virtual patients")
    axes.legend(title="solid: true, dotted: predicted; grey: true oracle", loc="lower right")


def main(argv: list[str] | None = None) -> None:
    """Fit, train, and write the tables and the picture."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the policies")
    flag("--only", choices=TABLES, nargs="+", default=list(TABLES), help="tables")
    flag("--iterations", type=count, default=100, help="of a run; a long one has three times these")
    flag("--fit-flags", default="", help="more flags of `train/fit_stage1.py`, in one word")
    flag("--folder", type=Path, default=ROOT / "runs" / "overoptimisation", help="of the runs")
    args = parser.parse_args(argv)
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    notes = []
    for name in args.only:
        output = fit(name, folder, args.fit_flags.split())
        fitted = json.loads((output / "metrics.json").read_text())
        gain, optimal = (fitted["held_out"][name] for name in ("delta_ef_pct", "is_optimal"))
        notes.append(
            f"- `{name}`, {TABLES[name]}: {fitted['rows']:,} rows of {fitted['patients']} virtual "
            f"patients; on {fitted['held_out_patients']} that were not fitted, MAE of the change "
            f"in LVEF {gain['mae']:.3f}, R2 {gain['r2']:.3f}; `optimal` AUROC "
            f"{optimal['auroc']:.3f}, F1 {optimal['f1']:.3f}"
        )
    first, long = args.seeds[0], 3 * args.iterations
    groups = []
    for name in args.only:
        short = [[Run(name, x, seed, args.iterations) for seed in args.seeds] for x in REWARDS]
        groups += [*short, *([Run(name, x, first, long)] for x in REWARDS[:3])]
    policies = [policy for group in groups for policy in group]
    with ThreadPoolExecutor(2) as pool:  # processes of one thread each
        curves = pool.map(lambda policy: train(policy, folder), policies)
        curves = dict(zip(policies, tqdm(curves, total=len(policies), unit="run"), strict=True))
    picture = figure(6 * len(args.only), 4.5)
    for axes, name in zip(
        picture.subplots(1, len(args.only), squeeze=False)[0], args.only, strict=True
    ):
        draw(axes, name, {x: curves[Run(name, x, first, long)] for x in REWARDS[:3]})
    columns = ["table", "samples", "reward of", "seeds", "predicted reward, held out"]
    columns += ["true reward, held out", "of the true oracle", "highest on the way"]
    rows = [row(group[0], [curves[policy] for policy in group]) for group in groups]
    lines = [
        "Policies trained on a fitted Stage 1 alone, evaluated by the truth behind its table (the "
        "mechanistic model) on the 500 held-out virtual patients: means over the seeds, range in "
        "brackets.",
        "",
        *notes,
        "",
        *table([*columns, "breaks a limit, truly"], rows),
    ]
    write(args.output_dir, "overoptimisation", lines, picture, made_by(1))


if __name__ == "__main__":
    sys.exit(run_script(main))
