"""What the policy does for its patients: its designs, and the rewards of those next to them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hydrogel_gym.errors import UsageError, first_line
from hydrogel_gym.oracle import cached_best_designs
from hydrogel_gym.problem.cohort import Cohort, CohortError, load_cohort
from hydrogel_gym.problem.fields import (
    COVERAGES,
    FORMULATION_FIELDS,
    PATIENT_FIELDS,
    Design,
    Outcomes,
)
from hydrogel_gym.problem.polymers import NUM_POLYMERS
from hydrogel_gym.problem.reward import (
    SAFETY_LIMITS,
    RewardConfig,
    breaches,
    compute_reward,
    safety_margins,
)
from hydrogel_gym.report.reading import SavedRun
from hydrogel_gym.runs.devices import fast_float32
from hydrogel_gym.runs.environments import make_envs
from hydrogel_gym.runs.evaluation import EvaluationSet, policy_designs
from hydrogel_gym.runs.identity import digest
from hydrogel_gym.runs.options import ADAPTIVE, ProblemOptions, RunOptions, from_config
from hydrogel_gym.runs.uncertainty import RegretPrediction, predict, try_designs

SLICE_POINTS = 33  # along each parameter of the formulation, both bounds included
# Another processor rounds otherwise, and may tip the choice of a polymer for a few patients.
SAME_REWARD = 0.05


class Slices(NamedTuple):
    """Rewards of the designs next to the chosen ones, (P, N).

    The columns are `SLICE_POINTS` along each of the four parameters from bound to bound, then each
    polymer, then each coverage; all else is as in the chosen design.
    """

    reward: np.ndarray
    is_unsafe: np.ndarray  # breaks a safety limit


class Patients(NamedTuple):
    """The deterministic policy's design for each of P patients; arrays have P rows."""

    cohort: Cohort
    config: RewardConfig
    polymer_id: np.ndarray
    formulation: np.ndarray  # (P, 4)
    coverage: np.ndarray
    reward: np.ndarray
    predicted: dict[str, np.ndarray]  # outcomes and terms of the reward, by name
    best: np.ndarray | None  # largest possible reward
    slices: Slices
    prediction: RegretPrediction | None = None  # of the regret, where the policy is calibrated

    @property
    def features(self) -> dict[str, np.ndarray]:
        """Columns of the cohort by name."""
        columns = self.cohort.features.numpy().T
        return {item.name: column for item, column in zip(PATIENT_FIELDS, columns, strict=True)}

    @property
    def regret(self) -> np.ndarray:
        """How much better the best possible design is; where that was searched for."""
        # A design may beat the best that two searches found, by their precision.
        regret: np.ndarray = np.maximum(self.best - self.reward, 0.0)
        return regret

    @property
    def margins(self) -> dict[str, np.ndarray]:
        """Distance to each safety limit, negative where it is broken."""
        outcomes = Outcomes(*(torch.from_numpy(self.predicted[name]) for name in Outcomes._fields))
        margins = safety_margins(outcomes, self.config)
        return {name: margins[f"{name}_margin"].numpy() for name in SAFETY_LIMITS}


def saved_problem(run: SavedRun, which: str) -> tuple[ProblemOptions, Any, Cohort]:
    """The problem of a run, the dtype of its environments, and its cohort `train` or `holdout`.

    Raises:
        UsageError: the patients cannot be had again, or the settings are of another version.
    """
    try:
        options = ProblemOptions.of(run.config)
        dtype = from_config(RunOptions, run.config).dtype
        path = options.cohort if which == "train" else options.holdout_cohort or "holdout"
        return options, dtype, load_cohort(path)
    except (CohortError, TypeError) as error:
        raise UsageError(first_line(error)) from error


@torch.no_grad()
def design_patients(run: SavedRun) -> Patients:
    """Design for every patient that a run was trained on.

    Raises:
        UsageError: the patients cannot be had again, or are not those of the run.
    """
    assert run.policy
    options, dtype, cohort = saved_problem(run, "train")
    if options.env_id == ADAPTIVE:
        raise UsageError(f"in {ADAPTIVE} they respond otherwise than predicted")
    if run.patients_digest not in (None, digest(cohort)):
        raise UsageError(f"{cohort.name} contains other patients than the run was trained on")
    device = torch.device("cpu")
    try:
        with fast_float32(device):
            envs: Any = make_envs(options, cohort, device, dtype=dtype)
            predicted = policy_designs(run.policy.design, envs)
        problem = envs.unwrapped.problem
        design = {name: predicted.pop(name) for name in Design._fields}
        slices = slices_of(problem, design)
        prediction = None
        if (calibration := run.policy.calibration) is not None:
            tried = try_designs(run.policy.design, EvaluationSet(envs, None))
            prediction = predict(calibration, tried.gain)
        best = cached_best_designs(
            cohort,
            problem.reward_model,
            problem.params.reward_config,
            cache_dir=run.path.resolve().parent / "oracle",
        )
    except Exception as error:  # the environment and its outcome model may be anybody's
        raise UsageError(f"{options.env_id} cannot evaluate them: {first_line(error)}") from error
    reward = predicted.pop("reward").numpy().astype(float)
    recorded = run.summary.get("train_deterministic_reward")
    is_other = recorded is not None and abs(reward.mean() - recorded) > SAME_REWARD
    if is_other and options.horizon == 1:
        raise UsageError(
            f"their designs earn {reward.mean():.2f} on average and earned {recorded:.2f} in the "
            "run: patients, outcome model or package are others now"
        )
    return Patients(
        cohort,
        problem.params.reward_config,
        **{name: value.numpy() for name, value in design.items()},
        reward=reward,
        predicted={name: value.numpy() for name, value in predicted.items()},
        best=None if best is None else best.score.numpy().astype(float),
        slices=slices,
        prediction=prediction,
    )


@torch.no_grad()
def slices_of(problem: Any, design: dict[str, Tensor], at_once: int = 1000) -> Slices:
    """Rewards along every part of each patient's design.

    Args:
        problem: cohort, outcome model and reward.
        design: of P patients.
        at_once: patients in one call of the outcome model.
    """
    patients, config = problem.params.patients, problem.params.reward_config
    chunks = []
    for start in range(0, len(patients), at_once):
        rows = slice(start, start + at_once)
        polymer_id, formulation, coverage = neighbours(
            *(design[name][rows] for name in Design._fields)
        )
        shape = polymer_id.shape
        outcomes = problem.reward_model(
            patients[rows].unsqueeze(1).expand(*shape, -1).flatten(0, 1),
            polymer_id.flatten(),
            formulation.flatten(0, 1).to(patients.dtype),
            coverage.flatten(),
        )
        is_unsafe = torch.stack(list(breaches(outcomes, config).values())).any(0)
        reward = compute_reward(outcomes, config=config)
        chunks.append([x.view(shape).numpy() for x in (reward.double(), is_unsafe)])
    return Slices(*map(np.concatenate, zip(*chunks, strict=True)))


def neighbours(
    polymer_id: Tensor, formulation: Tensor, coverage: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Designs that differ from given ones in one part, in the order of `Slices`.

    Args:
        polymer_id: (P,).
        formulation: (P, 4).
        coverage: (P,).

    Returns:
        (P, N), (P, N, 4) and (P, N).
    """
    num_along = SLICE_POINTS * len(FORMULATION_FIELDS)
    num_designs = num_along + NUM_POLYMERS + len(COVERAGES)
    polymers = polymer_id.unsqueeze(1).repeat(1, num_designs)
    formulations = formulation.unsqueeze(1).repeat(1, num_designs, 1)
    coverages = coverage.unsqueeze(1).repeat(1, num_designs)
    for column, item in enumerate(FORMULATION_FIELDS):
        along = slice(column * SLICE_POINTS, (column + 1) * SLICE_POINTS)
        formulations[:, along, column] = torch.linspace(
            item.low, item.high, SLICE_POINTS, dtype=formulation.dtype
        )
    polymers[:, num_along : num_along + NUM_POLYMERS] = torch.arange(NUM_POLYMERS)
    coverages[:, num_along + NUM_POLYMERS :] = torch.arange(len(COVERAGES))
    return polymers, formulations, coverages
