"""The environment of one patient: a batch of one over the functions of `dynamics`."""

from __future__ import annotations

import os
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.error import ResetNeeded
from torch import Tensor

from hydrogel_gym.envs.codec import check_choice
from hydrogel_gym.envs.design_problem import DesignProblem, check_options, map_arrays, stream_keys
from hydrogel_gym.envs.frames import evaluations_of, frames, scene_of, warn_that_no_mode_was_chosen
from hydrogel_gym.envs.manual import with_numbers
from hydrogel_gym.envs.rendering import RENDER_FPS, RENDER_MODES, RenderMode
from hydrogel_gym.envs.spaces import ActionFormat, ObsFormat
from hydrogel_gym.models.contract import RewardModel
from hydrogel_gym.problem import dynamics
from hydrogel_gym.problem.cohort import Cohort
from hydrogel_gym.problem.fields import Design
from hydrogel_gym.problem.reward import RewardConfig
from hydrogel_gym.problem.state import PatientAssignment, RewardMode, State, Transition


def _step_info(result: Transition) -> dict[str, Tensor]:
    """Everything a step reports beside reward and observation, each under its own name."""
    return {
        **result.outcomes._asdict(),
        **result.terms._asdict(),
        "score": result.score,
        "is_optimal": result.is_optimal,
        "formulation": result.formulation,
        "formulation_clipped": result.formulation_clipped,
        "patient_index": result.state.patient_index,
    }


@with_numbers
class HydrogelEnv(gym.Env):
    """Choose a hydrogel for one virtual patient after a heart attack.

    ## Description

    A patch or injectate of hydrogel is designed for a patient whose left ventricle is scarred by an
    infarct: which of $num_polymers polymers, how stiff, how long-lived, how conductive and how
    thick, and how much of the border zone around the scar it covers. A frozen Stage-1 model
    predicts what the design does, and the reward weighs the predicted gain in ejection fraction
    against safety. The built-in model is an educational prior fitted to no patient, the patients
    are synthetic, and no figure here is a clinical fact.

    ## Action Space

    `action_format="dict"` (default) is a `Dict` of `polymer_id`, `Discrete($num_polymers)`,
    `formulation`, `Box($num_parameters,)`, and `coverage`, `Discrete($num_coverages)`; `"tuple"` is
    the same three in this order.

    | Head | Num | Action | Min | Max | Unit |
    |---|---|---|---|---|---|
    $action_rows

    A finite formulation outside its box is clipped, which `info["formulation_clipped"]` reports.
    Anything else that is not in the space is a `ValueError` that leaves the state untouched.

    Two flat forms serve libraries that take no composite action. `"box"` (`HydrogelDesignFlat-v0`)
    is `Box(-1, 1, ($flat_dim,))`: the formulation, rescaled, then a score per polymer and per
    coverage, the largest of which is chosen. `"multidiscrete"` (`HydrogelDesignDiscrete-v0`) is
    `MultiDiscrete($nvec)`: polymer, $num_levels evenly spaced levels per formulation parameter
    with both bounds among them, coverage.

    ## Observation Space

    `obs_format="box"` (default) is a `Box($obs_dim,)` of float32 in physical units.

    | Num | Observation | Min | Max | Unit |
    |---|---|---|---|---|
    $observation_rows

    `obs_format="dict"` groups them: `patient_features` ($patient_rows), `tissue_features`
    ($tissue_rows), `current_best_score`, `iteration`. `observe_explored=True` appends $num_polymers
    entries (in the dict `explored_polymers`), 1 for each polymer used in this episode: without them
    the novelty bonus is not Markov when the horizon exceeds 1. The maximum of `current_best_score`
    is what the outcomes' physical ranges allow under the default `RewardConfig`; good designs score
    25 to 40.

    ## Rewards

    The score of a design is the sum of these terms, each in `info` under its name:

    - `reward_delta_ef`: $delta_ef_weight x change in ejection fraction (percentage points)
    - `reward_stress_reduction`: $stress_reduction_weight x border-zone stress reduction (%) / 100
    - `reward_optimal_prob`: $optimal_prob_weight x probability that the design is optimal
    - `reward_toxicity`: -$toxicity_penalty if toxicity risk > $toxicity_limit
    - `reward_integrity`: -$integrity_penalty if structural integrity < $integrity_limit
    - `reward_fibrosis`: -$fibrosis_penalty if fibrosis risk > $fibrosis_limit
    - `reward_novelty`: +$novelty_bonus if the polymer was not yet used in this episode

    `reward_mode="score"` (default) pays the score at every step; `"improvement"` pays only what the
    episode's best score gains, so that an episode's return is its best score (or 0).

    `info` also has the outcomes (`delta_ef_pct`, `stress_reduction_pct`, `optimal_logit`,
    `toxicity_risk`, `structural_integrity`, `fibrosis_risk`), `score`, `is_optimal` (gain of
    $optimal_delta_ef_pct points or more and stress reduction of $optimal_stress_reduction_pct % or
    more), `formulation` as evaluated, `formulation_clipped` and `patient_index`.

    ## Starting State

    A patient of the cohort, with `current_best_score` and `iteration` zero. With
    `patient_assignment="random"` (default) each reset draws one uniformly from the environment's
    seeded stream; `"fixed"` keeps the first row, whatever the seed. Of `reset`'s `options`,
    `{"patient_id": ...}` picks one by id, `{"patient_index": ...}` by row, which `"fixed"` then
    keeps. Nothing else is random: same seed, same patients; no global generator is ever touched.

    ## Episode End

    Terminated after `horizon` steps. Never truncated from inside; the spec has no
    `max_episode_steps`, which `gym.make` takes for wrappers that ask for one.

    ## Arguments

    | Argument | Type | Default | Meaning |
    |---|---|---|---|
    | `horizon` | int | `1` | steps per episode |
    | `cohort` | None, path, `Cohort` | `None` | patients; None is the shipped 2,000 |
    | `reward_model` | str, path, callable | `"mechanistic"` | see `load_reward_model` |
    | `reward_config` | `RewardConfig` | `None` | weights and limits of the reward |
    | `action_format` | str | `"dict"` | `dict`, `tuple`, `box`, `multidiscrete` |
    | `obs_format` | str | `"box"` | `box`, `dict` |
    | `observe_explored` | bool | `False` | append the mask of used polymers |
    | `reward_mode` | str | `"score"` | `score`, `improvement` |
    | `patient_assignment` | str | `"random"` | `random`, `fixed` |
    | `device` | str | `"cpu"` | where the model runs |
    | `render_mode` | None, str | `None` | `rgb_array`, `ansi`; see `render` |

    ## Version History

    - v0: first version.
    """

    metadata: dict[str, Any] = {"render_modes": list(RENDER_MODES), "render_fps": RENDER_FPS}

    def __init__(
        self,
        *,
        device: str | torch.device = "cpu",
        horizon: int = 1,
        cohort: Cohort | str | os.PathLike[str] | None = None,
        reward_model: str | RewardModel = "mechanistic",
        reward_config: RewardConfig | None = None,
        action_format: ActionFormat = "dict",
        obs_format: ObsFormat = "box",
        observe_explored: bool = False,
        reward_mode: RewardMode = "score",
        patient_assignment: PatientAssignment = "random",
        render_mode: RenderMode | None = None,
    ) -> None:
        check_choice("render_mode", render_mode, (None, *RENDER_MODES))
        self.problem = self._make_problem(
            device=device,
            horizon=horizon,
            cohort=cohort,
            reward_model=reward_model,
            reward_config=reward_config,
            action_format=action_format,
            obs_format=obs_format,
            observe_explored=observe_explored,
            reward_mode=reward_mode,
            patient_assignment=patient_assignment,
            validate=True,
        )
        self.action_space = self.problem.actions.space
        self.observation_space = self.problem.observation_space
        self.render_mode = render_mode
        self._state: State | None = None
        self._terminated = False
        self._last: tuple[Design, Transition] | None = None  # of this episode

    def _make_problem(self, **settings: Any) -> DesignProblem:
        return DesignProblem(**settings)

    @torch.no_grad()
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: restarts the stream of patient draws.
            options: `{"patient_id": id}` or `{"patient_index": row of the cohort}` picks a patient,
                under `random` assignment for this episode, under `fixed` until another is chosen or
                a seed is given.

        Raises:
            ValueError: the option or the patient is unknown; nothing is reset.
        """
        options = check_options(options, {"patient_id", "patient_index"})
        chosen = self.problem.chosen_patients(options, ())
        super().reset(seed=seed)
        if seed is not None or self._state is None:
            keys = torch.from_numpy(stream_keys([seed], self.np_random)).to(self.problem.device)
            state = dynamics.initial(keys, self.problem.params)
        else:
            state = dynamics.next_episode(self._state, self.problem.params)
        if chosen is not None:
            state = state._replace(patient_index=chosen, home_index=chosen)
        self._state, self._terminated, self._last = state, False, None
        return self._observation(state), {"patient_index": int(state.patient_index)}

    @torch.no_grad()
    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Evaluate one design.

        Raises:
            ValueError: the action is not in the space, or the reward model failed. The state is
                untouched.
            ResetNeeded: the episode has ended or has not begun.
        """
        if self._state is None or self._terminated:
            raise ResetNeeded("the episode has ended or has not begun; call reset()")
        tensors = self.problem.read(action, ())
        design, stop = self.problem.actions.decode(tensors), self.problem.actions.stops(tensors)
        result = self.problem.transition(self._state, design, stop=stop)
        self._state, self._terminated = result.state, bool(result.terminated)
        if self.render_mode is not None:
            # The caller may write to its action.
            self._last = Design(*(tensor.clone() for tensor in design)), result
        info = {key: self._unbatched(value) for key, value in _step_info(result).items()}
        return self._observation(result.state), float(result.reward), self._terminated, False, info

    def render(self) -> np.ndarray | str | None:
        """Show the patient and, after a step, the last design, also once the episode has ended.

        Short axis of the left ventricle at end-diastole, to scale: cavity, wall, scar, border zone
        and the patch over what the design covers, with what was predicted; the same scale for all
        patients. `rendering` lists what is assumed: the cavity is a sphere of the end-diastolic
        volume, and the site of the scar on the circumference is not known.

        Returns:
            For `"rgb_array"` a (480, 640, 3) uint8 array, for `"ansi"` a few lines of text. Without
            a render mode None, with a warning.

        Raises:
            ResetNeeded: there is no patient before the first reset.
            DependencyNotInstalled: `"rgb_array"` needs Pillow, which the extra `render` brings.
        """
        if self.render_mode is None:
            warn_that_no_mode_was_chosen()
            return None
        if self._state is None:
            raise ResetNeeded("call reset() before render()")
        evaluation = evaluations_of(*self._last)[0] if self._last else None
        scene = scene_of(self.problem, int(self._state.patient_index), evaluation)
        frame: np.ndarray | str = frames(self.render_mode, [scene])[0]
        return frame

    def _observation(self, state: State) -> Any:
        return map_arrays(lambda rows: rows[0].cpu().numpy(), self.problem.observe(state))

    @staticmethod
    def _unbatched(value: Tensor) -> Any:
        array = value[0].cpu().numpy()
        if array.ndim:
            return array
        # Gymnasium's vector environments batch Python bools and ints, numpy floats as they are.
        return array[()] if array.dtype.kind == "f" else array.item()
