"""What learning from checks is worth: regret after each check where the response is hidden.

    python benchmark/quality/adaptive.py --policy runs/adapt-s1    # most of an hour on one core
    python benchmark/quality/adaptive.py --methods ei --patients 20 --seeds 0

Every method checks eight designs of the same held-out patients in `HydrogelAdapt-v0`, with the same
hidden responses, which each seed draws anew. Regret is against the best design under the true
response. Needs `pip install -e ".[bench]"`.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Parser, count, figure, made_by, table, verdict, write
from quality.baselines import adaptive as players
from quality.baselines.objective import CountingModel

from hydrogel_gym import load_cohort
from hydrogel_gym.envs.adaptive import DEFAULT_RESPONSE_SD, noise_deviations
from hydrogel_gym.errors import UsageError
from hydrogel_gym.models.mechanistic import MechanisticModel
from hydrogel_gym.problem.fields import Outcomes
from hydrogel_gym.runs.command_line import run_script
from hydrogel_gym.runs.options import ProblemOptions
from hydrogel_gym.runs.policies import load_policy, policy_path
from hydrogel_gym.train.ppo_hybrid import Agent

HORIZON = 8
DEVIATIONS = dict(zip(Outcomes._fields, (0.5, 2.0, 0.5, 0.01, 0.02, 0.01), strict=True))
NOISE = {"Measured exactly": {}, "Measured with noise": DEVIATIONS}


class Method(NamedTuple):
    """A way to choose what is checked next."""

    label: str
    colour: str  # of the palette of Okabe and Ito, which the colour-blind can distinguish
    make: Any  # of an `Episode`, what chooses the next design of each patient
    patients: int = 10_000
    observe: str = "history"  # of the environment; what it computes for that is counted too


METHODS = {
    "clairvoyant": Method("clairvoyant", "#000000", players.clairvoyant),
    "predicted": Method("best predicted design, no learning", "#888888", players.predicted),
    "in_turn": Method("best predicted polymers in turn", "#999999", players.in_turn),
    "random": Method("random designs", "#BBBBBB", players.random),
    "bo": Method("Bayesian optimisation from scratch", "#0072B2", players.from_scratch, 40),
    "bo_prior": Method("Bayesian optimisation of the residual", "#56B4E9", players.residual, 40),
    "thompson": Method("posterior sampling", "#009E73", players.thompson),
    "mean": Method("posterior mean", "#E69F00", players.posterior_mean),
    "ei": Method("posterior expected improvement", "#CC79A7", players.posterior_improvement),
}
BARS = ("policy", "thompson", "bo", "predicted")


class Runs(NamedTuple):
    """What a method reached for each of the first P patients under each of S responses."""

    regret: Tensor  # (S, P, HORIZON) after each check
    calls: float  # of the reward model per episode, besides the checks
    seconds: float  # of the CPU per episode, reward model included


def regrets(best: Tensor, gained: Tensor) -> Tensor:
    """Regret after each check: what the best score so far lacks of the best there is.

    Args:
        best: (P,) score of the clairvoyant's design, novelty bonus included.
        gained: (P, T) rewards of the mode "improvement", whose sum is the best true score or 0.

    Returns:
        (P, T), falling along a row.
    """
    return best[:, None] - gained.cumsum(-1)


def make_envs(
    num_patients: int, noise: Mapping[str, float], observe: str, compile: bool = False
) -> gym.vector.VectorEnv:
    """An environment for each of the first held-out patients."""
    return gym.make_vec(
        "HydrogelAdapt-v0",
        num_envs=num_patients,
        cohort="holdout",
        horizon=HORIZON,
        outcome_noise=noise,
        output="torch",
        autoreset_mode="Disabled",
        reveal_response=True,
        observe=observe,
        compile=compile,
    )


def play(
    method: Method, num_patients: int, noise: Mapping[str, float], seed: int
) -> tuple[Tensor, players.Episode, float]:
    """An episode of each patient: (P, HORIZON) rewards, what happened, and CPU seconds to choose.

    Patient i is row i of the held-out cohort, and its response is the one that environment i draws.
    """
    # Compiled where its time is counted.
    envs = make_envs(num_patients, noise, method.observe, compile=method.observe != "history")
    obs, info = envs.reset(seed=seed)
    patients = load_cohort("holdout").features[:num_patients].float()
    model = CountingModel(MechanisticModel())
    sds = noise_deviations(noise)
    episode = players.Episode(patients, info["response"], model, DEFAULT_RESPONSE_SD, sds, seed)
    start = time.process_time()
    choose, seconds, rewards = method.make(episode), 0.0, []
    for _ in tqdm(range(HORIZON), desc=method.label, disable=None):
        design = choose(obs)
        chosen = time.process_time()
        obs, reward, _, _, info = envs.step(design._asdict())
        stepped = time.process_time()
        seconds += (chosen if method.observe == "history" else stepped) - start
        start = time.process_time()
        episode.record(design, Outcomes(*(info[name] for name in Outcomes._fields)), info["score"])
        rewards.append(reward)
    envs.close()
    return torch.stack(rewards, -1), episode, seconds


def compared(
    method: Method, best: list[Tensor], noise: Mapping[str, float], seeds: Sequence[int]
) -> Runs:
    """Episodes of a method under the responses of each seed, for which (P,) `best` is the best."""
    num = min(len(best[0]), method.patients)
    played = [play(method, num, noise, seed) for seed in seeds]
    pairs = zip(best, played, strict=True)
    regret = torch.stack([regrets(scores[:num], gained) for scores, (gained, _, _) in pairs])
    calls = sum(episode.model.calls for _, episode, _ in played)
    seconds, episodes = sum(seconds for _, _, seconds in played), num * len(seeds)
    return Runs(regret, calls / episodes, seconds / episodes)


def quartiles(values: Tensor) -> str:
    """Median and interquartile range."""
    low, middle, high = values.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def report(every: dict[str, Runs], methods: Mapping[str, Method]) -> list[str]:
    """The tables of one kind of measurement."""
    means, medians = [], []
    for name, runs in every.items():
        head = [methods[name].label, runs.regret.shape[1]]
        cost = [f"{runs.calls:,.0f}", f"{runs.seconds:.2g}"]
        means.append([*head, *(f"{x:.3f}" for x in runs.regret.mean((0, 1))), *cost])
        medians.append([*head, *map(quartiles, runs.regret.flatten(0, 1).unbind(-1))])
    checks = ["method", "patients", *range(1, HORIZON + 1)]
    return [
        "Mean regret after each check, calls of the reward model and CPU seconds per episode:",
        "",
        *table([*checks, "calls", "seconds"], means),
        "",
        "Median and interquartile range:",
        "",
        *table(checks, medians),
    ]


def bars(every: Mapping[str, Runs], seeds: Sequence[int]) -> list[str]:
    """What a trained policy must reach."""
    policy, base, bo, still = (every[name] for name in BARS)
    few = bo.regret.shape[1]
    each = policy.regret[..., -1].mean(1) / base.regret[..., -1].mean(1)
    regret = last_of(policy) / last_of(base)
    cheap = last_of(policy, few) / last_of(bo, few)
    faster = base.seconds / policy.seconds
    behind = (policy.regret.mean((0, 1)) / still.regret.mean((0, 1)))[1:].max().item()
    of_seeds = "; ".join(f"{seed}: {x:.2f}" for seed, x in zip(seeds, each.tolist(), strict=True))
    rows = [
        [f"posterior sampling ({of_seeds})", f"{regret:.2f}", "1.25", verdict(regret <= 1.25)],
        ["Bayesian optimisation from scratch", f"{cheap:.2f}", "0.5", verdict(cheap <= 0.5)],
        ["no learning, worst from the second check on", f"{behind:.2f}", "1", verdict(behind < 1)],
        ["posterior sampling, in seconds", f"1/{faster:,.0f}", "1/1,000", verdict(faster >= 1000)],
    ]
    head = ["the policy's mean regret beside that of (of each seed)", "ratio", "at most", ""]
    return ["", *table(head, rows)]


def last_of(runs: Runs, size: int | None = None) -> float:
    """Mean regret of the first patients after the last check."""
    return runs.regret[:, :size, -1].mean().item()


def draw(every: Mapping[str, dict[str, Runs]], methods: Mapping[str, Method]) -> Any:
    """Mean regret against checks, a panel for each kind of measurement."""
    picture = figure(11, 4.8)
    panels = picture.subplots(1, len(every), sharey=True, squeeze=False)[0]
    for axes, (title, results) in zip(panels, every.items(), strict=True):
        for name, runs in results.items():
            if name != "clairvoyant":
                line = runs.regret.mean((0, 1)).clamp(min=0.01)
                marker = "o" if name == "policy" else "."
                label, colour, *_ = methods[name]
                axes.plot(range(1, HORIZON + 1), line, color=colour, label=label, marker=marker)
        axes.set(title=title, xlabel="checks", yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("mean regret, points of the reward")
    picture.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return picture


def main(argv: Sequence[str] | None = None) -> None:
    """Play every method and write the tables and the picture."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--policy", type=Path, help="finished run directory of the trainer")
    flag("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="to compare")
    flag("--patients", type=count, default=200, help="held out; at most 40 for bo and bo_prior")
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of responses and methods")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    chosen = {name: METHODS[name] for name in METHODS if name in args.methods}
    if {"bo", "bo_prior"} & {*chosen} and not importlib.util.find_spec("botorch"):
        raise UsageError("botorch is missing: pip install -e '.[bench]'")
    if args.policy:
        agent, saved = load_policy(policy_path(args.policy), Agent, "cpu")
        observe = ProblemOptions.of(saved["training_config"]).observe_when_evaluated or "history"
        (due,) = make_envs(1, {}, observe).single_observation_space.shape
        if (seen := saved["architecture"]["obs_dim"]) != due:
            raise UsageError(f"--policy {args.policy}: it sees {seen} numbers; expected: {due}")
        make = functools.partial(players.policy, agent=agent)
        label = f"trained policy, {args.policy.name}"
        chosen["policy"] = Method(label, "#D55E00", make, observe=observe)
    every = {}
    for title, noise in NOISE.items():
        every[title], knowing = {}, METHODS["clairvoyant"]
        best = [play(knowing, args.patients, noise, seed)[0][:, 0] for seed in args.seeds]
        for name, method in chosen.items():
            every[title][name] = compared(method, best, noise, args.seeds)
    lines = [
        "Regret: the best score under the true response less the best true score so far, points of "
        f"the reward; held-out patients 1 to {args.patients}, `response_sd` {DEFAULT_RESPONSE_SD}, "
        f"responses by seeds {', '.join(map(str, args.seeds))}. Calls and seconds are what "
        "choosing takes; the checks themselves, and the shipped search of the predicted designs, "
        "are not counted, but for a policy that observes samples of the response, whose seconds "
        "are with all that the environment does. Deviations of noise: "
        f"{', '.join(f'{v} of {k}' for k, v in DEVIATIONS.items())}.",
        "",
    ]
    for title, results in every.items():
        lines += [f"## {title}", "", *report(results, chosen)]
        if {*BARS} <= {*results}:
            lines += bars(results, args.seeds)
        lines.append("")
    write(args.output_dir, "adaptive", lines, draw(every, chosen), made_by(1, "botorch"))


if __name__ == "__main__":
    sys.exit(run_script(main))
