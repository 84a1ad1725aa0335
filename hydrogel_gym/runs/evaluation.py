"""How good a policy is: figures over whole episodes, and their distance to the best possible.

A policy is a function that designs: given observations (B, obs_dim) and a generator, or None for
its deterministic design, it returns the action that the environment takes and its entropy (B,).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import torch
from torch import Tensor

from hydrogel_gym.errors import UsageError
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.problem.cohort import Cohort
from hydrogel_gym.problem.fields import Outcomes
from hydrogel_gym.problem.polymers import load_polymers
from hydrogel_gym.problem.reward import SAFETY_LIMITS, RewardTerms
from hydrogel_gym.runs.environments import at_step, make_envs
from hydrogel_gym.runs.metrics import COHORTS, YARDSTICK
from hydrogel_gym.runs.options import ADAPTIVE, ProblemOptions
from hydrogel_gym.runs.safeguard import on_safe_side

DesignPolicy = Callable[[Tensor, torch.Generator | None], tuple[dict[str, Tensor], Tensor]]
EPISODES = 10  # per patient, of the sampled figures of a summary
SEED = 0  # of what an environment draws: the same at every evaluation
# Patients of a cohort on whom an adaptive policy is evaluated, by eight designs each: all take as
# long as the training, and the clairvoyant 0.05 s for each.
NUM_ADAPTIVE = 200


class EvaluationSet(NamedTuple):
    """Patients on whom a policy is evaluated, and the best that can be done for them."""

    envs: gym.vector.VectorEnv  # one per patient
    best_score: Tensor | None  # (P,)


def evaluation_sets(
    problem: ProblemOptions,
    cohorts: dict[str, Cohort],
    device: torch.device,
    *,
    cache_dir: Path | None,
    compile: bool = False,
    dtype: Literal["float32", "float64"] = "float32",
) -> dict[str, EvaluationSet]:
    """A set for each cohort, by its name; of an adaptive problem, of its first 200 patients.

    Args:
        problem: what is designed.
        cohorts: the patients.
        device: where.
        cache_dir: keeps what the oracle found; None does without an oracle.
        compile: the step of an adaptive problem; that of another is over before it would gain.
        dtype: of the environments' numbers.

    Raises:
        UsageError: the oracle cannot search.
    """
    if problem.env_id == ADAPTIVE:
        cache_dir = None  # who responds otherwise is not best served by what is predicted
        cohorts = {name: cohort.first(NUM_ADAPTIVE) for name, cohort in cohorts.items()}
    compile = compile and problem.env_id == ADAPTIVE
    sets = {}
    for name, cohort in cohorts.items():
        envs = make_envs(problem, cohort, device, compile=compile, dtype=dtype)
        sets[name] = EvaluationSet(envs, best_scores(envs, cache_dir) if cache_dir else None)
    return sets


def best_scores(envs: gym.vector.VectorEnv, cache_dir: Path) -> Tensor:
    """(P,) largest reward that one design can earn for each patient.

    Raises:
        UsageError: the search cannot be carried out.
    """
    unwrapped: Any = envs.unwrapped
    problem = unwrapped.problem
    try:
        best = best_designs(
            problem.cohort,
            problem.reward_model,
            problem.params.reward_config,
            device=problem.device,
            cache_dir=cache_dir,
            progress=True,
        )
    except ValueError as error:
        raise UsageError(f"the oracle cannot search: {error}") from error
    return best.score.to(problem.device)


def designs_of(
    policy: DesignPolicy,
    envs: gym.vector.VectorEnv,
    obs: Tensor,
    generator: torch.Generator | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """What a policy designs, and its entropy; deterministic designs on the safe side of limits.

    Args:
        policy: what designs.
        envs: one environment per patient.
        obs: of each.
        generator: source of samples; None for deterministic designs.
    """
    design, entropy = policy(obs, generator)
    problem = getattr(envs.unwrapped, "problem", None)
    # A response that is hidden makes other designs unsafe than those that seem so.
    if generator is None and problem is not None and problem.params.adaptive is None:
        design = on_safe_side(design, problem)
    return design, entropy


@torch.no_grad()
def evaluate(
    policy: DesignPolicy,
    envs: gym.vector.VectorEnv,
    *,
    horizon: int = 1,
    best_score: Tensor | None = None,
    generator: torch.Generator | None = None,
    num_episodes: int = 1,
) -> dict[str, Any]:
    """Figures of a policy over whole episodes of every environment, one patient each.

    Args:
        policy: what designs.
        envs: one environment per patient.
        horizon: steps per episode.
        best_score: (P,) largest reward for each patient.
        generator: source of samples; None evaluates the deterministic policy.
        num_episodes: per environment.

    Returns:
        `mean_reward`, `max_reward` and `optimal_rate` over all steps, `limit_breach_rate` (the
        share of designs that break a safety limit), `entropy`, `polymer_share` (a list); and,
        unless `best_score` is None, `regret` and `regret_p95` (mean and 95th percentile over the
        patients of how far the mean reward of a step falls short of the best) and
        `fraction_of_oracle` (mean reward over mean best), else None for each.
    """
    obs, _ = envs.reset(seed=SEED)
    rewards, optimal, breached, entropies, polymers = [], [], [], [], []
    for _ in range(num_episodes * horizon):
        design, entropy = designs_of(policy, envs, obs, generator)
        obs, reward, _, _, info = envs.step(design)
        penalty = sum(at_step(info, f"reward_{name}") for name in SAFETY_LIMITS)
        rewards.append(reward)
        optimal.append(at_step(info, "is_optimal"))
        breached.append(torch.as_tensor(penalty < 0))
        entropies.append(entropy)
        polymers.append(design["polymer_id"])
    reward = torch.stack(rewards)
    space: Any = envs.single_action_space
    num_polymers = int(space["polymer_id"].n)
    share = torch.bincount(torch.stack(polymers).flatten(), minlength=num_polymers) / reward.numel()
    yardstick: dict[str, float | None] = dict.fromkeys(YARDSTICK)
    if best_score is not None:
        regret = best_score - reward.mean(0)
        fraction = reward.mean() / best_score.mean()
        figures = (regret.mean(), regret.quantile(0.95), fraction)
        yardstick = {k: figure.item() for k, figure in zip(YARDSTICK, figures, strict=True)}
    return {
        "mean_reward": reward.mean().item(),
        "max_reward": reward.max().item(),
        "optimal_rate": torch.stack(optimal).float().mean().item(),
        "limit_breach_rate": torch.stack(breached).float().mean().item(),
        **yardstick,
        "entropy": torch.stack(entropies).mean().item(),
        "polymer_share": share.tolist(),
    }


@torch.no_grad()
def policy_designs(policy: DesignPolicy, envs: gym.vector.VectorEnv) -> dict[str, Tensor]:
    """What the deterministic policy designs first for every patient, and what is predicted of it.

    Args:
        policy: what designs.
        envs: one environment per patient.

    Returns:
        Tensors of P patients: `polymer_id` and `coverage` (P,) int64, `formulation` (P, 4) in the
        units of `hydrogel_gym.spaces.FORMULATION_FIELDS`, and (P,) each, `reward`, every predicted
        outcome and every term of the reward, by their names in `info`.
    """
    obs, _ = envs.reset(seed=SEED)
    design, _ = designs_of(policy, envs, obs)
    _, reward, _, _, info = envs.step(design)
    predicted = (*Outcomes._fields, *RewardTerms._fields)
    return {**design, "reward": reward, **{name: at_step(info, name) for name in predicted}}


def final_figures(
    policy: DesignPolicy,
    sets: dict[str, EvaluationSet],
    *,
    horizon: int,
    generator: torch.Generator,
) -> dict[str, Any]:
    """The figures of `summary.json` that describe a policy.

    Args:
        policy: what designs.
        sets: patients by name; sampled figures, over ten episodes each, are of `"train"`.
        horizon: steps per episode.
        generator: source of the samples.
    """
    envs, best_score = sets["train"]
    sampled = evaluate(
        policy,
        envs,
        horizon=horizon,
        best_score=best_score,
        generator=generator,
        num_episodes=EPISODES,
    )
    names = ("mean_reward", "max_reward", "optimal_rate", "entropy", "limit_breach_rate")
    figures = {name: sampled[name] for name in (*names, *YARDSTICK)}
    share = zip(load_polymers().names, sampled["polymer_share"], strict=True)
    figures["polymer_share"] = dict(share)
    for name, (envs, best_score) in sets.items():
        result = evaluate(policy, envs, horizon=horizon, best_score=best_score)
        figures[f"{name}_deterministic_reward"] = result["mean_reward"]
        figures[f"{name}_deterministic_optimal_rate"] = result["optimal_rate"]
        figures[f"{name}_deterministic_limit_breach_rate"] = result["limit_breach_rate"]
        figures |= {f"{name}_{key}": result[key] for key in YARDSTICK}
    return figures


def shown_regret(figures: dict[str, Any]) -> dict[str, str]:
    """What a progress bar shows of the yardstick: training / held-out cohort."""
    if figures["holdout_regret"] is None:
        return {}
    pairs = {name: [figures[f"{cohort}_{name}"] for cohort in COHORTS] for name in YARDSTICK}
    return {
        "regret": " / ".join(f"{value:.2f}" for value in pairs["regret"]),
        "p95": " / ".join(f"{value:.2f}" for value in pairs["regret_p95"]),
        "of oracle": " / ".join(f"{100 * x:.1f} %" for x in pairs["fraction_of_oracle"]),
    }
