"""How far from the best a policy's design may be, patient by patient, without a search.

Neither a policy's value nor its spread tells where it errs. What tells is how easily its design is
beaten. `try_designs` evaluates a hundred designs per patient; what the best of them gains is a
lower bound on the regret. What the regret is beyond that is learnt from patients whose best designs
are known: its mean, and a quantile, in each tenth of them by what was gained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hydrogel_gym.problem.fields import FORMULATION_HIGH, FORMULATION_LOW, Design
from hydrogel_gym.problem.polymers import NUM_POLYMERS
from hydrogel_gym.problem.reward import compute_reward
from hydrogel_gym.runs.evaluation import DesignPolicy, EvaluationSet, designs_of

# Chosen by table: `benchmark/quality/uncertainty.py`.
NUM_SAMPLES, NUM_STARTS, NUM_FRAMES = 8, 3, 3
FIRST_STEP = 0.08  # length, where each parameter's range is 1
LONGER, SHORTER = 1.5, 0.85  # times which a step is the next, where it gained and where not

MAX_BINS, PATIENTS_PER_BIN = 10, 20
BOUND = 0.9  # share of the patients whose regret is to be below their bound
FLAGGED = 0.2  # share of the patients of whom it is said how much of all regret they have
# Mean; and beside the true one: Spearman's correlation, share of patients below their bound, share
# of all regret that is of the flagged.
PREDICTED = (
    "predicted_regret",
    *("regret_rank_correlation", "regret_bound_coverage", "regret_of_flagged"),
)


class Tried(NamedTuple):
    """What trying designs for each of P patients showed; arrays on the host."""

    reward: np.ndarray  # (P,) of the deterministic design as a first step
    gain: np.ndarray  # (P,) >= 0, by which the best of those tried is better
    regret: np.ndarray | None  # (P,) >= 0, by which the best possible is, if known


class Calibration(NamedTuple):
    """What there is to gain beyond what was gained, of each bin of the patients."""

    gain: list[float]  # mean of each bin, ascending
    rest: list[float]  # mean of what the regret is more than that
    rest_bound: list[float]  # what a share of `BOUND` of the patients stays below


class RegretPrediction(NamedTuple):
    """Regret as it is predicted for each of P patients."""

    expected: np.ndarray
    bound: np.ndarray  # a share of `BOUND` of all patients has less


@torch.no_grad()
def try_designs(
    policy: DesignPolicy,
    evaluated: EvaluationSet,
    *,
    num_samples: int = NUM_SAMPLES,
    num_starts: int = NUM_STARTS,
    num_frames: int = NUM_FRAMES,
) -> Tried:
    """Evaluate the deterministic design of each patient, and others that are easily found.

    These are samples of the policy; the deterministic design with every other polymer, since a
    policy may have unlearnt one; and small steps from the best design of each leading polymer.
    Random numbers are the same in each call; a patient's samples differ between cohorts.

    Args:
        policy: what designs.
        evaluated: the patients, in environments that have a `problem`.
        num_samples: of the policy, for each patient.
        num_starts: polymers whose best design steps are taken from.
        num_frames: random frames along whose axes, to both sides, steps are tried.
    """
    envs, best_score = evaluated
    problem: Any = envs.unwrapped.problem  # type: ignore[attr-defined]
    patients, config = problem.params.patients, problem.params.reward_config
    rows = torch.arange(len(patients), device=patients.device)

    def rewards(*designs: Tensor) -> Tensor:
        """(N, P) of designs (N, P); as many at a time as the environments evaluate."""
        outcomes = (problem.reward_model(patients, *each) for each in zip(*designs, strict=True))
        return torch.stack([compute_reward(each, config=config) for each in outcomes])

    generator = torch.Generator(patients.device).manual_seed(0)
    obs, _ = envs.reset()
    sources = [None, *[generator] * num_samples]
    drawn = [designs_of(policy, envs, obs, source)[0] for source in sources]
    own, _ = policy(obs, None)
    drawn += [own | {"polymer_id": torch.full_like(rows, i)} for i in range(NUM_POLYMERS)]
    designs = Design(*(torch.stack([each[name] for each in drawn]) for name in Design._fields))
    reward = rewards(*designs)
    of_polymer = reward.new_full((NUM_POLYMERS, len(rows)), -torch.inf)
    of_polymer = of_polymer.scatter_reduce(0, designs.polymer_id, reward, "amax")
    leading = of_polymer.topk(num_starts, dim=0).indices
    first = torch.where(designs.polymer_id == leading.unsqueeze(1), reward, -torch.inf).argmax(1)
    best = reward[first, rows]
    best = _climbed(rewards, Design(*(part[first, rows] for part in designs)), best, num_frames)
    highest = torch.maximum(best, reward[:1]).amax(0)
    earned, beaten = (x.double().cpu().numpy() for x in (reward[0], highest))
    if best_score is None:
        return Tried(earned, beaten - earned, None)
    regret = (best_score.double().cpu().numpy() - earned).clip(min=0.0)
    return Tried(earned, beaten - earned, regret)


def _climbed(
    rewards: Callable[..., Tensor], design: Design, reward: Tensor, num_frames: int
) -> Tensor:
    """(S, P) rewards that small steps of (S, P) designs reach along the axes of random frames."""
    polymer_id, formulation, coverage = design
    low, high = (torch.from_numpy(x).to(formulation) for x in (FORMULATION_LOW, FORMULATION_HIGH))
    share, size = (formulation - low) / (high - low), torch.full_like(reward, FIRST_STEP)
    shape, noise = (num_frames, len(low), len(low)), torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(shape, generator=noise)).Q.to(share)
    for direction in torch.stack([axes, -axes], 2).flatten(0, 2):
        trial = (share + size.unsqueeze(-1) * direction).clamp(0.0, 1.0)
        found = rewards(polymer_id, torch.lerp(low, high, trial), coverage)
        gained = found > reward
        share = torch.where(gained.unsqueeze(-1), trial, share)
        reward = torch.where(gained, found, reward)
        size = size * torch.where(gained, LONGER, SHORTER)
    return reward


def calibrate(gain: np.ndarray, regret: np.ndarray) -> Calibration:
    """What to add to the gain of other patients, from (P,) gains and true regrets."""
    num_bins = min(MAX_BINS, max(1, len(gain) // PATIENTS_PER_BIN))
    bins = np.array_split(np.argsort(gain, kind="stable"), num_bins)
    rest = np.maximum(regret - gain, 0.0)  # the oracle's precision is finite
    return Calibration(
        [float(gain[rows].mean()) for rows in bins],
        [float(rest[rows].mean()) for rows in bins],
        [float(np.quantile(rest[rows], BOUND, method="higher")) for rows in bins],
    )


def calibrate_policy(
    policy: DesignPolicy, sets: dict[str, EvaluationSet]
) -> tuple[dict[str, Any] | None, dict[str, float]]:
    """A `Calibration` of the training patients as a dict, if it can be had; figures of all sets."""
    envs, best_score = sets["train"]
    if best_score is None or not hasattr(envs.unwrapped, "problem"):
        return None, {}
    tried = {name: try_designs(policy, each) for name, each in sets.items()}
    known = tried["train"]
    assert known.regret is not None
    calibration = calibrate(known.gain, known.regret)
    figures = {name: regret_figures(calibration, each) for name, each in tried.items()}
    named = {f"{name}_{key}": x for name, each in figures.items() for key, x in each.items()}
    return calibration._asdict(), named


def predict(calibration: Calibration, gain: np.ndarray) -> RegretPrediction:
    """Regret of patients by the (P,) gain of `try_designs`; between bins it is interpolated."""
    return RegretPrediction(*(gain + np.interp(gain, calibration.gain, y) for y in calibration[1:]))


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, equal values sharing a rank; 0 where one of them does not vary."""
    found = [np.unique(x, return_inverse=True, return_counts=True)[1:] for x in (one, other)]
    one, other = ((counts.cumsum() - counts / 2)[inverse] for inverse, counts in found)
    varies = np.ptp(one) > 0.0 and np.ptp(other) > 0.0
    return float(np.corrcoef(one, other)[0, 1]) if varies else 0.0


def share_of_regret(expected: np.ndarray, regret: np.ndarray, flagged: float = FLAGGED) -> float:
    """Share of all regret that is of the patients for whom most is predicted."""
    first = np.argsort(-expected, kind="stable")[: round(flagged * len(expected))]
    return float(regret[first].sum() / max(regret.sum(), 1e-12))


def regret_figures(calibration: Calibration, tried: Tried) -> dict[str, float]:
    """The mean predicted regret and, where the true one is known, how the two compare."""
    expected, bound = predict(calibration, tried.gain)
    found = [float(expected.mean())]
    if (regret := tried.regret) is not None:
        found += [rank_correlation(expected, regret), float((regret <= bound).mean())]
        found.append(share_of_regret(expected, regret))
    return dict(zip(PREDICTED, found, strict=False))
