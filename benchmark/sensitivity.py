"""How far a trained policy leans on what nobody knows: assumed constants, and measurement error.

    python benchmark/sensitivity.py --policy runs/quick-s1 runs/quick-s2 runs/quick-s3

Freezes the deterministic designs of each run for the 500 held-out patients, and the best designs
under the reward model as shipped, then evaluates both again where the model is wrong: every
assumption (grade D) moved by 20 %, one at a time and all together. A second part leaves the model
alone and lets the policy see features that were measured with an error of up to 5 %. The search for
the best designs is repeated in every case, for the first patients of the cohort: regret is what the
designs lose to it. Writes `sensitivity.csv`, `.md` and `.png` in `results/`; about ten minutes on
two cores, whatever the number of runs.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from pathlib import Path

import pandas as pd
import torch
from perturbations import (
    HELD,
    NOISE,
    POLYMER_INDICES,
    SPREAD,
    Case,
    assumptions,
    cases,
    measured,
)
from torch import Tensor
from tqdm import tqdm

from hydrogel_gym import Cohort, load_cohort, load_polymers
from hydrogel_gym.files import write_atomically
from hydrogel_gym.models.contract import RewardModel
from hydrogel_gym.models.mechanistic import MechanisticModel, MechanisticParams
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.problem.fields import Design
from hydrogel_gym.problem.reward import SAFETY_LIMITS, reward_terms, sum_terms
from hydrogel_gym.runs.command_line import check_ranges
from hydrogel_gym.runs.directory import POLICY_FILE
from hydrogel_gym.runs.policies import load_policy
from hydrogel_gym.train.ppo_hybrid import Agent

RESULTS = Path(__file__).parent / "results"

ORACLE = "best as shipped"  # the comparison designs


def load_agents(run_dirs: list[Path]) -> dict[str, Agent]:
    """The policy of each run by the name of its directory.

    Raises:
        ValueError: a run has no usable policy for episodes of one step, or two have the same name.
    """
    agents = {}
    for run_dir in run_dirs:
        agent, saved = load_policy(run_dir / POLICY_FILE, Agent, "cpu")
        if (horizon := saved["training_config"]["horizon"]) != 1:
            raise ValueError(f"--policy {run_dir}: trained with horizon {horizon}; expected 1")
        if (name := run_dir.resolve().name) in agents:
            raise ValueError(f"--policy: two run directories are called {name}")
        agents[name] = agent
    return agents


@torch.no_grad()
def designs_of(agent: Agent, features: Tensor) -> Design:
    """Deterministic designs of a policy for patients (P, 11) in a first step."""
    patients = features.to(torch.float32)
    obs = torch.cat([patients, patients.new_zeros(len(patients), 2)], dim=-1)
    return Design(**agent.design(obs)[0])


def subset(cohort: Cohort, size: int, features: Tensor | None = None) -> Cohort:
    """The first patients of a cohort, with other features if any are given."""
    features = cohort.features if features is None else features
    return Cohort(cohort.patient_ids[:size], features[:size], cohort.extra.iloc[:size], cohort.name)


@torch.no_grad()
def figures(
    model: RewardModel, features: Tensor, design: Design, best_score: Tensor | None = None
) -> dict[str, float]:
    """What a design per patient is worth under a reward model.

    Args:
        model: what evaluates.
        features: (P, 11) of the patients as they are.
        design: one per patient.
        best_score: (Q,) score of the best design of each of the first Q <= P patients; none to
            leave regret out.

    Returns:
        `mean_reward` and the shares of designs that break each safety limit and any, of all P;
        `best_reward` and `regret`, means of the first Q.
    """
    terms = reward_terms(model(features.to(torch.float32), *design), True)
    score = sum_terms(terms)
    broken = torch.stack([getattr(terms, f"reward_{name}") < 0 for name in SAFETY_LIMITS])
    shares = broken.float().mean(-1).tolist()
    result = {
        "mean_reward": score.mean().item(),
        **{f"{name}_breach_rate": x for name, x in zip(SAFETY_LIMITS, shares, strict=True)},
        "limit_breach_rate": broken.any(0).float().mean().item(),
    }
    if best_score is not None:
        result["best_reward"] = best_score.mean().item()
        result["regret"] = (best_score - score[: len(best_score)]).mean().item()
    return result


def measure(
    cohort: Cohort,
    training: Cohort,
    agents: dict[str, Agent],
    *,
    num_draws: int,
    num_noise: int,
    oracle_patients: int,
) -> pd.DataFrame:
    """A row per case and set of designs.

    Args:
        cohort: P patients to design for.
        training: those that the policies were trained on, for their share of unsafe designs.
        agents: policies by name.
        num_draws: of all assumptions together.
        num_noise: of the errors of measurement.
        oracle_patients: Q <= P, those for whom the best designs are searched for in every case.

    Returns:
        `kind` ("training" and "holdout": model as shipped, all patients of the cohort; "noise"; or
        that of a `Case`), `name` and `factor` of the case; `designs`, the run they come from or
        `ORACLE`; the columns of `figures`; and `change`, of the mean reward from the nominal case.
        Regret is of all patients in "holdout", of nobody in "training" and "joint-held", else of
        the first Q. The noise rows of `ORACLE` are designs for the first Q patients as measured,
        and evaluated on them alone.
    """
    truth, shipped = cohort.features, MechanisticModel()
    few = subset(cohort, oracle_patients)
    rows = []
    for name, agent in agents.items():
        designs = designs_of(agent, training.features)
        case = Case("training", "", 1.0, shipped)
        rows.append(row(case, name, figures(shipped, training.features, designs)))
    best = best_designs(cohort, shipped)
    frozen = {name: designs_of(agent, truth) for name, agent in agents.items()}
    frozen[ORACLE] = best.design
    for name, design in frozen.items():
        case = Case("holdout", "", 1.0, shipped)
        rows.append(row(case, name, figures(shipped, truth, design, best.score)))
    total = 1 + 2 * len(assumptions()) + 2 * num_draws
    for case in tqdm(cases(num_draws), "reward models", total, unit="model"):
        held = case.kind == "joint-held"
        best_score = None if held else best_designs(few, case.model).score
        for name, design in frozen.items():
            rows.append(row(case, name, figures(case.model, truth, design, best_score)))
    few_best = best.score[:oracle_patients]
    rows += noise_rows(cohort, few_best, agents, num_noise)
    return with_changes(pd.DataFrame(rows), few_best.mean().item())


def row(case: Case, designs: str, result: dict[str, float]) -> dict[str, object]:
    """Of the table."""
    described = {"kind": case.kind, "name": case.name, "factor": case.factor}
    return described | {"designs": designs} | result


def noise_rows(
    cohort: Cohort, best_score: Tensor, agents: dict[str, Agent], num_noise: int
) -> list[dict[str, object]]:
    """Designs for patients as measured, of the policies and of who knows the model."""
    shipped, few, rows = MechanisticModel(), len(best_score), []
    generator = torch.Generator().manual_seed(0)
    for draw in tqdm(range(num_noise), "measurement errors", unit="draw"):
        case = Case("noise", str(draw), math.nan, shipped)
        seen = measured(cohort.features, generator)
        for name, agent in agents.items():
            result = figures(shipped, cohort.features, designs_of(agent, seen), best_score)
            rows.append(row(case, name, result))
        misled = best_designs(subset(cohort, few, seen), shipped).design
        rows.append(row(case, ORACLE, figures(shipped, cohort.features[:few], misled, best_score)))
    return rows


def with_changes(table: pd.DataFrame, few_best: float) -> pd.DataFrame:
    """The table with the change of the mean reward from the nominal case.

    Args:
        table: of `measure`.
        few_best: mean best reward of the patients for whom designs are searched in every case.
    """
    nominal = table[table["kind"] == "nominal"].set_index("designs")["mean_reward"]
    table["change"] = table["mean_reward"] - table["designs"].map(nominal)
    misled = (table["kind"] == "noise") & (table["designs"] == ORACLE)
    table.loc[misled, "change"] = table["mean_reward"] - few_best
    table.loc[table["kind"] == "training", "change"] = math.nan  # other patients
    return table


def averaged(table: pd.DataFrame) -> pd.DataFrame:
    """The runs averaged case by case, beside the comparison designs."""
    designs = table["designs"].where(table["designs"] == ORACLE, "policy")
    keys = ["kind", "name", "factor", "designs"]
    grouped = table.assign(designs=designs).groupby(keys, sort=False, dropna=False)
    return grouped.mean(numeric_only=True).reset_index()


def ranked(mean: pd.DataFrame, column: str) -> pd.DataFrame:
    """A row per assumption: the policy's figures with it at both ends, the gravest rise first.

    Columns are pairs of a figure and a factor.
    """
    chosen = mean[(mean["kind"] == "constant") & (mean["designs"] == "policy")]
    wide = chosen.pivot(index="name", columns="factor", values=["regret", "limit_breach_rate"])
    return wide.loc[wide[column].max(axis=1).sort_values(ascending=False, kind="stable").index]


def value_shipped(name: str) -> str:
    """Value of an assumption in the model as shipped."""
    if name not in POLYMER_INDICES:
        return f"{getattr(MechanisticParams(), name):g}"
    column = getattr(load_polymers(), name)
    return f"{column.min():g} to {column.max():g}"


def spread(values: pd.Series, digits: int) -> str:
    """Median of a case's draws and, if it has several, their 5th to 95th percentile."""
    if values.isna().all():
        return "–"
    # Adding zero takes the sign off a number that rounds to zero.
    low, middle, high = (
        f"{x + 0.0:.{digits}f}" for x in values.quantile([0.05, 0.5, 0.95]).round(digits)
    )
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


def report(
    table: pd.DataFrame, *, num_patients: int, num_training: int, oracle_patients: int
) -> str:
    """The tables as Markdown."""
    mean = averaged(table)
    runs = [name for name in table["designs"].unique() if name != ORACLE]
    policy = mean[mean["designs"] == "policy"].groupby("kind")
    training, holdout, nominal = (
        policy.get_group(kind).iloc[0] for kind in ("training", "holdout", "nominal")
    )
    counts = policy.size()
    lines = [
        f"Policies {', '.join(runs)} (mean over runs); made by `benchmark/sensitivity.py`.",
        "",
        f"**Under the reward model as shipped {100 * holdout['limit_breach_rate']:.1f} % of the "
        f"policy's deterministic designs for the {num_patients} held-out virtual patients break a "
        f"safety limit, and {100 * training['limit_breach_rate']:.1f} % of those for the "
        f"{num_training:,} of the training cohort; the mean regret on the held-out ones is "
        f"{holdout['regret']:.2f} of a best reward of {holdout['best_reward']:.2f}.**",
        "",
        f"The designs are frozen; the model that evaluates them is not. Each of the "
        f"{len(assumptions())} assumptions (constants of grade D and the polymer indices) is moved "
        f"by {100 * SPREAD:.0f} % alone, and {counts['joint']} times all are moved together at "
        "random by up to that, the indices of each polymer on their own. In "
        f"{counts['noise']} draws the model stays and every feature of a patient is measured "
        f"with an error of up to {100 * NOISE:.0f} %. Regret is what the designs lose to the best "
        "ones under the model that evaluates them; it and the best reward are of the first "
        f"{oracle_patients} patients. *Best as shipped* are the best designs under the unmoved "
        "model; under measurement error, those for the patients as measured (the first "
        f"{oracle_patients} only). Median and 5th to 95th percentile over the draws.",
        "",
        *case_lines(mean),
        *assumption_lines(mean, nominal),
        "",
        "Unsafe means past a limit of the reward, in a model that was fitted to nobody: neither "
        "the shares nor the rewards are clinical facts. The ranges are not confidence intervals, "
        f"for nobody knows how wrong the assumptions are; {100 * SPREAD:.0f} % is as far as they "
        "were moved. The polymers' windows, the form of the equations and the safety limits were "
        "not moved.",
    ]
    return "\n".join(lines) + "\n"


def case_lines(mean: pd.DataFrame) -> list[str]:
    """Table of the kinds of cases."""
    lines = [
        "| case | designs | mean reward | change | best reward | regret | over toxicity limit, % | "
        "under integrity limit, % | over fibrosis limit, % | any, % |",
        "|---" * 10 + "|",
    ]
    rewards = ("mean_reward", "change", "best_reward", "regret")
    shares = (*(f"{name}_breach_rate" for name in SAFETY_LIMITS), "limit_breach_rate")
    for kind, title in (
        ("nominal", "as shipped"),
        ("joint", "all assumptions moved"),
        ("joint-held", f"all but {' and '.join(f'`{name}`' for name in HELD)}"),
        ("noise", "measurement error"),
    ):
        for designs in ("policy", ORACLE):
            chosen = mean[(mean["kind"] == kind) & (mean["designs"] == designs)]
            cells = [spread(chosen[name], 2) for name in rewards]
            cells += [spread(100.0 * chosen[name], 1) for name in shares]
            lines.append(f"| {title} | {designs} | {' | '.join(cells)} |")
    return lines


def assumption_lines(mean: pd.DataFrame, nominal: pd.Series) -> list[str]:
    """Tables of the assumptions that matter most, moved alone."""
    lines = []
    for column, title in (
        ("regret", "The ten assumptions that cost the policy most regret"),
        ("limit_breach_rate", "The ten that make most of its designs unsafe"),
    ):
        lines += [
            "",
            f"{title}, moved alone (as shipped: regret {nominal['regret']:.2f}, unsafe "
            f"{100 * nominal['limit_breach_rate']:.1f} %):",
            "",
            "| assumption | as shipped | regret, × 0.8 | × 1.2 | unsafe, × 0.8 | × 1.2 |",
            "|---|---|---|---|---|---|",
        ]
        for name, values in ranked(mean, column).head(10).iterrows():
            cells = [f"{x:.2f}" for x in values["regret"]]
            cells += [f"{100 * x:.1f} %" for x in values["limit_breach_rate"]]
            lines.append(f"| `{name}` | {value_shipped(name)} | {' | '.join(cells)} |")
    return lines


def draw(table: pd.DataFrame, num_shown: int = 15) -> bytes:
    """PNG: regret and share of unsafe designs of the policy with each assumption at both ends.

    Shows the `num_shown` that cost most regret and the ten that make most designs unsafe.
    """
    from matplotlib.figure import Figure

    mean = averaged(table)
    by_regret = ranked(mean, "regret")
    shown = {*by_regret.index[:num_shown], *ranked(mean, "limit_breach_rate").index[:10]}
    shown = by_regret[by_regret.index.isin(shown)][::-1]  # a chart is read from its bottom up
    nominal = mean[(mean["kind"] == "nominal") & (mean["designs"] == "policy")].iloc[0]
    figure = Figure(figsize=(9, 1.6 + 0.27 * len(shown)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    ends = zip(shown["regret"].columns, ("#0072B2", "#D55E00"), (0.2, -0.2), strict=True)
    for factor, color, offset in ends:
        rows = [i + offset for i in range(len(shown))]
        rise = shown["regret", factor] - nominal["regret"]
        left.barh(rows, rise, 0.4, left=nominal["regret"], color=color, label=f"× {factor:g}")
        share = 100.0 * shown["limit_breach_rate", factor]
        right.hlines(rows, 100.0 * nominal["limit_breach_rate"], share, color=color, lw=1)
        right.plot(share, rows, "o", color=color, ms=4)
    left.axvline(nominal["regret"], color="k", lw=0.8)
    right.axvline(100.0 * nominal["limit_breach_rate"], color="k", lw=0.8)
    left.set_yticks(range(len(shown)), shown.index, fontsize="small")
    left.set_ylim(-0.7, len(shown) - 0.3)
    left.set_xlabel("mean regret of the policy's designs")
    right.set_xlabel("those that break a safety limit, %")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    left.legend(loc="lower right", fontsize="small", title="assumption")
    rest = len(by_regret) - len(shown)
    figure.suptitle(
        f"One assumption of the reward model moved by {100 * SPREAD:.0f} %; vertical line: as "
        f"shipped; {rest} others raise neither as much",
        fontsize="medium",
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def main(argv: list[str] | None = None) -> int:
    """Measure, and write the three files; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--policy", type=Path, nargs="+", required=True, help="run directories, one per seed"
    )
    parser.add_argument("--draws", type=int, default=64, help="of all assumptions together")
    parser.add_argument("--noise-draws", type=int, default=20, help="of the errors of measurement")
    parser.add_argument(
        "--oracle-patients", type=int, default=100, help="searched for best designs in every case"
    )
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="where the files go")
    args = parser.parse_args(argv)
    cohort, training = load_cohort("holdout"), load_cohort("train")
    try:
        check_ranges(
            args,
            ("draws noise_draws", "1 or more", lambda x: x >= 1),
            ("oracle_patients", f"1 to {len(cohort)}", lambda x: 1 <= x <= len(cohort)),
        )
        if not args.output_dir.is_dir():
            raise ValueError(f"--output-dir {args.output_dir}: no such folder")
        agents = load_agents(args.policy)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = measure(
        cohort,
        training,
        agents,
        num_draws=args.draws,
        num_noise=args.noise_draws,
        oracle_patients=args.oracle_patients,
    )
    text = report(
        table,
        num_patients=len(cohort),
        num_training=len(training),
        oracle_patients=args.oracle_patients,
    )
    csv = table.to_csv(index=False, float_format="%.6g")
    write_atomically(args.output_dir / "sensitivity.csv", csv.encode())
    write_atomically(args.output_dir / "sensitivity.png", draw(table))
    write_atomically(args.output_dir / "sensitivity.md", text.encode())
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
