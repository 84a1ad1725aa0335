"""Ways to choose which designs of a patient are checked, where the response is hidden.

Each takes an `Episode` and returns what chooses the next design of every patient, given the
observation. All see what was measured; the clairvoyant alone sees the response. Shapes: P patients,
N particles, R factors of a response, M candidates.

References:
    [Ament2023] Ament et al. Unexpected improvements to expected improvement. NeurIPS 2023.
    [Thompson1933] Thompson. On the likelihood that one unknown probability exceeds another in view
    of the evidence of two samples. Biometrika 25:285.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from quality.baselines.objective import HIGH, LOW, CountingModel, design_rows
from quality.baselines.posterior import Posterior
from quality.baselines.search import NUM_COVERAGES, design_of_unit
from torch import Tensor

from hydrogel_gym import RewardConfig, compute_reward
from hydrogel_gym.oracle import best_designs, search
from hydrogel_gym.problem.fields import PATIENT_FIELDS, Design, Outcomes
from hydrogel_gym.problem.response import RESPONSE_FIELDS

Choose = Callable[[Tensor], Design]
CONFIG = RewardConfig()
NUM_FEATURES, NUM_FACTORS = len(PATIENT_FIELDS), len(RESPONSE_FIELDS)
PATIENTS_AT_ONCE = 25
# The limits of safety jump: a response that is known to 1e-4 wants that much room. In points of
# the reward this room costs less than 0.01.
ROOM = CONFIG.stricter(3e-4)
NEVER = 1e3  # points of the reward, to keep a polymer out


@dataclasses.dataclass
class Episode:
    """What a method knows, of P patients at once."""

    patients: Tensor  # (P, C)
    response: Tensor  # (P, R), for the clairvoyant alone
    model: CountingModel
    response_sd: float
    noise: tuple[float, ...]
    seed: int
    tried: list[Design] = dataclasses.field(default_factory=list)
    outcomes: list[Tensor] = dataclasses.field(default_factory=list)  # (P, K) each, as measured
    scores: list[Tensor] = dataclasses.field(default_factory=list)  # (P,) each, as measured

    def record(self, design: Design, outcomes: Outcomes, score: Tensor) -> None:
        """Add a check."""
        self.tried.append(design)
        self.outcomes.append(torch.stack(outcomes, -1))
        self.scores.append(score)

    @property
    def used(self) -> Tensor:
        """(P,) int64, a bit for each polymer that was tried."""
        bits = torch.zeros(len(self.patients), dtype=torch.int64)
        for design in self.tried:
            bits |= 1 << design.polymer_id
        return bits


def scored(
    model: CountingModel, patients: Tensor, design: Design, response: Tensor, used: Tensor
) -> Tensor:
    """Scores of designs under responses, all of which broadcast, with what is left of novelty."""
    novel = (used >> design.polymer_id) & 1 == 0
    # Some outcomes depend on no response, and have one number for all.
    outcomes = torch.broadcast_tensors(*model(patients, *design, response))
    return compute_reward(Outcomes(*outcomes), novel)


@torch.no_grad()
def best_under(
    model: CountingModel,
    patients: Tensor,
    response: Tensor,
    used: Tensor,
    loss: float = CONFIG.novelty_bonus,
    config: RewardConfig = ROOM,
) -> Design:
    """Best designs of (P, C) patients under a (P, R) response, by the oracle's search.

    Args:
        model: takes a response.
        patients: (P, C).
        response: (P, R).
        used: (P,) bits of the polymers that were tried.
        loss: what the score of a polymer that was tried loses.
        config: limits of safety.
    """

    def respond(row: Tensor, polymer_id: Tensor, formulation: Tensor, coverage: Tensor) -> Outcomes:
        outcomes = model(
            row[:, :NUM_FEATURES], polymer_id, formulation, coverage, row[:, NUM_FEATURES:-1]
        )
        # The search knows no polymer that was tried before; what it costs comes off the gain.
        tried = (row[:, -1].long() >> polymer_id) & 1
        lost = tried * (loss / CONFIG.delta_ef_weight)
        return outcomes._replace(delta_ef_pct=outcomes.delta_ef_pct - lost)

    rows = torch.cat([patients, response, used[:, None].float()], -1)  # 24 bits are exact in it
    found = [search.search(part, respond, config, 0) for part in rows.split(PATIENTS_AT_ONCE)]
    return Design(*map(torch.cat, zip(*found, strict=True)))


def clairvoyant(episode: Episode) -> Choose:
    """The best design under the true response, again and again."""
    zero = torch.zeros(len(episode.patients), dtype=torch.int64)
    best = best_under(episode.model, episode.patients, episode.response, zero, config=CONFIG)
    return lambda obs: best


def predicted(episode: Episode) -> Choose:
    """The best predicted design, as shipped, again and again: nothing is learnt."""
    best = design_rows(best_designs("holdout").design, slice(len(episode.patients)))
    return lambda obs: best


def in_turn(episode: Episode) -> Choose:
    """The best predicted design of the best polymer, then of the next one, and so on."""
    ones = torch.ones_like(episode.response)
    return lambda obs: best_under(episode.model, episode.patients, ones, episode.used, NEVER)


def random(episode: Episode) -> Choose:
    """Uniform over the design space."""
    generator = torch.Generator().manual_seed(episode.seed)
    return lambda obs: design_of_unit(torch.rand(len(obs), 6, generator=generator))


def policy(episode: Episode, agent: Any) -> Choose:
    """The deterministic designs of a trained policy."""
    return torch.no_grad()(lambda obs: Design(**agent.design(obs)[0]))


NUM_SAMPLED = 4  # responses whose best designs are candidates
NUM_JUDGES = 128  # responses by which a candidate is judged
NUM_KEPT, NUM_NEAR, ROUNDS = 6, 10, 3  # candidates refined, neighbours of each, how often
Value = Callable[[Tensor, Tensor], Tensor]  # of (P, M, N) scores and the (P, 1, 1) best so far


def thompson(episode: Episode) -> Choose:
    """The best design under one response drawn from the posterior [Thompson1933]."""
    return _by_posterior(episode, None)


def posterior_mean(episode: Episode) -> Choose:
    """The design with the best mean score under the posterior."""
    return _by_posterior(episode, lambda scores, best: scores.mean(-1))


def posterior_improvement(episode: Episode) -> Choose:
    """The design that is expected to gain most on the best so far under the posterior."""
    return _by_posterior(episode, lambda scores, best: (scores - best).clamp(min=0.0).mean(-1))


def _by_posterior(episode: Episode, value: Value | None) -> Choose:
    """By `value`, or by posterior sampling."""
    starts = range(0, len(episode.patients), PATIENTS_AT_ONCE)
    parts = [_Part(episode, slice(k, k + PATIENTS_AT_ONCE), value) for k in starts]

    def choose(obs: Tensor) -> Design:
        found = [part.choose(episode) for part in parts]
        return Design(*map(torch.cat, zip(*found, strict=True)))

    return choose


class _Part:
    """Some patients of an episode, and what is believed of them."""

    def __init__(self, episode: Episode, rows: slice, value: Value | None) -> None:
        patients, seed = episode.patients[rows], episode.seed + rows.start
        self.rows, self.value, self.model, self.patients = rows, value, episode.model, patients
        self.belief = Posterior(patients, self.model, episode.response_sd, episode.noise, seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.used: list[Tensor] = []  # at each check

    @torch.no_grad()
    def choose(self, episode: Episode) -> Design:
        """The next design, (P,) of all."""
        if episode.tried:
            tried = design_rows(episode.tried[-1], self.rows)
            self.belief.add(tried, episode.outcomes[-1][self.rows])
        self.used.append(episode.used[self.rows])
        judges = self.belief.responses
        order = torch.randperm(judges.shape[1], generator=self.generator)
        judges = judges[:, order[:NUM_JUDGES]]
        if self.value is None:
            return best_under(self.model, self.patients, judges[:, 0], self.used[-1])
        drawn = judges[:, :NUM_SAMPLED]
        best = best_under(
            self.model,
            self.patients.repeat_interleave(NUM_SAMPLED, 0),
            drawn.flatten(0, 1),
            self.used[-1].repeat_interleave(NUM_SAMPLED),
        )
        best = Design(*(head.unflatten(0, drawn.shape[:2]) for head in best))
        # Not the best measured score: noise would flatter it.
        reached = torch.zeros(len(best.polymer_id), 1, 1)
        for design, used in zip(episode.tried, self.used[:-1], strict=True):
            design = Design(*(head[self.rows, None] for head in design))
            mean = self._judged(design, judges, used).mean(-1, keepdim=True)
            reached = reached.maximum(mean)
        worth = functools.partial(self._worth, judges=judges, reached=reached)
        return _refined(best, worth, self.generator)

    def _judged(self, design: Design, judges: Tensor, used: Tensor) -> Tensor:
        """(P, M, N) scores of (P, M) designs."""
        design = Design(*(head.unsqueeze(2) for head in design))
        patients, used = self.patients[:, None, None], used[:, None, None]
        return scored(self.model, patients, design, judges[:, None], used)

    def _worth(self, design: Design, judges: Tensor, reached: Tensor) -> Tensor:
        assert self.value
        return self.value(self._judged(design, judges, self.used[-1]), reached)


def _refined(
    design: Design, worth: Callable[[Design], Tensor], generator: torch.Generator
) -> Design:
    """(P,) designs of most worth, by steps ever closer about the best of (P, M)."""
    value = worth(design)
    for k in range(ROUNDS + 1):
        kept = value.topk(min(NUM_KEPT if k < ROUNDS else 1, value.shape[1]), 1)
        design, value = _picked(design, kept.indices), kept.values
        if k == ROUNDS:
            break
        near = _near(design, NUM_NEAR, 0.05 * 0.3**k, generator)
        design = Design(*(torch.cat(heads, 1) for heads in zip(design, near, strict=True)))
        value = torch.cat([value, worth(near)], 1)
    return Design(*(head[:, 0] for head in design))


def _picked(design: Design, index: Tensor) -> Design:
    """(P, L) designs at a (P, L) index into (P, M)."""
    rows = torch.arange(len(index))[:, None]
    return Design(*(head[rows, index] for head in design))


def _near(design: Design, count: int, spread: float, generator: torch.Generator) -> Design:
    """(P, M * count) designs about (P, M): same polymers and coverages, moved formulations."""
    polymer_id, formulation, coverage = (head.repeat_interleave(count, 1) for head in design)
    step = spread * torch.randn(formulation.shape, generator=generator) * (HIGH - LOW)
    return Design(polymer_id, (formulation + step).clamp(LOW, HIGH), coverage)


NUM_FIRST = 5  # Sobol designs before the first model; with 3 or 4 the regret was larger
NUM_SPREAD = 2048  # candidates over the whole space
PEAKS = 8  # best predicted polymers whose best designs are candidates


def from_scratch(episode: Episode) -> Choose:
    """Bayesian optimisation of the score: it knows nothing of the reward model."""
    engine = torch.quasirandom.SobolEngine(6, scramble=True, seed=episode.seed)
    num = len(episode.patients)
    first = design_of_unit(engine.draw(NUM_FIRST * num))
    first = Design(*(head.unflatten(0, (num, NUM_FIRST)) for head in first))
    return _bayesian(episode, first, first, lambda design, used: torch.zeros(len(used), 1), None)


def residual(episode: Episode) -> Choose:
    """Bayesian optimisation of what the reward model's prediction leaves to explain."""
    ones, peaks, used = torch.ones_like(episode.response), [], episode.used
    for _ in range(PEAKS):
        peaks.append(best_under(episode.model, episode.patients, ones, used, NEVER))
        used = used | (1 << peaks[-1].polymer_id)
    every = Design(*(torch.stack(heads, 1) for heads in zip(*peaks, strict=True)))
    first = Design(*(head[:, :1] for head in every))

    @torch.no_grad()
    def prediction(design: Design, used: Tensor) -> Tensor:
        patients, response = episode.patients[:, None], ones[:, None]
        return scored(episode.model, patients, design, response, used)

    # How far predictions may be off, by the prior of responses.
    prior = Posterior(episode.patients, episode.model, episode.response_sd, episode.noise, 0, 64)
    shown = Design(*(head.unsqueeze(2) for head in every))
    model, patients = episode.model, episode.patients[:, None, None]
    scores = scored(model, patients, shown, prior.responses[:, None], episode.used[:, None, None])
    scale = (scores - prediction(every, episode.used[:, None])[..., None]).square().mean((1, 2))
    return _bayesian(episode, first, every, prediction, scale.sqrt())


def _bayesian(
    episode: Episode,
    first: Design,
    peaks: Design,
    mean: Callable[[Design, Tensor], Tensor],
    scale: Tensor | None,
) -> Choose:
    """Expected improvement over a set of candidates, by a process about a prior mean.

    Args:
        episode: P patients.
        first: (P, F) checks before the first model.
        peaks: (P, M) candidates; so are designs about them, about the best so far, and a Sobol set.
        mean: (P, M) prior mean score of (P, M) designs, given (P, 1) bits of polymers tried.
        scale: (P,) deviations of the process; by default the mean and deviation of the scores are
            taken off first.
    """
    engine = torch.quasirandom.SobolEngine(6, scramble=True, seed=episode.seed)
    generator = torch.Generator().manual_seed(episode.seed)
    num, means = len(episode.patients), []

    def candidates() -> Design:
        spread = design_of_unit(engine.draw(NUM_SPREAD))
        spread = Design(*(head.expand(num, *head.shape) for head in spread))
        tried = Design(*(torch.stack(heads, 1) for heads in zip(*episode.tried, strict=True)))
        best = _picked(tried, torch.stack(episode.scores, 1).argmax(1, keepdim=True))
        near = [_near(best, 128, size, generator) for size in (0.2, 0.05)]
        near.append(_near(peaks, 16, 0.05, generator))
        return Design(*(torch.cat(x, 1) for x in zip(spread, peaks, *near, strict=True)))

    def choose(obs: Tensor) -> Design:
        used, k = episode.used[:, None], len(episode.tried)
        if k < first.polymer_id.shape[1]:
            chosen = Design(*(head[:, k : k + 1] for head in first))
        else:
            every = candidates()
            expected = mean(every, used)
            x = torch.stack([_point(design) for design in episode.tried], 1)
            score, known = torch.stack(episode.scores, 1), torch.cat(means, 1)
            if scale is None:  # as of scores with mean 0 and deviation 1
                known, unit = score.mean(1, keepdim=True).expand_as(score), score.std(1)
                expected = known[:, :1].expand(every.polymer_id.shape)
            else:
                unit = scale
            goal = (score.amax(1, keepdim=True) - expected) / unit[:, None]
            left = (score - known) / unit[:, None]
            rows = zip(x, left.double(), _point(every), goal.double(), strict=True)
            index = [_most_promising(*row) for row in rows]
            chosen = _picked(every, torch.tensor(index)[:, None])
        means.append(mean(chosen, used))
        return Design(*(head[:, 0] for head in chosen))

    return choose


def _point(design: Design) -> Tensor:
    """(..., 6) float64 point of a design: shares of the box, share of coverage, polymer."""
    share = (design.formulation - LOW) / (HIGH - LOW)
    level = design.coverage / (NUM_COVERAGES - 1)
    return torch.cat([share, torch.stack([level, design.polymer_id], -1)], -1).double()


def _most_promising(x: Tensor, y: Tensor, every: Tensor, goal: Tensor) -> int:
    """Candidate of the largest expected improvement [Ament2023].

    Args:
        x: (T, 6) points tried.
        y: (T,) what was measured there, in deviations from the prior mean.
        every: (M, 6) candidates.
        goal: (M,) what each must exceed to be the best, likewise.
    """
    from botorch.acquisition import LogExpectedImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import MixedSingleTaskGP
    from gpytorch.mlls import ExactMarginalLogLikelihood

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of data that are not standardised, and of a second fit
        torch.manual_seed(0)  # a second attempt at a fit draws its start
        model = MixedSingleTaskGP(x, y[:, None], [5])
        mll = ExactMarginalLogLikelihood(model.likelihood, model)
        fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": 50}})
        with torch.no_grad():
            gain = LogExpectedImprovement(model, goal[:, None])(every[:, None])
    is_known = (every[:, None] == x).all(-1).any(-1)
    return int(gain.masked_fill(is_known, -torch.inf).argmax())
