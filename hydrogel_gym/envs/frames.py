"""From what a step did to the pictures and texts that `rendering` draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import torch
from gymnasium.error import DependencyNotInstalled

from hydrogel_gym.envs import rendering
from hydrogel_gym.envs.design_problem import DesignProblem
from hydrogel_gym.envs.rendering import RENDER_MODES, Evaluation, Scene
from hydrogel_gym.problem.fields import Design
from hydrogel_gym.problem.polymers import load_polymers
from hydrogel_gym.problem.state import Transition


def evaluations_of(design: Design, result: Transition) -> list[Evaluation]:
    """What was designed in every environment and what was predicted of it, read on the host."""
    names = load_polymers().names
    rows = zip(
        design.polymer_id.tolist(),
        result.formulation.tolist(),
        design.coverage.tolist(),
        torch.stack(result.outcomes, dim=-1).tolist(),
        result.reward.tolist(),
        result.state.iteration.tolist(),
        strict=True,
    )
    return [
        Evaluation(names[polymer], tuple(formulation), coverage, tuple(outcomes), reward, iteration)
        for polymer, formulation, coverage, outcomes, reward, iteration in rows
    ]


def scene_of(problem: DesignProblem, patient_index: int, evaluation: Evaluation | None) -> Scene:
    """What there is to show of a patient and, if there was one, of a design."""
    return Scene(
        patient_id=problem.cohort.patient_ids[patient_index],
        patient=tuple(problem.cohort.features[patient_index].tolist()),
        horizon=problem.params.horizon,
        limits=problem.params.reward_config,
        evaluation=evaluation,
    )


def frames(mode: str, scenes: Sequence[Scene]) -> tuple[Any, ...]:
    """One picture, or text, for each scene."""
    if mode == "ansi":
        return tuple(map(rendering.describe, scenes))
    try:
        return tuple(map(rendering.draw, scenes))
    except ModuleNotFoundError as error:
        raise DependencyNotInstalled(
            'render_mode "rgb_array" needs Pillow: pip install -e ".[render]"'
        ) from error


def warn_that_no_mode_was_chosen() -> None:
    """Say what `render` needs."""
    gym.logger.warn(
        f"render() draws nothing without a render_mode; allowed: {RENDER_MODES}, when the "
        "environment is made"
    )
