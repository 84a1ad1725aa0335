"""What a trained policy is worth: regret against the reward calls spent on a new patient.

    python benchmark/quality/regret.py --policy runs/quick-s1        # half an hour on two cores
    python benchmark/quality/regret.py --methods random --patients 10 --budget 100

Every method designs for the same held-out patients and is compared by the same count of calls of
the reward model; the oracle (`hydrogel_gym.oracle`) says what was possible. Two thirds of the time
are BoTorch's. Needs `pip install -e ".[bench]"`.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import ORACLE_CACHE, POLICY, Parser, count, figure, made_by, table, write
from quality.baselines import search, transfer
from quality.baselines.objective import CountingModel, PatientObjective, design_rows

from hydrogel_gym import Cohort, load_cohort
from hydrogel_gym.errors import UsageError
from hydrogel_gym.models.contract import RewardModel, load_reward_model
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.oracle.search import CALLS_PER_SEARCH
from hydrogel_gym.problem.fields import Design
from hydrogel_gym.runs.command_line import run_script
from hydrogel_gym.runs.directory import POLICY_FILE, SUMMARY_FILE
from hydrogel_gym.runs.policies import load_policy
from hydrogel_gym.train.ppo_hybrid import Agent

SHOWN_CALLS = (1, 10, 30, 100, 300, 1_000, 3_000, 10_000)
Traced = tuple[np.ndarray, float]  # best reward after each call, and seconds of overhead


class Method(NamedTuple):
    """A way to get a design, and how much it is given."""

    label: str
    colour: str  # of the palette of Okabe and Ito, which the colour-blind can distinguish
    budget: int = 1
    patients: int = 100
    search: Any = None
    library: str | None = None


METHODS = {
    "policy": Method("policy, zero-shot", "#D55E00"),
    "policy_sample": Method("policy, one sample", "#F0A070"),
    "policy_best_of_k": Method("policy, best of k", "#D55E00", 1_000),
    "one_size_fits_all": Method("one size fits all", "#000000"),
    "nearest_patient": Method("nearest patient", "#0072B2"),
    "regression": Method("regression onto oracle designs", "#009E73", library="sklearn"),
    "random": Method("random search", "#888888", 10_000, search=search.random_search),
    "sobol": Method("Sobol search", "#56B4E9", 10_000, search=search.sobol_search),
    "cma_es": Method("CMA-ES", "#0072B2", 10_000, search=search.cma_es, library="cma"),
    # The overhead of these two decides what is affordable: about 10 ms and 0.6 s a call.
    "tpe": Method("TPE", "#E69F00", 1_000, 50, search=search.tpe, library="optuna"),
    "botorch": Method("BoTorch", "#009E73", 150, 20, search=search.botorch_bo, library="botorch"),
}


class Runs(NamedTuple):
    """What a method reached, a run for each of the first patients."""

    calls: np.ndarray  # (C,) numbers of calls, ascending
    rewards: np.ndarray  # (R, C) best reward after so many calls
    regret: np.ndarray  # (R, C) how far that is from the oracle's
    overhead_seconds: float  # of the CPU besides the reward model, mean over the runs
    calls_before: float  # reward calls before the first new patient


def call_grid(budget: int) -> np.ndarray:
    """Numbers of calls that are tabulated: each up to 20, then 40 per decade, and the budget."""
    if budget <= 20:
        return np.arange(1, budget + 1)
    size = 1 + math.ceil(40 * math.log10(budget / 20))
    return np.union1d(np.arange(1, 21), np.geomspace(20, budget, size).round().astype(int))


def compared(traced: list[Traced], oracle: np.ndarray, calls_before: float = 0.0) -> Runs:
    """Runs, given what was traced and the oracle's reward of each patient."""
    at = call_grid(len(traced[0][0])) - 1
    rewards = np.stack([trace[at] for trace, _ in traced])
    regret = oracle[: len(rewards), None] - rewards
    overhead = statistics.fmean(seconds for _, seconds in traced)
    return Runs(at + 1, rewards, regret, overhead, calls_before)


def patient_seed(seed: int, patient: int) -> int:
    """Seed of a method's random numbers for one patient."""
    return int(np.random.SeedSequence((seed, patient)).generate_state(1)[0])


@functools.cache
def mechanistic() -> RewardModel:
    """The reward model, loaded once in each process."""
    return load_reward_model("mechanistic")


def evaluated(patient: Tensor, design: Design) -> Traced:
    """Trace and overhead of designs for a patient."""
    objective = PatientObjective(patient, mechanistic(), len(design.polymer_id))
    objective(design)
    return objective.trace, objective.overhead_seconds


def search_patient(name: str, features: np.ndarray, budget: int, seed: int) -> Traced:
    """Trace and overhead of a search for one patient."""
    torch.set_num_threads(1)  # a core for each process
    method = METHODS[name]
    if method.library:
        importlib.import_module(method.library)  # its import is no overhead of the search
    objective = PatientObjective(torch.from_numpy(features), mechanistic(), budget)
    method.search(objective, seed)
    return objective.trace, objective.overhead_seconds


def search_all(name: str, patients: Tensor, budget: int, seed: int, processes: int) -> list[Traced]:
    """A search for every patient, several at a time."""
    jobs = [(name, row, budget, patient_seed(seed, k)) for k, row in enumerate(patients.numpy())]
    show = functools.partial(tqdm, desc=METHODS[name].label, total=len(jobs), disable=None)
    if processes == 1:
        return list(show(search_patient(*job) for job in jobs))
    # spawn: a forked child would inherit the locks of the parent's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        return list(show(pool.map(search_patient, *zip(*jobs, strict=True))))


@torch.no_grad()
def policy_designs(agent: Agent, patient: Tensor, name: str, budget: int, seed: int) -> Design:
    """Designs of a policy for one (11,) patient: sampled, or the deterministic one and samples.

    The deterministic design comes first because it is what one would try first: the trace of the
    best so far then starts at the zero-shot policy.
    """
    obs = torch.cat([patient.float(), torch.zeros(2)]).expand(budget, -1)
    drawn = agent.design(obs, torch.Generator().manual_seed(seed))[0]
    if name != "policy_sample":
        for head, first in agent.design(obs[:1], None)[0].items():
            drawn[head][:1] = first
    return Design(**drawn)


def transferred(
    name: str, cohort: Cohort, designs: Design, patients: Tensor, seed: int
) -> tuple[list[Traced], int]:
    """A method's design for each patient, evaluated; and the calls it made on the cohort."""
    model = CountingModel(mechanistic())
    if name == "one_size_fits_all":
        one, _ = transfer.one_size_fits_all(cohort.features, designs, model, seed)
        proposed = design_rows(one, torch.zeros(len(patients), dtype=torch.int64))
    elif name == "nearest_patient":
        proposed = transfer.nearest_patient(cohort.features, designs, patients)
    else:
        proposed = transfer.regression(cohort.features, designs, patients, seed)
    rows = [design_rows(proposed, torch.tensor([k])) for k in range(len(patients))]
    return [evaluated(*pair) for pair in zip(patients, rows, strict=True)], model.calls


def calls_to_match(calls: np.ndarray, reached: np.ndarray) -> int | None:
    """Fewest tabulated calls at which a target is reached; None if it is not."""
    return int(calls[reached].min()) if reached.any() else None


def quartiles(values: np.ndarray) -> str:
    """Median and interquartile range."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def report(every: dict[str, Runs]) -> list[str]:
    """The tables."""
    policy = every["policy"]
    one, many, matching = [], [], []
    for name, runs in every.items():
        method, size, budget = METHODS[name], len(runs.rewards), int(runs.calls[-1])
        if method.budget == 1:
            fraction = (runs.rewards / (runs.rewards + runs.regret)).mean()
            one.append([method.label, quartiles(runs.regret), f"{runs.regret.mean():.2f}"])
            one[-1] += [f"{runs.rewards.mean():.2f}", f"{100 * fraction:.1f} %"]
            one[-1].append(f"{runs.calls_before:,.0f}")
            continue
        column = {limit: int((runs.calls <= limit).sum()) - 1 for limit in SHOWN_CALLS}
        cells = [
            quartiles(runs.regret[:, k]) if limit <= budget else "–" for limit, k in column.items()
        ]
        many.append([method.label, size, *cells])
        if method.search:  # compared with the policy on the same patients
            target = np.median(policy.regret[:size])
            median = calls_to_match(runs.calls, np.median(runs.regret, 0) <= target)
            reached = runs.rewards.mean(0) >= policy.rewards[:size].mean()
            mean = calls_to_match(runs.calls, reached)
            cells = [f"{x:,}" if x else f"> {budget:,}" for x in (median, mean)]
            overhead = f"{1e3 * runs.overhead_seconds / budget:.3g} ms"
            matching.append([method.label, size, *cells, overhead])
    shares = ["median regret", "mean regret", "mean reward", "mean fraction of the oracle"]
    equal = ["calls, equal median regret", "calls, equal mean reward", "overhead per call"]
    return [
        "## One call per new patient",
        "",
        *table(["method", *shares, "reward calls beforehand"], one),
        "",
        "The transfer methods use the oracle's design for every patient of the training cohort; "
        "its calls are counted.",
        "",
        "## Median regret against calls per new patient",
        "",
        *table(["method", "patients", *(f"{x:,}" for x in SHOWN_CALLS)], many),
        "",
        "Best of k: the deterministic design first, then k − 1 samples.",
        "",
        "## Calls per patient to equal the zero-shot policy",
        "",
        *table(["search", "patients", *equal], matching),
        "",
        "Calls are tabulated in steps of 6 % (each up to 20). Overhead is CPU time of one core "
        "without the reward model, mean over the whole budget. With a closed-form model, searching "
        "for each patient directly is cheap; a policy pays where a call is dear.",
    ]


def draw(every: dict[str, Runs]) -> Any:
    """Regret against calls; methods that make one call as points."""
    picture = figure(9, 5.5)
    axes = picture.subplots()
    for name, runs in every.items():
        method, label = METHODS[name], f"{METHODS[name].label} ({len(runs.rewards)} patients)"
        low, middle, high = np.quantile(runs.regret, [0.25, 0.5, 0.75], axis=0).clip(0.005)
        marker = "o" if method.budget == 1 else None
        axes.plot(runs.calls, middle, color=method.colour, label=label, marker=marker)
        axes.fill_between(runs.calls, low, high, color=method.colour, alpha=0.13, lw=0)
    axes.grid(alpha=0.3, which="major")
    axes.set(xscale="log", xlabel="reward calls per new patient", yscale="log", ylim=(0.01, 30.0))
    axes.set_ylabel("regret: oracle's reward − method's, median and IQR")
    axes.legend(loc="upper right", fontsize=8, ncols=2)
    return picture


def main(argv: list[str] | None = None) -> None:
    """Run the methods, and write the tables and the picture."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--policy", type=Path, default=POLICY, help="finished run directory of the trainer")
    flag("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="beside the policy")
    flag("--patients", type=count, default=100, help="held out; at most 50 for tpe, 20 for botorch")
    flag("--budget", type=count, default=10_000, help="calls per patient, where affordable")
    flag("--processes", type=count, default=2, help="patients searched at once")
    flag("--seed", type=int, default=0, help="of the choice of patients and methods")
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes started below
    torch.set_num_threads(1)
    chosen = [name for name in METHODS if name.startswith("policy") or name in args.methods]
    for name in chosen:
        if (library := METHODS[name].library) and not importlib.util.find_spec(library):
            raise UsageError(f"{library} is missing: pip install -e '.[bench]'")
    agent, _ = load_policy(args.policy / POLICY_FILE, Agent, "cpu")
    summary = json.loads((args.policy / SUMMARY_FILE).read_text())
    holdout, cohort = load_cohort("holdout"), load_cohort("train")
    order = torch.from_numpy(np.random.default_rng(args.seed).permutation(len(holdout)))
    order = order[: args.patients]
    patients = holdout.features[order]
    oracle = best_designs(holdout, cache_dir=ORACLE_CACHE, progress=True).score[order].numpy()
    every: dict[str, Runs] = {}
    for name in chosen:
        method, before = METHODS[name], 0.0
        budget, some = min(method.budget, args.budget), patients[: method.patients]
        if method.search:
            found = search_all(name, some, budget, args.seed, args.processes)
        elif name.startswith("policy"):
            before = summary["samples"]
            seeds = [patient_seed(args.seed, k) for k in range(len(some))]
            found = [
                evaluated(patient, policy_designs(agent, patient, name, budget, seed))
                for patient, seed in zip(some, seeds, strict=True)
            ]
        else:
            designs = best_designs(cohort, cache_dir=ORACLE_CACHE, progress=True).design
            found, calls = transferred(name, cohort, designs, some, args.seed)
            before = 2 * CALLS_PER_SEARCH * len(cohort) + calls
        every[name] = compared(found, oracle.astype(float), before)
    lines = [
        f"Regret (the oracle's reward minus the method's) on {len(order)} patients of the held-out "
        f"cohort; policy: `{args.policy.name}` (preset {summary['preset']}), trained with "
        f"{summary['samples']:,} reward calls in {summary['wall_seconds']:,.0f} s. Mean reward of "
        f"the oracle {oracle.mean():.2f}. Brackets hold the interquartile range over patients. A "
        "method on fewer patients, as its row says, is compared with the policy on those.",
        "",
        *report(every),
    ]
    write(args.output_dir, "regret", lines, draw(every), made_by(1))


if __name__ == "__main__":
    sys.exit(run_script(main))
