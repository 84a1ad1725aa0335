"""How far a policy falls short of the clairvoyant after each check of a design.

The clairvoyant knows how the patient responds; what does not learn tries the design that is
predicted to be best. Shapes: P patients, H checks, R fields of a response.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from hydrogel_gym.oracle.search import search
from hydrogel_gym.problem.fields import PATIENT_FIELDS, Design, Outcomes
from hydrogel_gym.problem.reward import compute_reward
from hydrogel_gym.runs.evaluation import SEED, DesignPolicy

AT_ONCE = 32


@torch.no_grad()
def figures_after_checks(
    policy: DesignPolicy, envs: gym.vector.VectorEnv, horizon: int
) -> dict[str, Any]:
    """Regrets of the deterministic policy, and of the best predicted design, by the true scores.

    Args:
        policy: what designs.
        envs: one adaptive environment per patient, with `reveal_response`.
        horizon: H.

    Returns:
        `regret_after_checks`, of the best design of the first 1 to H checks, and
        `no_learning_regret`, of one design: each a dict of `mean`, `median` and `p95` over the
        patients; and `regret_patients`, how many there are.
    """
    obs, info = envs.reset(seed=SEED)
    patients, response = obs[:, : len(PATIENT_FIELDS)], info["response"]
    scores: list[Tensor] = []
    tried: list[Tensor] = []  # polymers
    problem: Any = envs.unwrapped.problem  # type: ignore[attr-defined]

    def true_score(design: Design, is_novel: Tensor | bool = True) -> Tensor:
        outcomes = problem.reward_model(patients, *design, response)
        return compute_reward(outcomes, is_novel, problem.params.reward_config)

    for _ in range(horizon):
        action, _ = policy(obs, None)
        # What a step reports was measured; its reward may be an improvement, or less a cost.
        design = Design(*(action[name] for name in Design._fields))
        known = [polymer_id == design.polymer_id for polymer_id in tried]
        scores.append(true_score(design, ~torch.stack(known).any(0) if known else True))
        tried.append(design.polymer_id)
        obs = envs.step(action)[0]
    best = true_score(_best_designs(problem, torch.cat([patients, response], -1)))
    predicted = true_score(_best_designs(problem, patients))
    reached = torch.stack(scores).cummax(0).values
    return {
        "regret_after_checks": _over_patients(best - reached),
        "no_learning_regret": _over_patients(best - predicted),
        "regret_patients": len(best),
    }


def _best_designs(problem: Any, patients: Tensor) -> Design:
    """The best designs for (P, C) patients, or for (P, C + R) ones whose response is known."""
    num_fields = len(PATIENT_FIELDS)

    def model(patient: Tensor, *design: Tensor) -> Outcomes:
        response = (patient[..., num_fields:],) if patient.shape[-1] > num_fields else ()
        outcomes: Outcomes = problem.reward_model(patient[..., :num_fields], *design, *response)
        return outcomes

    config = problem.params.reward_config
    found = [search(some, model, config, SEED) for some in patients.float().split(AT_ONCE)]
    heads = zip(*found, strict=True)
    return Design(*(torch.cat(head) for head in heads))


def _over_patients(regret: Tensor) -> dict[str, Any]:
    """Figures of (..., P) regrets."""
    return {
        "mean": regret.mean(-1).tolist(),
        "median": regret.median(-1).values.tolist(),
        "p95": regret.quantile(0.95, -1).tolist(),
    }
