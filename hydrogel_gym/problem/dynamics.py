"""The design problem as pure batched functions: episodes, observation and transition.

Nothing here keeps state, draws from a global generator, reads a tensor on the host or branches on
data, so every function runs on any device (`"meta"` included) and inside one compiled graph. The
Stage-1 model comes in as an argument. Shapes: B environments, P patients, C columns of a patient,
D parameters of a formulation, F fields of an observation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hydrogel_gym.problem import checking
from hydrogel_gym.problem.adaptive import observed_response, with_history
from hydrogel_gym.problem.fields import FORMULATION_FIELDS, Design, Outcomes
from hydrogel_gym.problem.polymers import NUM_POLYMERS
from hydrogel_gym.problem.reward import (
    RewardFunction,
    RewardTerms,
    is_optimal,
    reward_terms,
    sum_terms,
)
from hydrogel_gym.problem.state import EnvParams, State, Transition
from hydrogel_gym.problem.streams import random_bits

Autoreset = Literal["SameStep", "NextStep", "Disabled"]  # Gymnasium's names


def draw_patient_index(seed: Tensor, episode: Tensor, num_patients: int) -> Tensor:
    """Patient of the given episode of the stream `seed`: uniform, counter-based, stateless.

    A draw depends on nothing but its arguments, so a single environment, a vector of them and one
    batched environment agree whatever the order in which their episodes end. The modulo bias is
    below P / 2**63.

    Args:
        seed: (B,) int64 stream keys.
        episode: (B,) int64 counters.
        num_patients: P.

    Returns:
        (B,) int64 in [0, P).
    """
    return (random_bits(seed, episode) & 0x7FFF_FFFF_FFFF_FFFF) % num_patients


def _begin(
    seed: Tensor,
    episode: Tensor,
    home_index: Tensor,
    params: EnvParams,
    history: Tensor | None = None,
) -> State:
    if params.patient_assignment == "random":
        patient_index = draw_patient_index(seed, episode, params.num_patients)
    else:
        patient_index = home_index.clone()  # a graph would be specialised to the two being one
    return State(
        seed=seed,
        episode=episode,
        home_index=home_index,
        patient_index=patient_index,
        best_score=torch.zeros_like(seed, dtype=params.patients.dtype),
        iteration=torch.zeros_like(seed),
        explored=torch.zeros_like(seed),
        checks=params.adaptive.begin(seed, episode, history) if params.adaptive else (),
    )


def initial(seed: Tensor, params: EnvParams) -> State:
    """First episode of B environments; environment i is at home with patient i mod P.

    Args:
        seed: (B,) int64 stream keys.
        params: the problem.
    """
    env_index = torch.arange(seed.shape[0], device=seed.device)
    return _begin(seed, torch.zeros_like(seed), env_index % params.num_patients, params)


def next_episode(state: State, params: EnvParams) -> State:
    """Begin another episode in every environment."""
    history = state.checks.history if state.checks else None
    return _begin(state.seed, state.episode + 1, state.home_index, params, history)


def select(mask: Tensor, chosen: State, other: State) -> State:
    """State whose rows come from `chosen` where the (B,) mask is true, else from `other`."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return a if a is b else torch.where(mask.view(-1, *[1] * (a.dim() - 1)), a, b)

    others = other.tensors()
    return State.of({name: pick(a, others[name]) for name, a in chosen.tensors().items()})


def explored_polymers(state: State) -> Tensor:
    """(B, NUM_POLYMERS) int64, 1 for each polymer used in this episode."""
    polymers = torch.arange(NUM_POLYMERS, device=state.explored.device)
    return (state.explored.unsqueeze(-1) >> polymers) & 1


def observation(state: State, params: EnvParams) -> Tensor:
    """(B, F) observation in physical units, with what was explored and tried where wanted."""
    patients, checks = params.patients.index_select(0, state.patient_index), state.checks
    columns = [
        patients,
        (checks.best_measured if checks else state.best_score).unsqueeze(-1),
        state.iteration.unsqueeze(-1).to(patients.dtype),
    ]
    if params.observe_explored:
        columns.append(explored_polymers(state).to(patients.dtype))
    if params.adaptive is None or not checks:
        return torch.cat(columns, dim=-1)
    if params.adaptive.observe == "history":
        return with_history(torch.cat(columns, dim=-1), checks, state.iteration)
    draw = (state.seed, state.episode, state.iteration)
    return torch.cat([*columns, observed_response(checks, params.adaptive, *draw)], -1)


def clip_formulation(formulation: Tensor) -> Tensor:
    """(..., D) formulation moved into its box."""
    # Bounds as a tensor would be copied to an accelerator at every step, a synchronisation.
    columns = zip(formulation.unbind(-1), FORMULATION_FIELDS, strict=True)
    return torch.stack([column.clamp(item.low, item.high) for column, item in columns], dim=-1)


def transition(
    state: State,
    design: Design,
    params: EnvParams,
    reward_model: RewardFunction,
    stop: Tensor | None = None,
) -> Transition:
    """Apply one design per environment.

    Args:
        state: B environments in the middle of an episode.
        design: one design each; the formulation is clipped to its box, the indices must be valid.
        params: the problem.
        reward_model: the Stage-1 model; of an adaptive problem, one that takes a response.
        stop: (B,) bool, who ends the episode instead; of an adaptive problem alone.

    Returns:
        The new state and everything observed on the way. `terminated` is true once the episode has
        `params.horizon` steps, `truncated` once it has `params.max_episode_steps`; no reset is
        applied.
    """
    formulation = clip_formulation(design.formulation)
    patients = params.patients.index_select(0, state.patient_index)
    response = (state.checks.response,) if state.checks else ()
    outcomes = reward_model(patients, design.polymer_id, formulation, design.coverage, *response)

    used = torch.ones_like(design.polymer_id) << design.polymer_id
    config = params.reward_config
    terms = reward_terms(outcomes, (state.explored & used) == 0, config)
    score = sum_terms(terms)
    best_score = torch.maximum(state.best_score, score)
    iteration = state.iteration + 1
    result = Transition(
        state=state._replace(
            best_score=best_score, iteration=iteration, explored=state.explored | used
        ),
        reward=score if params.reward_mode == "score" else best_score - state.best_score,
        terminated=iteration >= params.horizon,
        # As Gymnasium's TimeLimit, also where the episode ends by itself.
        truncated=iteration >= (params.max_episode_steps or math.inf),
        score=score,
        terms=terms,
        outcomes=outcomes,
        formulation=formulation,
        formulation_clipped=(formulation != design.formulation).any(-1),
        is_optimal=is_optimal(outcomes, config),
    )
    if params.adaptive is None:
        return result

    def predict(responses: Tensor) -> Outcomes:
        inputs = (patients, design.polymer_id, formulation, design.coverage)
        return Outcomes(
            *torch.broadcast_tensors(*reward_model(*(x.unsqueeze(1) for x in inputs), responses))
        )

    return checking.check(state, design, result, params, predict, stop)


# What a step reports beside reward and observation: the (B,) numbers and the (B,) bools.
INFO_SCALARS = (*Outcomes._fields, *RewardTerms._fields, "score")
INFO_FLAGS = ("is_optimal", "formulation_clipped")


def final(name: str) -> str:
    """Name of the row that reports of an episode's end what `name` reports of a step."""
    return f"final {name}"


class StepRows(NamedTuple):
    """Names of the rows of each stacked tensor of a `Step`, in their order."""

    scalars: tuple[str, ...]
    flags: tuple[str, ...]
    formulation: tuple[str, ...]
    patient_index: tuple[str, ...]


def _step_rows(autoreset: Autoreset) -> StepRows:
    def reported(*names: str) -> tuple[str, ...]:
        ends = tuple(final(name) for name in names) if autoreset == "SameStep" else ()
        return names + ends

    return StepRows(
        scalars=("reward", *reported(*INFO_SCALARS)),
        # "stepped" where no episode begins; the constant is there to be handed out.
        flags=("terminated", "truncated", "done", "always", "stepped", *reported(*INFO_FLAGS)),
        formulation=reported("formulation"),
        patient_index=reported("patient_index"),
    )


# The one place that decides the order: `step` stacks by it, and its readers take apart by it.
STEP_ROWS: dict[Autoreset, StepRows] = {mode: _step_rows(mode) for mode in get_args(Autoreset)}


def stack_rows(names: tuple[str, ...], values: Mapping[str, Tensor]) -> Tensor:
    """(R, ...) values in the order of their names.

    Raises:
        KeyError: a name has no value.
        ValueError: a value has no name.
    """
    if len(values) > len(names):
        raise ValueError(f"rows {sorted(set(values) - set(names))} have no place in {names}")
    return torch.stack([values[name] for name in names])


class Step(NamedTuple):
    """Everything one step of a vector of environments produces; no two tensors share memory.

    Values of one kind are the rows of one tensor, since a graph takes longer to hand out 80 small
    tensors than to compute 2,000 steps. `STEP_ROWS` names the rows. In mode `SameStep` what is
    reported of the episode's end, under `final(name)`, is apart from what the new episode reports.
    """

    state: State  # after the autoreset
    obs: Tensor  # (B, F) observation of that state
    scalars: Tensor  # (R, B) float32
    flags: Tensor  # (R, B) uint8, 0 or 1
    formulation: Tensor  # (R, B, D) float32
    patient_index: Tensor  # (R, B) int64
    defect: Tensor  # (B,) float32, 0 where all outcomes are finite, else NaN
    final_obs: Tensor | None  # (B, F) observation before the autoreset


def step(
    state: State,
    done: Tensor,
    design: Design,
    params: EnvParams,
    reward_model: RewardFunction,
    autoreset: Autoreset,
    stop: Tensor | None = None,
) -> Step:
    """Apply one design per environment and reset those whose episode has ended.

    Args:
        state: B environments.
        done: (B,) bool, whose episode ended in the step before: in mode `NextStep` these are reset
            instead of stepped, whatever their design.
        design: one each, with valid indices.
        params: the problem.
        reward_model: the Stage-1 model.
        autoreset: when an ended episode is followed by another.
        stop: as for `transition`.
    """
    result = transition(state, design, params, reward_model, stop)
    after, reward = result.state, result.reward
    terminated, truncated = result.terminated, result.truncated
    begun = torch.zeros_like(done)
    if autoreset == "NextStep":
        begun = done
        reward = reward.masked_fill(begun, 0.0)
        terminated, truncated = terminated & ~begun, truncated & ~begun
    ended = terminated | truncated
    if autoreset == "SameStep":
        begun = ended
    if autoreset != "Disabled":
        after = select(begun, next_episode(after, params), after)
    rows, zero = STEP_ROWS[autoreset], torch.zeros_like(reward)
    reported = functools.partial(_reported, begun, ended if autoreset == "SameStep" else None)

    # Bools as floats, since the compiler for CPUs stores bools one by one: those of a step would
    # take longer than its arithmetic.
    flags = {name: getattr(result, name).to(reward.dtype) for name in INFO_FLAGS}
    flags = reported(**flags) | {
        "terminated": terminated.to(reward.dtype),
        "truncated": truncated.to(reward.dtype),
        "done": ended.to(reward.dtype),
        "always": zero + 1.0,
        "stepped": (~begun).to(reward.dtype),
    }
    scalars = reported(
        **result.outcomes._asdict(), **result.terms._asdict(), score=result.score
    ) | {"reward": reward}
    # That of the new episode where one begins, unlike all else.
    patient_index = reported(patient_index=result.state.patient_index)
    patient_index |= {"patient_index": after.patient_index}
    return Step(
        state=after,
        obs=observation(after, params),
        scalars=stack_rows(rows.scalars, scalars),
        flags=stack_rows(rows.flags, flags).to(torch.uint8),
        formulation=stack_rows(rows.formulation, reported(formulation=result.formulation)),
        patient_index=stack_rows(rows.patient_index, patient_index),
        defect=sum((outcome * 0.0 for outcome in result.outcomes), start=zero),
        final_obs=observation(result.state, params) if autoreset == "SameStep" else None,
    )


def _reported(begun: Tensor, ended: Tensor | None, **values: Tensor) -> dict[str, Tensor]:
    """Values where no episode begins and, if wanted, as final ones where one ends; elsewhere 0."""
    rows = {name: _zero_where(begun, value) for name, value in values.items()}
    if ended is not None:
        goes_on = ~ended
        rows |= {final(name): _zero_where(goes_on, value) for name, value in values.items()}
    return rows


def _zero_where(mask: Tensor, value: Tensor) -> Tensor:
    """Copy of a (B,) or (B, D) value with 0 in the rows of a (B,) mask."""
    return value.masked_fill(mask if value.dim() == 1 else mask.unsqueeze(-1), 0)
