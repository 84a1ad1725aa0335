"""The table of `docs/adaptive.md`: what a hidden response costs who does not learn.

    python docs/response_sd.py [--patients 200]

For each `response_sd` the first held-out patients get one response each. The clairvoyant is the
oracle's search under that response; the design that is predicted to be best, without a response, is
tried once. A regret is the difference of their true scores.
"""

from __future__ import annotations

import argparse
import functools

import torch
from torch import Tensor

from hydrogel_gym import Outcomes, RewardConfig, compute_reward, load_cohort
from hydrogel_gym.models.mechanistic import MechanisticModel
from hydrogel_gym.oracle.search import search
from hydrogel_gym.problem.fields import PATIENT_FIELDS, Design
from hydrogel_gym.problem.response import draw_response, response_levels

AT_ONCE = 32
MODEL = MechanisticModel()


def responding(patient: Tensor, *design: Tensor) -> Outcomes:
    """The built-in model for patients whose response follows their features."""
    num = len(PATIENT_FIELDS)
    return MODEL(patient[..., :num], *design, patient[..., num:])


@functools.cache
def _predicted(start: int, end: int) -> Design:
    patients = load_cohort("holdout").features[start:end].float()
    return search(patients, MODEL, RewardConfig(), 0)


@torch.no_grad()
def regrets(sd: float, num_patients: int) -> Tensor:
    """(num_patients,) regret of the best predicted design, tried once."""
    cohort = load_cohort("holdout")
    keys = torch.arange(num_patients)
    response = draw_response(keys, torch.zeros_like(keys), response_levels(sd).float())
    patients = torch.cat([cohort.features[:num_patients].float(), response], -1)
    found = []
    for start in range(0, num_patients, AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        best = search(patients[rows], responding, RewardConfig(), 0)
        predicted = _predicted(start, start + AT_ONCE)
        scores = [
            compute_reward(responding(patients[rows], *(head[: len(best[0])] for head in design)))
            for design in (best, predicted)
        ]
        found.append(scores[0] - scores[1])
    return torch.cat(found)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, default=200)
    num_patients = parser.parse_args().patients
    print("| `response_sd` | mean regret | median | 90th percentile | share above 1 point |")
    print("|---|---|---|---|---|")
    for sd in (0.1, 0.2, 0.3, 0.4, 0.6, 0.8):
        found = regrets(sd, num_patients)
        high = [found.quantile(q).item() for q in (0.5, 0.9)]
        share = (found > 1.0).float().mean().item()
        print(
            f"| {sd} | {found.mean():.2f} | {high[0]:.2f} | {high[1]:.2f} | {share:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
