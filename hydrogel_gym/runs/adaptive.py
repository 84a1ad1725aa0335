"""How far a policy falls short of the clairvoyant after each check of a design.

The clairvoyant knows how the patient responds; what does not learn tries the design that is
predicted to be best. Shapes: P patients, H checks, R fields of a response.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import gymnasium as gym
import torch
from torch import Tensor

from hydrogel_gym.oracle.search import search
from hydrogel_gym.problem.fields import PATIENT_FIELDS, Design, Outcomes
from hydrogel_gym.problem.reward import compute_reward
from hydrogel_gym.runs.environments import at_step
from hydrogel_gym.runs.evaluation import SEED, DesignPolicy

AT_ONCE = 32
MEASURED = (*Outcomes._fields, "score")


class Episodes(NamedTuple):
    """One episode of each of P patients, with what only those know who see the response."""

    response: Tensor  # (P, R)
    obs: Tensor  # (H, P, F), before each check
    designs: Design  # (H, P) and (H, P, D)
    measured: dict[str, Tensor]  # (H, P) each, outcomes and score
    score: Tensor  # (H, P), true
    best: Design  # the clairvoyant's
    best_outcomes: Outcomes  # (P,) each, true ones of `best`
    best_score: Tensor  # (P,)
    predicted_score: Tensor  # (P,), true, of the best predicted design

    @property
    def regret(self) -> Tensor:
        """(H, P) of the best design so far, by the true scores."""
        return self.best_score - self.score.cummax(0).values

    @property
    def no_learning_regret(self) -> Tensor:
        """(P,) of the best predicted design."""
        return self.best_score - self.predicted_score


@torch.no_grad()
def play(policy: DesignPolicy, envs: gym.vector.VectorEnv, horizon: int) -> Episodes:
    """An episode of the deterministic policy for each patient, and its yardsticks.

    Args:
        policy: what designs.
        envs: one adaptive environment per patient, with `reveal_response`.
        horizon: H.
    """
    obs, info = envs.reset(seed=SEED)
    patients, response = obs[:, : len(PATIENT_FIELDS)], info["response"]
    problem: Any = envs.unwrapped.problem  # type: ignore[attr-defined]
    config = problem.params.reward_config
    steps = []
    for _ in range(horizon):
        before = obs
        action, _ = policy(obs, None)
        obs, _, _, _, info = envs.step(action)
        measured = [at_step(info, name) for name in MEASURED]
        steps.append((before, *(action[name] for name in Design._fields), *measured))
    observed, polymer_id, formulation, coverage, *measured = map(
        torch.stack, zip(*steps, strict=True)
    )
    designs = Design(polymer_id, formulation, coverage)
    # What a step reports was measured; its reward may be an improvement, or less a cost.
    scores = []
    for check, design in enumerate(map(Design._make, zip(*designs, strict=True))):
        is_novel = (polymer_id[:check] != design.polymer_id).all(0)
        outcomes = problem.reward_model(patients, *design, response)
        scores.append(compute_reward(outcomes, is_novel, config))
    best = _best_designs(problem, torch.cat([patients, response], -1))
    predicted = _best_designs(problem, patients)
    best_outcomes = problem.reward_model(patients, *best, response)
    return Episodes(
        response=response,
        obs=observed,
        designs=designs,
        measured=dict(zip(MEASURED, measured, strict=True)),
        score=torch.stack(scores),
        best=best,
        best_outcomes=best_outcomes,
        best_score=compute_reward(best_outcomes, config=config),
        predicted_score=compute_reward(
            problem.reward_model(patients, *predicted, response), config=config
        ),
    )


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
    episodes = play(policy, envs, horizon)
    return {
        "regret_after_checks": _over_patients(episodes.regret),
        "no_learning_regret": _over_patients(episodes.no_learning_regret),
        "regret_patients": len(episodes.best_score),
    }


def _best_designs(problem: Any, patients: Tensor) -> Design:
    """The best designs for (P, C) patients, or for (P, C + R) ones whose response is known."""
    num_fields = len(PATIENT_FIELDS)

    def model(patient: Tensor, *design: Tensor) -> Outcomes:
        response = (patient[..., num_fields:],) if patient.shape[-1] > num_fields else ()
        outcomes: Outcomes = problem.reward_model(patient[..., :num_fields], *design, *response)
        return outcomes

    model.broadcasts = problem.reward_model.broadcasts  # type: ignore[attr-defined]
    config = problem.params.reward_config
    threads = torch.get_num_threads() if patients.device.type == "cpu" else 1
    # As the oracle: single-threaded threads need not wait for each other within every operation.
    with ThreadPoolExecutor(threads, "search", torch.set_num_threads, (1,)) as pool:
        chunks = patients.float().split(AT_ONCE)
        heads = zip(*pool.map(lambda some: search(some, model, config, SEED), chunks), strict=True)
    return Design(*(torch.cat(head) for head in heads))


def _over_patients(regret: Tensor) -> dict[str, Any]:
    """Figures of (..., P) regrets."""
    return {
        "mean": regret.mean(-1).tolist(),
        "median": regret.median(-1).values.tolist(),
        "p95": regret.quantile(0.95, -1).tolist(),
    }
