"""The environments of a run: to train in, and one per patient to evaluate a policy on."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, Literal

import gymnasium as gym
import torch
from torch import Tensor

from hydrogel_gym.envs.vector import HydrogelVectorEnv
from hydrogel_gym.errors import UsageError, first_line
from hydrogel_gym.models.contract import RewardModel, RewardModelError, load_reward_model
from hydrogel_gym.models.mechanistic import MechanisticModel
from hydrogel_gym.problem.cohort import Cohort
from hydrogel_gym.problem.fields import PATIENT_FIELDS, Outcomes
from hydrogel_gym.problem.reward import compute_reward
from hydrogel_gym.runs.checkpoints import Learner
from hydrogel_gym.runs.graphs import Replayed
from hydrogel_gym.runs.options import ADAPTIVE, ProblemOptions
from hydrogel_gym.runs.ranks import ALONE, World


def at_step(info: dict[str, Any], name: str) -> Tensor:
    """An info of every environment at this step, whether or not its episode ended with it.

    With same-step autoreset an entry is zero at top level where the episode ended and in
    `final_info` where it did not, so the sum is the value.
    """
    value: Tensor = info[name] + info["final_info"][name]
    return value


def stricter_reward(
    data: dict[str, Tensor], envs: gym.vector.VectorEnv, limit_margin: float, penalty_scale: float
) -> Tensor:
    """(T, B) what steps are worth to a learner: the reward under `RewardConfig.stricter`.

    A policy that is right on average breaks a limit for half of the patients who are best served
    close to it, and a penalty that starts there leaves it indifferent on the wrong side.

    Args:
        data: (T, B, ...) observations, rewards and infos of the steps.
        envs: which took them.
        limit_margin: by which limits are tighter.
        penalty_scale: times as large are the penalties.
    """
    unwrapped: Any = envs.unwrapped
    params = unwrapped.problem.params
    strict = params.reward_config.stricter(limit_margin, penalty_scale)
    outcomes = Outcomes(*(data[name] for name in Outcomes._fields))
    by_score, is_novel = params.reward_mode == "score", data["reward_novelty"] != 0.0
    if by_score and params.adaptive is not None and params.adaptive.observe == "response":
        # Which polymers were used is not observed: the bonus would be noise, and pay for variety.
        is_novel = torch.ones_like(is_novel)
    score = compute_reward(outcomes, is_novel, strict).to(data["reward"])
    if by_score:
        return score
    best_before = data["obs"][..., len(PATIENT_FIELDS)]  # `current_best_score`
    return (score - best_before).clamp_min(0.0)


def make_envs(
    problem: ProblemOptions,
    cohort: Cohort,
    device: torch.device,
    *,
    num_envs: int | None = None,
    compile: bool = False,
    dtype: Literal["float32", "float64"] = "float32",
) -> gym.vector.VectorEnv:
    """Batched environments that return tensors.

    Args:
        problem: what is to be designed.
        cohort: the patients.
        device: where.
        num_envs: so many to train in; None makes one per patient, to evaluate on.
        compile: their step.
        dtype: of their numbers.

    Raises:
        RewardModelError: the reward model cannot be used.
        UsageError: the id is of an environment that does not take these arguments or values.
    """
    settings = ("reward_mode", "response_sd", "outcome_noise", "check_cost", "observe")
    values = {name: getattr(problem, name) for name in settings}
    given: dict[str, Any] = {name: x for name, x in values.items() if x is not None}
    if problem.env_id == ADAPTIVE and not num_envs:
        given["reveal_response"] = True  # what a policy is compared with knows it
        if problem.observe_when_evaluated is not None:
            given["observe"] = problem.observe_when_evaluated
    if problem.reward_model is not None or problem.pessimism is not None:
        given["reward_model"] = _reward_model(problem, device)
    if compile:
        given["compile"] = True
    if dtype != "float32":
        given["dtype"] = dtype
    try:
        return gym.make_vec(
            problem.env_id,
            num_envs=num_envs or len(cohort),
            cohort=cohort,
            device=str(device),
            horizon=problem.horizon,
            patient_assignment=problem.patient_assignment if num_envs else "fixed",
            output="torch",
            autoreset_mode="SameStep",
            **given,
        )
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise UsageError(
            f"--env-id {problem.env_id} is no environment of this kind: {first_line(error)}"
        ) from error
    except RewardModelError:
        raise
    except ValueError as error:
        raise UsageError(f"--env-id {problem.env_id}: {first_line(error)}") from error


def _reward_model(problem: ProblemOptions, device: torch.device) -> RewardModel:
    name = problem.reward_model_name
    model = load_reward_model(name, device, pessimism=problem.pessimism)
    if problem.env_id == ADAPTIVE and not isinstance(model, MechanisticModel):
        raise UsageError(
            f"--reward-model is {name!r}, which takes no patient's response; allowed with "
            f"{ADAPTIVE}: mechanistic"
        )
    return model


@torch.no_grad()
def observation_statistics(
    envs: gym.vector.VectorEnv, horizon: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (obs_dim,), of what one episode of random designs observes."""
    envs.action_space.seed(seed)
    obs, _ = envs.reset(seed=seed)
    seen = [obs]
    for _ in range(horizon - 1):
        seen.append(envs.step(envs.action_space.sample())[0])
    stacked = torch.cat(seen)
    std = stacked.std(0)
    # A field that never varies (the best score of a single-step episode) carries nothing.
    return stacked.mean(0), torch.where(std > 0, std, torch.ones_like(std))


@torch.no_grad()
def first_reset(
    envs: gym.vector.VectorEnv,
    problem: ProblemOptions,
    seed: int,
    num_patients: int,
    world: World = ALONE,
) -> Tensor:
    """Begin this rank's environments, as what they are among all; returns what they observe."""
    share = world.share(envs.num_envs * world.size)
    options = None
    if problem.patient_assignment == "fixed" and world.size > 1:
        options = {"patient_index": torch.arange(share.start, share.stop) % num_patients}
    obs: Tensor = envs.reset(seed=seed + share.start, options=options)[0]
    return obs


@torch.no_grad()
def reward_model_seconds(envs: gym.vector.VectorEnv) -> float | None:
    """Time of the frozen model alone for one step of all environments, not compiled.

    Called once more for it, since within a compiled step or on a GPU it cannot be told apart. None
    for environments of another make.
    """
    problem = getattr(envs.unwrapped, "problem", None)
    if problem is None:
        return None
    heads: Any = envs.single_action_space
    rows = torch.arange(envs.num_envs, device=problem.device)
    patient = problem.params.patients[rows % problem.params.num_patients]
    middle = (heads["formulation"].low + heads["formulation"].high) / 2
    formulation = patient.new_tensor(middle).expand(envs.num_envs, -1)
    design = (rows % int(heads["polymer_id"].n), formulation, rows % int(heads["coverage"].n))
    if problem.device.type == "cuda":
        torch.cuda.synchronize(problem.device)
    began = time.perf_counter()
    problem.reward_model(patient, *design)
    if problem.device.type == "cuda":
        torch.cuda.synchronize(problem.device)
    return time.perf_counter() - began


def recorded_rollout(
    rollout: Callable[..., Any], step: Any, learner: Learner, **settings: Any
) -> Callable[[Tensor], Any]:
    """Rollouts from an observation, each as one CUDA graph where `step` records epochs of updates.

    Only of environments whose whole state is known, and that check nothing on the host.

    Args:
        rollout: of environments, agent, observation, `generator` and the `settings`.
        step: the gradient step.
        learner: environments, agent and generator.
        settings: the same in every rollout.
    """
    envs, generator = learner.envs, learner.generator
    roll_out = functools.partial(rollout, envs, learner.agent, generator=generator, **settings)
    is_known = isinstance(envs, HydrogelVectorEnv) and not envs.problem.validate
    if not (is_known and getattr(step, "records", False)):
        return roll_out

    def from_state(obs: Tensor, state: dict[str, Tensor]) -> Any:
        envs.load_state_dict(state, check=False)
        return roll_out(obs), envs.state_dict()

    replayed = Replayed(from_state, 1, generator)

    def replay(obs: Tensor) -> Any:
        returned, state = replayed(obs, envs.state_dict())
        envs.load_state_dict(state, check=False)
        return returned

    return replay
