"""Designs carried over from a training cohort to a new patient, for one reward call.

All start from the oracle's P designs for the patients of the training cohort, whose features are
(P, 11); those of the new patients are (M, 11).
"""

from __future__ import annotations

import numpy as np
import torch
from quality.baselines.objective import HIGH, LOW, design_at, design_rows
from torch import Tensor

from hydrogel_gym import RewardModel, compute_reward
from hydrogel_gym.problem.fields import COVERAGES, Design

DESIGNS_AT_ONCE = 32
REFINING_ROUNDS = 20
NUM_REFINED = 32


@torch.no_grad()
def cohort_mean_reward(patients: Tensor, design: Design, model: RewardModel) -> Tensor:
    """(N,) float64 mean over (P, 11) patients of each design's reward, by P N calls."""
    patients = patients.to(torch.float32)
    means = []
    for index in torch.arange(len(design.polymer_id)).split(DESIGNS_AT_ONCE):
        part = design_rows(design, index)
        outcomes = model(patients, *(value[:, None] for value in part))
        means.append(compute_reward(outcomes).double().mean(-1))
    return torch.cat(means)


def one_size_fits_all(
    patients: Tensor, candidates: Design, model: RewardModel, seed: int
) -> tuple[Design, float]:
    """Design with the best mean reward on a cohort, and that reward: the best candidate, refined.

    Refining draws formulations about the best one so far, from ever closer; its polymer and
    coverage stay.
    """
    generator = torch.Generator().manual_seed(seed)
    best, best_reward, near = None, -torch.inf, candidates
    for k in range(REFINING_ROUNDS + 1):
        mean = cohort_mean_reward(patients, near, model)
        top = int(mean.argmax())
        if mean[top] > best_reward:
            best, best_reward = design_rows(near, torch.tensor([top])), float(mean[top])
        step = 0.2 * 0.8**k * torch.randn(NUM_REFINED, len(LOW), generator=generator)
        formulation = (best.formulation + step * (HIGH - LOW)).clamp(LOW, HIGH)
        near = Design(
            best.polymer_id.expand(NUM_REFINED), formulation, best.coverage.expand(NUM_REFINED)
        )
    return best, best_reward


def nearest_patient(patients: Tensor, designs: Design, new_patients: Tensor) -> Design:
    """M designs: that of the closest training patient, in standardised features."""
    mean, std = patients.mean(0), patients.std(0)
    distance = torch.cdist((new_patients - mean) / std, (patients - mean) / std)
    return design_rows(designs, distance.argmin(-1))


def regression(patients: Tensor, designs: Design, new_patients: Tensor, seed: int) -> Design:
    """M designs that random forests learnt from the oracle's: supervised learning.

    One forest names the pair of polymer and coverage; the other gives the formulation for the
    patient and that pair. Of forests, boosted trees and networks none was clearly ahead.
    """
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

    classifier = RandomForestClassifier(300, random_state=seed)
    regressor = RandomForestRegressor(300, random_state=seed)

    def conditioned(features: np.ndarray, pair: np.ndarray) -> np.ndarray:
        return np.hstack([features, pair[:, None] == classifier.classes_])

    features, new_features = patients.numpy(), new_patients.numpy()
    pair = (designs.polymer_id * len(COVERAGES) + designs.coverage).numpy()
    classifier.fit(features, pair)
    regressor.fit(conditioned(features, pair), ((designs.formulation - LOW) / (HIGH - LOW)).numpy())
    pair = classifier.predict(new_features)
    share = torch.from_numpy(regressor.predict(conditioned(new_features, pair))).clamp(0.0, 1.0)
    pair = torch.from_numpy(pair)
    return design_at(share, pair // len(COVERAGES), pair % len(COVERAGES))
