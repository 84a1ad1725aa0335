"""Designs carried over from a training cohort to a new patient, for one reward call.

All start from the oracle's design for every patient of the training cohort. Shapes: P patients, N
designs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from baselines.objective import HIGH, LOW
from hydrogel_gym import RewardModel, compute_reward
from hydrogel_gym.problem.fields import COVERAGES, Design

DESIGNS_AT_ONCE = 32
REFINING_ROUNDS = 20
NUM_REFINED = 32


def design_rows(design: Design, index: Tensor) -> Design:
    """The designs at `index`."""
    return Design(*(part[index] for part in design))


@torch.no_grad()
def cohort_mean_reward(patients: Tensor, design: Design, model: RewardModel) -> Tensor:
    """Mean over the patients of the reward of each design.

    Args:
        patients: (P, 11) features.
        design: N designs.
        model: the Stage-1 model, which is called P N times.

    Returns:
        (N,) float64.
    """
    patients = patients.to(torch.float32)
    means = []
    for index in torch.arange(len(design.polymer_id)).split(DESIGNS_AT_ONCE):
        part = design_rows(design, index)
        outcomes = model(
            patients,
            part.polymer_id[:, None],
            part.formulation[:, None],
            part.coverage[:, None],
        )
        means.append(compute_reward(outcomes).double().mean(-1))
    return torch.cat(means)


class OneSizeFitsAll(NamedTuple):
    """One design for everybody, and what it was chosen from."""

    design: Design  # of one row
    mean_reward: float  # on the training cohort
    candidates: Design  # every design that was looked at, N
    candidate_rewards: Tensor  # (N,) their mean rewards on the training cohort


def one_size_fits_all(
    patients: Tensor, candidates: Design, model: RewardModel, seed: int
) -> OneSizeFitsAll:
    """Design with the best mean reward on a cohort: the best candidate, then refined.

    Refining draws formulations about the best one so far, from ever closer; its polymer and
    coverage stay.

    Args:
        patients: (P, 11) features of the training cohort.
        candidates: N designs to begin with: the oracle's for these patients.
        model: the Stage-1 model.
        seed: of the refinement.
    """
    generator = torch.Generator().manual_seed(seed)
    looked_at, rewards = [candidates], [cohort_mean_reward(patients, candidates, model)]
    top = int(rewards[0].argmax())
    best, best_reward = design_rows(candidates, torch.tensor([top])), float(rewards[0][top])
    for k in range(REFINING_ROUNDS):
        step = 0.2 * 0.8**k * torch.randn(NUM_REFINED, len(LOW), generator=generator)
        formulation = (best.formulation + step * (HIGH - LOW)).clamp(LOW, HIGH)
        near = Design(
            best.polymer_id.expand(NUM_REFINED), formulation, best.coverage.expand(NUM_REFINED)
        )
        mean = cohort_mean_reward(patients, near, model)
        looked_at.append(near)
        rewards.append(mean)
        top = int(mean.argmax())
        if mean[top] > best_reward:
            best, best_reward = design_rows(near, torch.tensor([top])), float(mean[top])
    return OneSizeFitsAll(
        best,
        best_reward,
        Design(*(torch.cat(parts) for parts in zip(*looked_at, strict=True))),
        torch.cat(rewards),
    )


def nearest_patient(patients: Tensor, designs: Design, new_patients: Tensor) -> Design:
    """Design of the closest training patient, in standardised features.

    Args:
        patients: (P, 11) features of the training cohort.
        designs: the oracle's P designs for it.
        new_patients: (M, 11) features.

    Returns:
        M designs.
    """
    from sklearn.neighbors import NearestNeighbors
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(patients.numpy())
    neighbours = NearestNeighbors(n_neighbors=1).fit(scaler.transform(patients.numpy()))
    nearest = neighbours.kneighbors(scaler.transform(new_patients.numpy()), return_distance=False)
    return design_rows(designs, torch.from_numpy(nearest[:, 0]))


class DesignRegression:
    """Supervised learning of the oracle's design from the patient's features.

    A classifier names the pair of polymer and coverage; a regressor gives the formulation for the
    patient and that pair.

    Args:
        family: key of `FAMILIES`.
        seed: of the learners.
    """

    def __init__(self, family: str, seed: int = 0) -> None:
        from sklearn.preprocessing import StandardScaler

        self.family = family
        self._scaler = StandardScaler()
        self._classifier, self._regressor = FAMILIES[family](seed)

    def fit(self, patients: Tensor, designs: Design) -> DesignRegression:
        """Learn from (P, 11) features and P designs; returns itself."""
        features = self._scaler.fit_transform(patients.numpy())
        pair = (designs.polymer_id * len(COVERAGES) + designs.coverage).numpy()
        share = ((designs.formulation - LOW) / (HIGH - LOW)).numpy()
        with warnings.catch_warnings():
            # A network that ends after its epochs, and a pair that only one patient has.
            warnings.filterwarnings("ignore", module="sklearn")
            self._classifier.fit(features, pair)
            self._regressor.fit(self._conditioned(features, pair), share)
        return self

    def predict(self, patients: Tensor) -> Design:
        """Designs of (M, 11) features."""
        features = self._scaler.transform(patients.numpy())
        pair = self._classifier.predict(features)
        share = self._regressor.predict(self._conditioned(features, pair))
        share = torch.from_numpy(share).float().clamp(0.0, 1.0)
        pair = torch.from_numpy(pair)
        return Design(pair // len(COVERAGES), torch.lerp(LOW, HIGH, share), pair % len(COVERAGES))

    def _conditioned(self, features: np.ndarray, pair: np.ndarray) -> np.ndarray:
        """Features with the pair one-hot."""
        return np.hstack([features, pair[:, None] == self._classifier.classes_])


def _forests(seed: int) -> tuple[Any, Any]:
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

    return (
        RandomForestClassifier(300, random_state=seed),
        RandomForestRegressor(300, random_state=seed),
    )


def _boosted_trees(seed: int) -> tuple[Any, Any]:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.multioutput import MultiOutputRegressor

    return (
        HistGradientBoostingClassifier(max_iter=50, random_state=seed),
        MultiOutputRegressor(HistGradientBoostingRegressor(random_state=seed)),
    )


def _networks(seed: int) -> tuple[Any, Any]:
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    # n_iter_no_change: a fixed number of epochs.
    settings = dict(
        hidden_layer_sizes=(128, 128), max_iter=200, n_iter_no_change=200, random_state=seed
    )
    return MLPClassifier(**settings), MLPRegressor(**settings)


FAMILIES: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "random forests": _forests,
    "boosted trees": _boosted_trees,
    "neural networks": _networks,
}


def cross_validated_rewards(
    patients: Tensor, designs: Design, model: RewardModel, seed: int, num_folds: int = 3
) -> dict[str, float]:
    """Mean reward of each family's designs for training patients it has not seen.

    The reward, not the error of the parts, decides: a formulation a little off may break a limit.

    Args:
        patients: (P, 11) features of the training cohort.
        designs: the oracle's P designs for it.
        model: the Stage-1 model.
        seed: of folds and learners.
        num_folds: parts of the cohort, each left out once.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(patients)))
    folds = order.tensor_split(num_folds)
    rewards: dict[str, float] = {}
    for family in FAMILIES:
        total = 0.0
        for k, left_out in enumerate(folds):
            seen = torch.cat([*folds[:k], *folds[k + 1 :]])
            learner = DesignRegression(family, seed).fit(patients[seen], design_rows(designs, seen))
            proposed = learner.predict(patients[left_out])
            with torch.no_grad():
                outcomes = model(patients[left_out].to(torch.float32), *proposed)
            total += float(compute_reward(outcomes).double().sum())
        rewards[family] = total / len(patients)
    return rewards
