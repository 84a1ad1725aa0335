"""A transition where designs are checked on a patient whose response is hidden; see `adaptive`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hydrogel_gym.problem.adaptive import Checks, measured, recorded
from hydrogel_gym.problem.belief import updated_belief
from hydrogel_gym.problem.fields import Design, Outcomes
from hydrogel_gym.problem.reward import RewardTerms, is_optimal, reward_terms, sum_terms
from hydrogel_gym.problem.state import EnvParams, State, Transition


def check(
    state: State,
    design: Design,
    result: Transition,
    params: EnvParams,
    predict: Callable[[Tensor], Outcomes],
    stop: Tensor | None,
) -> Transition:
    """What a transition is where designs are checked: measured, recorded, paid for, or refused.

    Args:
        state: before the check.
        design: what was tried.
        result: the transition as it truly is.
        params: the problem, an adaptive one.
        predict: outcomes of the design under (B, M, R) responses, (B, M) each.
        stop: (B,) bool, who ends the episode instead of checking.

    Returns:
        The transition with the outcomes, terms and score that were measured; its reward is of the
        true score. Who stops gets nothing, and nothing else of its state changes.
    """
    known, checks = params.adaptive, state.checks
    assert known is not None  # who calls has looked
    assert isinstance(checks, Checks)
    outcomes = measured(result.outcomes, known, state.seed, state.episode, state.iteration)
    if outcomes is not result.outcomes:
        novelty = {"reward_novelty": result.terms.reward_novelty}
        terms = reward_terms(outcomes, True, params.reward_config)._replace(**novelty)
        result = result._replace(
            outcomes=outcomes,
            terms=terms,
            score=sum_terms(terms),
            is_optimal=is_optimal(outcomes, params.reward_config),
        )
    after = Checks(
        response=checks.response,
        history=recorded(
            checks.history,
            state.iteration,
            design._replace(formulation=result.formulation),
            result.outcomes,
            result.score,
        ),
        best_measured=torch.maximum(checks.best_measured, result.score),
        belief=updated_belief(checks.belief, predict, result.outcomes, known.outcome_noise)
        if checks.belief.shape[-1]
        else checks.belief,
    )
    result = result._replace(state=result.state._replace(checks=after))
    if known.check_cost:
        result = result._replace(reward=result.reward - known.check_cost)
    return result if stop is None else _stopped(state, result, stop)


def _stopped(state: State, result: Transition, stop: Tensor) -> Transition:
    """A transition in which who stops is left as it was, and has ended."""

    def kept(before: Tensor, after: Tensor) -> Tensor:
        mask = stop.view(-1, *[1] * (after.dim() - 1))
        return after if before is after else torch.where(mask, before, after)

    def none(value: Tensor) -> Tensor:
        return value.masked_fill(stop.view(-1, *[1] * (value.dim() - 1)), 0)

    before: Mapping[str, Tensor] = state.tensors()
    after = {name: kept(before[name], value) for name, value in result.state.tensors().items()}
    return result._replace(
        state=type(state).of(after),
        reward=none(result.reward),
        terminated=result.terminated | stop,
        score=none(result.score),
        terms=RewardTerms(*map(none, result.terms)),
        outcomes=Outcomes(*map(none, result.outcomes)),
        formulation=none(result.formulation),
        formulation_clipped=none(result.formulation_clipped),
        is_optimal=none(result.is_optimal),
    )
