"""Searches that see nothing but rewards; each spends its whole budget.

A search is a function of an objective and a seed. The design space is six-dimensional and mixed: 24
polymers without an order, four coverage levels with one, four formulation parameters in a box.
Libraries beyond torch are imported where they are used, so that a method needs only its own.

References:
    [Hansen2001] Hansen, Ostermeier. Completely derandomized self-adaptation in evolution
    strategies. Evol Comput 9:159. Implementation: the `cma` package.
    [Bergstra2011] Bergstra et al. Algorithms for hyper-parameter optimization. NeurIPS 2011.
    [Balandat2020] Balandat et al. BoTorch. NeurIPS 2020.
    [Ament2023] Ament et al. Unexpected improvements to expected improvement. NeurIPS 2023.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from quality.baselines.objective import PatientObjective, design_at
from torch import Tensor

from hydrogel_gym.problem.fields import COVERAGES, FORMULATION_FIELDS, Design
from hydrogel_gym.problem.polymers import NUM_POLYMERS

DIM = len(FORMULATION_FIELDS)
NUM_COVERAGES = len(COVERAGES)


def random_search(objective: PatientObjective, seed: int) -> None:
    """Uniform over polymers, coverages and the formulation box."""
    generator = torch.Generator().manual_seed(seed)
    objective(design_of_unit(torch.rand(objective.remaining, DIM + 2, generator=generator)))


def sobol_search(objective: PatientObjective, seed: int) -> None:
    """Scrambled Sobol sequence in six dimensions, the first two cut into equal categories."""
    engine = torch.quasirandom.SobolEngine(DIM + 2, scramble=True, seed=seed)
    objective(design_of_unit(engine.draw(objective.remaining)))


def design_of_unit(unit: Tensor) -> Design:
    """Designs of (B, 6) points in [0, 1]: polymer, coverage, formulation."""
    return design_at(
        unit[:, 2:], category(unit[:, 0], NUM_POLYMERS), category(unit[:, 1], NUM_COVERAGES)
    )


def category(unit: Tensor, count: int) -> Tensor:
    """(B,) int64 category of values in [0, 1], cut into `count` equal parts."""
    return (unit * count).long().clamp(0, count - 1)


STAGNANT_GENERATIONS = 25
LEAST_GAIN = 0.01  # of the reward, which is of order 10


def cma_es(objective: PatientObjective, seed: int) -> None:
    """CMA-ES [Hansen2001] on 29 variables, restarted at random when it stagnates.

    The variables are the formulation, the coverage (an ordered level, rounded) and a score per
    polymer, the largest of which is chosen. On patients of the training cohort this was ahead of
    the package's integer variables, which take the polymers' arbitrary order for a scale, and of a
    run per polymer with successive halving. The package's own criteria end a run late here, since
    the penalties keep the rewards of a generation apart.
    """
    import cma

    rng = np.random.default_rng(seed)
    start = np.full(DIM + 1 + NUM_POLYMERS, 0.5)
    while objective.remaining:
        options = {"bounds": [0, 1], "tolfun": 1e-3, "tolfunhist": 1e-3}
        options |= {"seed": int(rng.integers(1, 2**31)), "verbose": -9, "verb_log": 0}
        best, stagnant = -np.inf, 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on options and on the end of a run
            strategy = cma.CMAEvolutionStrategy(start, 0.15, options)
            while objective.remaining and stagnant < STAGNANT_GENERATIONS and not strategy.stop():
                proposed = strategy.ask()
                unit = torch.from_numpy(np.asarray(proposed[: objective.remaining])).float()
                polymer_id, level = unit[:, DIM + 1 :].argmax(-1), unit[:, DIM]
                rewards = objective(
                    design_at(unit[:, :DIM], polymer_id, category(level, NUM_COVERAGES))
                )
                if len(rewards) < len(proposed):  # the budget cut the generation short
                    break
                strategy.tell(proposed, (-rewards).tolist())
                top = float(rewards.max())
                stagnant = 0 if top > best + LEAST_GAIN else stagnant + 1
                best = max(best, top)
        start = rng.random(len(start))


def tpe(objective: PatientObjective, seed: int) -> None:
    """Multivariate tree-structured Parzen estimator of Optuna [Bergstra2011]."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sizes = {"polymer_id": NUM_POLYMERS, "coverage": NUM_COVERAGES}
    kind, shares = optuna.distributions, [field.name for field in FORMULATION_FIELDS]
    space = {name: kind.CategoricalDistribution(range(size)) for name, size in sizes.items()}
    space |= {name: kind.FloatDistribution(0.0, 1.0) for name in shares}
    sampler = optuna.samplers.TPESampler(multivariate=True, seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    while objective.remaining:
        trial = study.ask(space)
        share = torch.tensor([[trial.params[name] for name in shares]])
        chosen = (torch.tensor([trial.params[name]]) for name in sizes)
        study.tell(trial, objective(design_at(share, *chosen)).item())


NUM_INITIAL = 20  # Sobol designs before the first model
RAW_PER_PAIR = 16  # formulations at which the acquisition is scored for every pair
NUM_POLISHED = 3  # pairs whose acquisition is maximised by gradient


def botorch_bo(objective: PatientObjective, seed: int) -> None:
    """Bayesian optimisation with BoTorch [Balandat2020]: Gaussian process and LogEI [Ament2023].

    The process (`MixedSingleTaskGP`) sees the formulation, the coverage as a number, since its
    levels are ordered, and the polymer as a category. Two departures from the plain loop keep a
    call below a second on one core: `optimize_acqf_mixed` polishes only the pairs of polymer and
    coverage that lead on raw samples of all 96, scored in one batch; and each fit starts from the
    last one and takes few steps.
    """
    from botorch.acquisition import LogExpectedImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import MixedSingleTaskGP
    from botorch.models.transforms import Standardize
    from gpytorch.mlls import ExactMarginalLogLikelihood

    def rewards(x: Tensor) -> Tensor:
        coverage = (x[:, DIM] * (NUM_COVERAGES - 1)).round()
        return objective(design_at(x[:, :DIM], x[:, DIM + 1].round(), coverage)).double()[:, None]

    engine = torch.quasirandom.SobolEngine(DIM + 2, scramble=True, seed=seed)
    unit = engine.draw(min(NUM_INITIAL, objective.remaining))
    polymer_id, coverage = category(unit[:, 0], NUM_POLYMERS), category(unit[:, 1], NUM_COVERAGES)
    chosen = torch.stack([coverage / (NUM_COVERAGES - 1), polymer_id], -1)
    x = torch.cat([unit[:, 2:], chosen], -1).double()
    y = rewards(x)
    raw_engine = torch.quasirandom.SobolEngine(DIM, scramble=True, seed=seed)
    fitted: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit or a line search that had to try again
        torch.manual_seed(seed)  # a second attempt at a fit draws its start
        while objective.remaining:
            model = MixedSingleTaskGP(x, y, [DIM + 1], outcome_transform=Standardize(m=1))
            model.load_state_dict(fitted, strict=False)
            mll = ExactMarginalLogLikelihood(model.likelihood, model)
            fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": 30}})
            # The scale of the rewards is that of the data, not to be carried over.
            state = model.state_dict().items()
            fitted = {name: value for name, value in state if "outcome" not in name}
            acquisition = LogExpectedImprovement(model, best_f=y.max())
            best = _most_promising(acquisition, raw_engine, x[y.argmax(), :DIM])
            x = torch.cat([x, best])
            y = torch.cat([y, rewards(best)])


def _most_promising(
    acquisition: Any, raw_engine: torch.quasirandom.SobolEngine, best_share: Tensor
) -> Tensor:
    """(1, 6) design with the largest acquisition; `best_share` (4,) is the best formulation."""
    from botorch.optim import optimize_acqf_mixed

    pairs = torch.cartesian_prod(
        torch.linspace(0.0, 1.0, NUM_COVERAGES), torch.arange(float(NUM_POLYMERS))
    ).double()
    bounds = torch.tensor([[0.0] * (DIM + 2), [1.0] * (DIM + 1) + [NUM_POLYMERS - 1.0]]).double()
    # Half of the raw formulations cover the box, half lie about the best one so far.
    raw = raw_engine.draw(RAW_PER_PAIR * len(pairs)).view(len(pairs), RAW_PER_PAIR, DIM).double()
    wide, narrow = raw.tensor_split(2, dim=1)
    narrow = (best_share + 0.2 * (narrow - 0.5)).clamp(0.0, 1.0)
    every_pair = pairs[:, None].expand(-1, RAW_PER_PAIR, -1)
    candidates = torch.cat([torch.cat([wide, narrow], 1), every_pair], -1)
    with torch.no_grad():
        score = acquisition(candidates.flatten(0, 1).unsqueeze(1)).view(len(pairs), -1)
    best_score, best_raw = score.max(-1)
    leading = best_score.topk(NUM_POLISHED).indices
    best, _ = optimize_acqf_mixed(
        acquisition,
        bounds,
        q=1,
        num_restarts=NUM_POLISHED,
        fixed_features_list=[dict(enumerate(pair.tolist(), start=DIM)) for pair in pairs[leading]],
        batch_initial_conditions=candidates[leading, best_raw[leading]].unsqueeze(1),
        options={"maxiter": 50},
    )
    return best
