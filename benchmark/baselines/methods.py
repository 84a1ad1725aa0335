"""The methods that are compared, and what each reaches for new patients by calls of the model."""

from __future__ import annotations

import functools
import importlib
import math
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from baselines import search, transfer
from baselines.objective import CountingModel, PatientObjective
from baselines.policy import TrainedPolicy
from hydrogel_gym import Cohort
from hydrogel_gym.models.contract import RewardModel, load_reward_model
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.problem.fields import Design

NUM_TIMED = 64  # patients on whom the oracle's own cost is measured
REFERENCE = "policy"  # what all else is compared with


class Method(NamedTuple):
    """A way to get a design: how it is shown, what it needs and how much it is given.

    `colour` and `marker` are those of the picture; colours are of the palette of Okabe and Ito,
    which the colour-blind can distinguish.
    """

    label: str
    kind: Literal["search", "transfer", "policy"]
    budget: int
    patients: int
    colour: str
    marker: str = ""
    propose: search.Search | None = None
    library: str | None = None


METHODS = {
    "policy": Method("policy, zero-shot", "policy", 1, 100, "#D55E00", "*"),
    "policy_sample": Method("policy, one sample", "policy", 1, 100, "#D55E00", "x"),
    "policy_best_of_k": Method("policy, best of k", "policy", 1_000, 100, "#D55E00"),
    "one_size_fits_all": Method("one size fits all", "transfer", 1, 100, "#000000", "s"),
    "nearest_patient": Method(
        "nearest patient", "transfer", 1, 100, "#0072B2", "o", library="sklearn"
    ),
    "regression": Method(
        "regression onto oracle designs", "transfer", 1, 100, "#009E73", "D", library="sklearn"
    ),
    "random": Method(
        "random search", "search", 10_000, 100, "#888888", propose=search.random_search
    ),
    "sobol": Method("Sobol search", "search", 10_000, 100, "#56B4E9", propose=search.sobol_search),
    "cma_es": Method(
        "CMA-ES", "search", 10_000, 100, "#0072B2", propose=search.cma_es, library="cma"
    ),
    # The overhead of these two decides what is affordable: about 10 ms and 0.6 s a call.
    "tpe": Method("TPE", "search", 1_000, 50, "#E69F00", propose=search.tpe, library="optuna"),
    "botorch": Method(
        "BoTorch", "search", 150, 20, "#009E73", propose=search.botorch_bo, library="botorch"
    ),
}


class Runs(NamedTuple):
    """What a method reached: R runs, one per patient (and per policy, where several are pooled)."""

    calls: np.ndarray  # (C,) numbers of calls, ascending
    rewards: np.ndarray  # (R, C) best reward after so many calls
    oracle: np.ndarray  # (R,) the oracle's reward for the run's patient
    overhead_seconds: np.ndarray  # (C,) CPU seconds besides the reward model, per patient
    training_calls: float = 0.0  # reward calls before the first new patient
    training_seconds: float = 0.0


def call_grid(budget: int) -> np.ndarray:
    """Numbers of calls that are tabulated: each up to 20, then 40 per decade, and the budget."""
    if budget <= 20:
        return np.arange(1, budget + 1)
    count = 1 + math.ceil(40 * math.log10(budget / 20))
    tail = np.geomspace(20, budget, count).round().astype(int)
    return np.union1d(np.arange(1, 21), tail)


def patient_seed(seed: int, patient: int) -> int:
    """Seed of a method's random numbers for one patient."""
    return int(np.random.SeedSequence((seed, patient)).generate_state(1)[0])


@functools.cache
def mechanistic() -> RewardModel:
    """The reward model, loaded once in each process."""
    return load_reward_model("mechanistic")


def search_patient(
    name: str, features: np.ndarray, budget: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Best reward and cumulative overhead at `call_grid(budget)`, of one search for one patient."""
    method = METHODS[name]
    if method.library:
        importlib.import_module(method.library)  # its import is no overhead of the search
    objective = PatientObjective(torch.from_numpy(features), mechanistic(), budget)
    method.propose(objective, seed)
    at = call_grid(budget) - 1
    return objective.trace[at], objective.overhead_seconds[at]


def start_worker() -> None:
    """Leave one core to each process; the overhead of a search is no work for several."""
    torch.set_num_threads(1)


def run_search(
    name: str, patients: Tensor, oracle: np.ndarray, budget: int, seed: int, processes: int
) -> Runs:
    """Run a search for every patient, several at a time."""
    jobs = [(name, row, budget, patient_seed(seed, k)) for k, row in enumerate(patients.numpy())]
    results = list(
        tqdm(in_parallel(jobs, processes), METHODS[name].label, total=len(jobs), dynamic_ncols=True)
    )
    rewards, overhead = (np.stack(parts) for parts in zip(*results, strict=True))
    return Runs(call_grid(budget), rewards, oracle, overhead.mean(0))


def in_parallel(jobs: list[tuple], processes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Results of `search_patient`, in the order of the jobs."""
    if processes == 1:
        yield from (search_patient(*job) for job in jobs)
        return
    # spawn: a forked child would inherit the locks of the parent's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=start_worker) as pool:
        yield from pool.map(search_patient, *zip(*jobs, strict=True))


def run_policy(
    name: str,
    policies: list[TrainedPolicy],
    patients: Tensor,
    oracle: np.ndarray,
    budget: int,
    seed: int,
) -> Runs:
    """Let every policy design for every patient."""
    at = call_grid(budget) - 1
    rewards, overhead = [], []
    for policy in policies:
        for k, patient in enumerate(patients):
            objective = PatientObjective(patient, mechanistic(), budget)
            key = patient_seed(seed, k)
            if name == "policy_sample":
                design = policy.propose(patient[None], torch.Generator().manual_seed(key))
            else:
                design = policy.best_of(patient, budget, key)
            objective(design)
            rewards.append(objective.trace[at])
            overhead.append(objective.overhead_seconds[at])
    summaries = [policy.summary for policy in policies]
    return Runs(
        at + 1,
        np.stack(rewards),
        np.tile(oracle, len(policies)),
        np.mean(overhead, 0),
        float(np.mean([summary["samples"] for summary in summaries])),
        float(np.mean([summary["wall_seconds"] for summary in summaries])),
    )


def run_transfer(
    name: str,
    cohort: Cohort,
    designs: Design,
    patients: Tensor,
    oracle: np.ndarray,
    seed: int,
    cost: OracleCost,
) -> tuple[Runs, str]:
    """Carry designs over to the patients; also says how it was set up, or nothing.

    Args:
        name: of the method.
        cohort: training patients.
        designs: the oracle's for them.
        patients: (M, 11) new patients.
        oracle: (M,) the oracle's rewards for these.
        seed: of the method.
        cost: what the oracle spends per training patient.
    """
    model = CountingModel(mechanistic())
    start, note = time.process_time(), ""
    if name == "one_size_fits_all":
        one = transfer.one_size_fits_all(cohort.features, designs, model, seed)
        setup = time.process_time() - start
        proposed = Design(*(part.expand(len(patients), *part.shape[1:]) for part in one.design))
    elif name == "nearest_patient":
        setup = 0.0
        proposed = transfer.nearest_patient(cohort.features, designs, patients)
    else:
        rewards_of = transfer.cross_validated_rewards(cohort.features, designs, model, seed)
        family = max(rewards_of, key=rewards_of.get)
        learner = transfer.DesignRegression(family, seed).fit(cohort.features, designs)
        setup = time.process_time() - start
        proposed = learner.predict(patients)
        note = (
            f"Regression: {family}, the best of "
            + ", ".join(f"{key} ({value:.2f})" for key, value in rewards_of.items())
            + " by mean reward in cross-validation on the training cohort."
        )
    overhead = (time.process_time() - start - setup) / len(patients)
    rewards = []
    for k, patient in enumerate(patients):
        objective = PatientObjective(patient, mechanistic(), 1)
        objective(transfer.design_rows(proposed, torch.tensor([k])))
        rewards.append(objective.trace)
    runs = Runs(
        np.array([1]),
        np.stack(rewards),
        oracle,
        np.array([overhead]),
        len(cohort) * cost.calls + model.calls,
        len(cohort) * cost.seconds + setup,
    )
    return runs, note


class OracleCost(NamedTuple):
    """What the oracle spends per patient."""

    calls: float
    seconds: float  # of one core
    overhead: float  # the part of it that is not the reward model


def oracle_cost(cohort: Cohort) -> OracleCost:
    """Measure the oracle's cost on a few patients."""
    count = min(NUM_TIMED, len(cohort))
    few = Cohort(
        cohort.patient_ids[:count], cohort.features[:count], cohort.extra[:count], cohort.name
    )
    model = CountingModel(mechanistic())
    start = time.process_time()
    best_designs(few, model)
    spent = time.process_time() - start
    return OracleCost(model.calls / count, spent / count, (spent - model.cpu_seconds) / count)


def check_libraries(names: Iterable[str]) -> None:
    """Import what the methods need.

    Raises:
        ValueError: a library is missing; the message says how to get it.
    """
    for name in names:
        library = METHODS[name].library
        try:
            if library:
                importlib.import_module(library)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"method {name} needs {library} ({error}): pip install -e '.[bench]'"
            ) from error
