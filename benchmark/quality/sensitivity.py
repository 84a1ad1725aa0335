"""How far a trained policy leans on what nobody knows: assumed constants, and measurement error.

    python benchmark/quality/sensitivity.py --policy runs/quick-s1      # ten minutes on two cores

Freezes the deterministic designs for the 500 held-out patients, and the best designs under the
reward model as shipped, then evaluates both again where the model is wrong: every assumption (grade
D) moved by 20 %, one at a time and all together. A second part leaves the model alone and lets the
policy see features that were measured with an error of up to 5 %. The search for the best designs
is repeated in every case, for the first patients of the cohort: regret is what the designs lose to
it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import POLICY, Parser, count, designs_of, first_patients, made_by, table, write

from hydrogel_gym import Cohort, load_cohort, load_polymers
from hydrogel_gym.errors import UsageError
from hydrogel_gym.models.contract import RewardModel
from hydrogel_gym.models.mechanistic import MechanisticModel, MechanisticParams
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.problem.fields import PATIENT_FIELDS, Design
from hydrogel_gym.problem.reward import SAFETY_LIMITS, reward_terms, sum_terms
from hydrogel_gym.runs.command_line import run_script
from hydrogel_gym.runs.policies import load_policy, policy_path
from hydrogel_gym.train.ppo_hybrid import Agent

SPREAD = 0.2  # of an assumption, as a share of its value
NOISE = 0.05  # of a patient's feature, likewise
SHIPPED = "best as shipped"  # the comparison designs
# The indices of the polymer table, all of grade D, and the upper end of their range; all are 0 or
# more. The windows are of grade D too, but moving one moves what can be made at all.
POLYMER_INDICES = {
    "bioactivity": 1.0,
    "base_toxicity": math.inf,
    "filler_toxicity": math.inf,
    "filler_mid_dose_s_per_m": math.inf,
    "foreign_body_tendency": 1.0,
    "cohesion": 1.0,
}
# Integrity is nearly the product of these two and lies close above its limit, so that a fifth less
# of either breaks the limit whatever is designed. The joint draws are made without them as well.
HELD = ("integrity_cohesion_gain", "cohesion")
BREACHES = (*(f"{name}_breach_rate" for name in SAFETY_LIMITS), "limit_breach_rate")


class Case(NamedTuple):
    """A reward model to evaluate designs by."""

    kind: str  # nominal, constant, joint or joint-held
    name: str  # the assumption, or the number of the draw
    factor: float  # of the assumption; NaN where each has its own
    model: RewardModel


def assumptions() -> tuple[str, ...]:
    """Names of everything of grade D that is moved here."""
    return (*MechanisticParams.names_graded("D"), *POLYMER_INDICES)


def perturbed(factors: dict[str, float | Tensor]) -> MechanisticModel:
    """Built-in model whose named assumptions are multiplied: an index also per polymer, (24,)."""
    params, polymers = MechanisticParams(), load_polymers()
    constants, indices = {}, {}
    for name, factor in factors.items():
        if name in POLYMER_INDICES:
            column = getattr(polymers, name) * factor
            indices[name] = column.clamp(max=POLYMER_INDICES[name])
        else:
            constants[name] = getattr(params, name) * factor
    return MechanisticModel(replace(polymers, **indices), replace(params, **constants))


def joint_factors(generator: torch.Generator) -> dict[str, float | Tensor]:
    """One draw of a factor for every assumption, and for every polymer in each of its indices."""

    def draw(*size: int) -> Tensor:
        uniform = torch.rand(size, generator=generator, dtype=torch.float64)
        return 1.0 + SPREAD * (2.0 * uniform - 1.0)

    num_polymers = len(load_polymers())
    return {
        name: draw(num_polymers) if name in POLYMER_INDICES else draw().item()
        for name in assumptions()
    }


def cases(names: Iterable[str], num_draws: int) -> Iterator[Case]:
    """The model as shipped, then with one assumption moved, then with all, and all but `HELD`."""
    yield Case("nominal", "", 1.0, MechanisticModel())
    for name in names:
        for factor in (1.0 - SPREAD, 1.0 + SPREAD):
            yield Case("constant", name, factor, perturbed({name: factor}))
    generator = torch.Generator().manual_seed(0)
    for draw in range(num_draws):
        factors = joint_factors(generator)
        yield Case("joint", str(draw), math.nan, perturbed(factors))
        held = {name: factor for name, factor in factors.items() if name not in HELD}
        yield Case("joint-held", str(draw), math.nan, perturbed(held))


def measured(features: Tensor, generator: torch.Generator) -> Tensor:
    """Features (P, 11) as an instrument with independent errors reads them, kept in their limits.

    The errors break the identities between columns (LVEF and volumes, say), as independent
    measurements do.
    """
    low, high = (
        torch.tensor([getattr(field, end) for field in PATIENT_FIELDS], dtype=features.dtype)
        for end in ("low", "high")
    )
    uniform = torch.rand(features.shape, generator=generator, dtype=features.dtype)
    return (features * (1.0 + NOISE * (2.0 * uniform - 1.0))).clamp(low, high)


@torch.no_grad()
def figures(
    model: RewardModel, features: Tensor, design: Design, best_score: Tensor | None = None
) -> dict[str, float]:
    """What a design per patient is worth under a reward model.

    `mean_reward` and the shares of designs that break each safety limit and any, of all P patients
    with `features` (P, 11); `best_reward` and `regret`, means of the first Q <= P, for whom the
    score of the best design is known.
    """
    terms = reward_terms(model(features.to(torch.float32), *design), True)
    score = sum_terms(terms)
    broken = torch.stack([getattr(terms, f"reward_{name}") < 0 for name in SAFETY_LIMITS])
    shares = [*broken.float().mean(-1).tolist(), broken.any(0).float().mean().item()]
    result = {"mean_reward": score.mean().item()} | dict(zip(BREACHES, shares, strict=True))
    if best_score is not None:
        result["best_reward"] = best_score.mean().item()
        result["regret"] = (best_score - score[: len(best_score)]).mean().item()
    return result


def measure(
    cohort: Cohort,
    agent: Agent,
    names: Iterable[str],
    num_draws: int,
    num_noise: int,
    oracle_patients: int,
) -> pd.DataFrame:
    """A row per case and set of designs.

    `kind` is "holdout" (model as shipped, all patients), "noise", or that of a `Case`; `designs`
    are "policy" or `SHIPPED`; then come the columns of `figures`, and `change`, of the mean reward
    from "holdout". Regret is of all patients there, of nobody in "joint-held", else of the first Q,
    for whom best designs are searched for. The noise rows of `SHIPPED` are designs for these as
    measured, and evaluated on them alone.
    """
    truth, shipped, rows = cohort.features, MechanisticModel(), []

    def add(kind: str, designs: str, *evaluated: Any, base: float | None = None, **case) -> float:
        row = {"kind": kind, "designs": designs} | case | figures(*evaluated)
        base = row["mean_reward"] if base is None else base
        rows.append(row | {"change": row["mean_reward"] - base})
        return row["mean_reward"]

    best = best_designs(cohort, shipped)
    frozen = {"policy": designs_of(agent, truth), SHIPPED: best.design}
    usual = {
        name: add("holdout", name, shipped, truth, design, best.score)
        for name, design in frozen.items()
    }
    few, few_best = first_patients(cohort, oracle_patients), best.score[:oracle_patients]
    for case in tqdm(list(cases(names, num_draws)), "reward models", disable=None):
        score = best_designs(few, case.model).score if case.kind != "joint-held" else None
        about = {"name": case.name, "factor": case.factor}
        for name, design in frozen.items():
            add(case.kind, name, case.model, truth, design, score, base=usual[name], **about)
    generator = torch.Generator().manual_seed(0)
    for _ in tqdm(range(num_noise), "measurement errors", disable=None):
        seen = measured(truth, generator)
        ours = designs_of(agent, seen)
        add("noise", "policy", shipped, truth, ours, few_best, base=usual["policy"])
        misled = best_designs(first_patients(cohort, oracle_patients, seen), shipped).design
        base = few_best.mean().item()
        add("noise", SHIPPED, shipped, few.features, misled, few_best, base=base)
    return pd.DataFrame(rows)


def ranked(results: pd.DataFrame, column: str) -> pd.DataFrame:
    """A row per assumption: the policy's figures with it at both ends, the gravest rise first.

    Columns are pairs of a figure and a factor.
    """
    chosen = results[(results["kind"] == "constant") & (results["designs"] == "policy")]
    wide = chosen.pivot(index="name", columns="factor", values=["regret", "limit_breach_rate"])
    return wide.loc[wide[column].max(axis=1).sort_values(ascending=False, kind="stable").index]


def percentiles(values: pd.Series, digits: int) -> str:
    """Median of a case's draws and, if it has several, their 5th to 95th percentile."""
    if values.isna().all():
        return "–"
    # Adding zero takes the sign off a number that rounds to zero.
    low, middle, high = (
        f"{x + 0.0:.{digits}f}" for x in values.quantile([0.05, 0.5, 0.95]).round(digits)
    )
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


def report(results: pd.DataFrame) -> list[str]:
    """The tables."""
    kinds = results.groupby(["kind", "designs"])
    nominal = kinds.get_group(("nominal", "policy")).iloc[0]
    rows = []
    for kind, title in (
        ("nominal", "as shipped"),
        ("joint", "all assumptions moved"),
        ("joint-held", f"all but {' and '.join(f'`{name}`' for name in HELD)}"),
        ("noise", "measurement error"),
    ):
        for designs in ("policy", SHIPPED):
            chosen = kinds.get_group((kind, designs))
            rewards = ("mean_reward", "change", "best_reward", "regret")
            cells = [percentiles(chosen[name], 2) for name in rewards]
            cells += [percentiles(100.0 * chosen[name], 1) for name in BREACHES]
            rows.append([title, designs, *cells])
    columns = ["case", "designs", "mean reward", "change", "best reward", "regret"]
    columns += ["over toxicity limit, %", "under integrity limit, %", "over fibrosis limit, %"]
    lines = table([*columns, "any, %"], rows)
    for column, title in (
        ("regret", "The ten assumptions that cost the policy most regret"),
        ("limit_breach_rate", "The ten that make most of its designs unsafe"),
    ):
        rows = []
        for name, values in ranked(results, column).head(10).iterrows():
            cells = [f"{x:.2f}" for x in values["regret"]]
            cells += [f"{100 * x:.1f} %" for x in values["limit_breach_rate"]]
            rows.append([f"`{name}`", *cells])
        columns = ["assumption", "regret, × 0.8", "× 1.2", "unsafe, × 0.8", "× 1.2"]
        nominally = f"regret {nominal['regret']:.2f}, unsafe {100 * nominal[BREACHES[-1]]:.1f} %"
        lines += ["", f"{title}, moved alone (as shipped: {nominally}):", "", *table(columns, rows)]
    return lines


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the tables."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--policy", type=Path, default=POLICY, help="run directory")
    flag("--assumptions", nargs="+", choices=assumptions(), default=assumptions(), metavar="NAME")
    flag("--draws", type=count, default=64, help="of all assumptions together")
    flag("--noise-draws", type=count, default=20, help="of the errors of measurement")
    flag("--oracle-patients", type=count, default=100, help="searched for in every case")
    args = parser.parse_args(argv)
    agent, saved = load_policy(policy_path(args.policy), Agent, "cpu")
    if (horizon := saved["training_config"]["horizon"]) != 1:
        raise UsageError(f"--policy {args.policy}: trained with horizon {horizon}; expected 1")
    cohort, sizes = load_cohort("holdout"), (args.draws, args.noise_draws, args.oracle_patients)
    results = measure(cohort, agent, args.assumptions, *sizes)
    nominal = results[(results["kind"] == "holdout") & (results["designs"] == "policy")].iloc[0]
    lines = [
        f"Under the reward model as shipped {100 * nominal['limit_breach_rate']:.1f} % of the "
        f"deterministic designs of the policy {args.policy.name} for the {len(cohort)} held-out "
        "virtual patients break a safety limit; their mean regret is "
        f"{nominal['regret']:.2f} of a best reward of {nominal['best_reward']:.2f}.",
        "",
        f"Each of {len(args.assumptions)} assumptions is moved by {100 * SPREAD:.0f} % alone, and "
        f"{args.draws} times all are moved together at random by up to that, the indices of each "
        f"polymer on their own. In {args.noise_draws} draws the model stays and every feature of a "
        f"patient is measured with an error of up to {100 * NOISE:.0f} %. Regret is what the "
        "designs lose to the best ones under the model that evaluates them; it and the best reward "
        f"are of the first {args.oracle_patients} patients. *Best as shipped* are the best designs "
        "under the unmoved model, or for these patients as measured. Median and 5th to 95th "
        "percentile over the draws. Unsafe means past a limit of the reward, in a model that was "
        "fitted to nobody: neither the shares nor the rewards are clinical facts.",
        "",
        *report(results),
    ]
    write(args.output_dir, "sensitivity", lines, made=made_by())


if __name__ == "__main__":
    sys.exit(run_script(main))
