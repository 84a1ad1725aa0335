"""How good the presets are, and which choices matter: one change at a time, over seeds.

    python benchmark/learning_quality.py --seeds 1 2 3

Runs the trainer once per variant and seed, each on one thread, `--processes` at a time, and writes
`results/learning_quality.csv` and `.md`, and the two pictures of the quick preset's first run.
Whole presets come first; then short runs, the quick preset with half its samples and one change.
Runs that the table already has are kept: after a change of the algorithm pass `--fresh`. A
variant is a set of the trainer's flags, or a replacement for one named piece of it, below.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from hydrogel_gym.files import write_atomically
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.runs.directory import CURVE_FILE, METRICS_FILE, SELECTION_FILE, SUMMARY_FILE
from hydrogel_gym.train import ppo_hybrid as trainer

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
ORACLE_CACHE = ROOT / "runs" / "oracle"
MILESTONE_REWARD = 29.2  # the source's final mean reward
MILESTONE = "samples_to_29.2"


class Variant(NamedTuple):
    """Flags on top of a preset, and a change to the trainer's module before it runs."""

    flags: tuple[str, ...] = ()
    patch: Callable[[], None] | None = None
    preset: str = "quick"
    short: bool = True  # half the samples of the quick preset


class SquashedBeta(NamedTuple):
    """Distribution of 2x - 1 for x ~ Beta, kept before an inverse tanh as the trainer expects."""

    beta: torch.distributions.Beta

    def median(self) -> Tensor:
        """Mean, which a Beta of concentrations above 1 has near its median."""
        return self._presquash(self.beta.mean)

    def sample(self, normal: Tensor) -> Tensor:
        """(B, d); torch samples a Beta from its global generator only, not from given numbers."""
        return self._presquash(self.beta.sample())

    def logprob(self, u: Tensor) -> Tensor:
        """(B,) log-density on [-1, 1]^d."""
        return (self.beta.log_prob(self._share(u)) - math.log(2.0)).sum(-1)

    def entropy(self) -> Tensor:
        """(B,) entropy."""
        return (self.beta.entropy() + math.log(2.0)).sum(-1)

    @staticmethod
    def _share(u: Tensor) -> Tensor:
        return ((u.tanh() + 1.0) / 2.0).clamp(1e-6, 1.0 - 1e-6)

    @staticmethod
    def _presquash(x: Tensor) -> Tensor:
        return torch.atanh(2.0 * x.clamp(1e-6, 1.0 - 1e-6) - 1.0)


class BetaAgent(trainer.Agent):
    """Beta instead of a squashed Gaussian; concentrations are 1 + softplus of the outputs."""

    def formulation_distribution(
        self, hidden: Tensor, polymer_id: Tensor, coverage: Tensor
    ) -> SquashedBeta:
        """Distribution of the formulation."""
        a, b = self.formulation_head(hidden, polymer_id).split(self.formulation_dim, -1)
        # Without validation, which reads values on the host.
        return SquashedBeta(
            torch.distributions.Beta(1 + F.softplus(a), 1 + F.softplus(b), validate_args=False)
        )


class PairAgent(trainer.Agent):
    """A block of formulation outputs for each pair of polymer and coverage."""

    def __init__(self, *, num_polymers: int, num_coverages: int, **kwargs: Any) -> None:
        super().__init__(num_polymers=num_polymers, num_coverages=num_coverages, **kwargs)
        hidden, outputs = trainer.HEAD_WIDTHS[1], 2 * self.formulation_dim
        pairs = num_polymers * num_coverages
        self.formulation_head = trainer.Head(hidden, outputs, std=0.01, num_contexts=pairs)
        self.num_coverages = num_coverages

    def formulation_distribution(
        self, hidden: Tensor, polymer_id: Tensor, coverage: Tensor
    ) -> trainer.SquashedNormal:
        """Distribution of the formulation."""
        pair = polymer_id * self.num_coverages + coverage
        return super().formulation_distribution(hidden, pair, coverage)


class EmbeddingHead(nn.Module):
    """The category as an embedding added to the hidden layer, as appending it one-hot would."""

    def __init__(self, hidden_dim: int, out_dim: int, *, std: float, num_contexts: int = 1) -> None:
        super().__init__()
        # A weight that nothing uses would have no gradient.
        self.context = nn.Embedding(num_contexts, hidden_dim) if num_contexts > 1 else None
        self.out = trainer.layer_init(nn.Linear(hidden_dim, out_dim), std)

    def forward(self, hidden: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, out_dim)."""
        if self.context is not None:
            hidden = hidden + self.context(context)
        return self.out(hidden.relu())


def replaced(name: str, value: Any) -> Callable[[], None]:
    """A change of the trainer's module: one of its names."""
    return functools.partial(setattr, trainer, name, value)


def decaying_entropy() -> None:
    """Entropy coefficient from its initial value to zero, linearly."""
    plain, count = trainer.gradient_step, itertools.count()

    def gradient_step(
        agent: nn.Module,
        optimizer: torch.optim.Optimizer,
        args: trainer.Args,
        minibatch: trainer.Batch,
        average: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        coefficient = args.ent_coef * (1.0 - next(count) / (args.num_updates - 1))
        args = dataclasses.replace(args, ent_coef=coefficient)
        return plain(agent, optimizer, args, minibatch, average)

    trainer.gradient_step = gradient_step


def scaled_advantages() -> None:
    """Advantages in units of the untrained policy's returns, and no other normalisation."""
    plain = trainer.rollout

    def rollout(envs: Any, agent: trainer.Agent, *args: Any) -> tuple:
        obs, batch, infos = plain(envs, agent, *args)
        if agent.return_std == 1.0:  # first iteration
            agent.set_return_scale(batch.returns)
        return obs, batch._replace(advantage=batch.advantage / agent.return_std), infos

    trainer.rollout = rollout
    trainer.normalize_advantage = lambda advantage: advantage


SHORT = ("--num-iterations", "50")
SHORT_TITLE = "Short runs: the quick preset with half its samples, and one change"
TRUE_SAFETY = ("--limit-margin", "0", "--penalty-scale", "1")
PRESETS = {
    "quick": Variant(short=False),
    "quick, compiled": Variant(("--compile", "on"), short=False),
    "quick, true safety limits and penalties": Variant(TRUE_SAFETY, short=False),
    "full": Variant(preset="full", short=False),
}
CHANGES = {
    "none": Variant(),
    "factored heads": Variant(("--policy", "factored")),
    "formulation sees polymer and coverage": Variant(patch=replaced("Agent", PairAgent)),
    "heads see the polymer as an added embedding": Variant(patch=replaced("Head", EmbeddingHead)),
    "one learned spread per polymer": Variant(("--no-state-std",)),
    "factored heads, one learned spread": Variant(("--policy", "factored", "--no-state-std")),
    "Beta distribution": Variant(patch=replaced("Agent", BetaAgent)),
    "entropy coefficient 0.03": Variant(("--ent-coef", "0.03")),
    "entropy coefficient decays to 0": Variant(patch=decaying_entropy),
    "advantages scaled, not normalised": Variant(patch=scaled_advantages),
    "value loss of weight 0.5, the source's": Variant(("--vf-coef", "0.5")),
    "value loss of weight 5": Variant(("--vf-coef", "5")),
    "rollouts of 1 step": Variant(("--num-steps", "1", "--num-iterations", "100")),
    "rollouts of 5 steps": Variant(("--num-steps", "5", "--num-iterations", "20")),
    "rollouts of 10 steps": Variant(("--num-steps", "10", "--num-iterations", "10")),
    "learning rate 1e-3": Variant(("--learning-rate", "1e-3")),
    "minibatches of 500": Variant(("--minibatch-size", "500")),
    "minibatches of 2,000": Variant(("--minibatch-size", "2000")),
    "2 epochs": Variant(("--num-epochs", "2")),
    "clipped value loss": Variant(("--clip-vloss",)),
    "width 512": Variant(("--hidden-dim", "512")),
    "width 128": Variant(("--hidden-dim", "128")),
    "true safety limits and penalties": Variant(TRUE_SAFETY),
}
VARIANTS = PRESETS | CHANGES

FIGURES = (
    "train_deterministic_reward",
    "train_fraction_of_oracle",
    "holdout_deterministic_reward",
    "holdout_regret",
    "holdout_regret_p95",
    "holdout_fraction_of_oracle",
    "train_deterministic_limit_breach_rate",
    "holdout_deterministic_limit_breach_rate",
    "mean_reward",
    "samples",
    "wall_seconds",
)


def work(name: str, seed: int, folder: Path) -> int:
    """Train one variant in this process; returns the trainer's exit code."""
    variant = VARIANTS[name]
    if variant.patch:
        variant.patch()
    flags = ["--preset", variant.preset, "--seed", str(seed), "--output-dir", str(folder / "run")]
    flags += ["--compile", "off"]  # changed pieces are those of the plain path
    return trainer.main([*flags, *(SHORT if variant.short else ()), *variant.flags])


def run(name: str, seed: int) -> dict[str, object]:
    """Figures of one run, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        # The oracle's results lie beside a run; every run shares one folder of them.
        Path(folder, "oracle").symlink_to(ORACLE_CACHE)
        command = [sys.executable, __file__, "--work", name, str(seed), folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(
            command,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        output = Path(folder, "run")
        summary = json.loads((output / SUMMARY_FILE).read_text())
        metrics = pd.read_csv(output / METRICS_FILE)
        if (name, seed) == ("quick", 1):
            for picture in (CURVE_FILE, SELECTION_FILE):
                shutil.copy(output / picture, RESULTS / f"quick_{picture}")
    reached = metrics.loc[metrics["train_deterministic_reward"] >= MILESTONE_REWARD, "global_step"]
    figures = {key: summary[key] for key in FIGURES}
    return figures | {MILESTONE: reached.min() if len(reached) else math.nan}


def table(rows: pd.DataFrame) -> str:
    """The tables of the means over the seeds, presets first."""
    lines = [
        "Deterministic policy, mean over the seeds, ± standard deviation for the regret; CPU, one "
        "thread per run, two runs at a time; made by `benchmark/learning_quality.py`."
    ]
    for title, names in (
        ("Presets", PRESETS),
        (SHORT_TITLE, CHANGES),
    ):
        group = rows[rows["variant"].isin(names)]
        lines += ["", f"## {title}", "", *HEADER]
        lines += [line(name, runs) for name, runs in group.groupby("variant", sort=False)]
    lines += [
        "",
        "Samples to 29.2: of the slowest seed, until the mean reward on the training cohort first "
        "reached the source's final mean, looked at after each iteration.",
    ]
    return "\n".join(lines) + "\n"


HEADER = (
    "| | seeds | samples | reward, training | reward, held out | of oracle, held out "
    "| regret, held out | 95th percentile | breaks a limit, held out (worst seed) "
    "| breaks a limit, training | samples to 29.2 | seconds |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
)


def line(name: str, runs: pd.DataFrame) -> str:
    """Row of a variant."""
    mean = runs.mean(numeric_only=True)
    breach = runs["holdout_deterministic_limit_breach_rate"]
    milestone = f"{runs[MILESTONE].max() / 1e6:.2f} M" if runs[MILESTONE].notna().all() else "–"
    spread = f" ± {runs['holdout_regret'].std():.3f}" if len(runs) > 1 else ""
    return (
        f"| {name} | {len(runs)} | {mean['samples'] / 1e6:.1f} M "
        f"| {mean['train_deterministic_reward']:.2f} "
        f"| {mean['holdout_deterministic_reward']:.2f} "
        f"| {100 * mean['holdout_fraction_of_oracle']:.2f} % "
        f"| {mean['holdout_regret']:.3f}{spread} "
        f"| {mean['holdout_regret_p95']:.2f} "
        f"| {100 * breach.mean():.2f} % ({100 * breach.max():.1f} %) "
        f"| {100 * mean['train_deterministic_limit_breach_rate']:.2f} % "
        f"| {milestone} | {mean['wall_seconds']:.0f} |"
    )


def main() -> None:
    """Run what the table lacks and write it again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="repeat runs that the table has")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        name, seed, folder = args.work
        sys.exit(work(name, int(seed), Path(folder)))

    path = RESULTS / "learning_quality.csv"
    rows = []
    if path.exists() and not args.fresh:
        rows = pd.read_csv(path).drop(columns="trainer", errors="ignore").to_dict("records")
    done = {(row["variant"], row["seed"]) for row in rows}
    jobs = [(v, s) for s in args.seeds for v in args.variants if (v, s) not in done]
    order = list(VARIANTS)
    torch.set_num_threads(1)
    # Before the runs, so that they find its results instead of searching all at once.
    for cohort in ("train", "holdout"):
        best_designs(cohort, cache_dir=ORACLE_CACHE, progress=True)
    with ThreadPoolExecutor(args.processes) as pool, tqdm(total=len(jobs), unit="run") as bar:

        def finish(job: tuple[str, int]) -> None:
            figures = run(*job)
            rows.append({"variant": job[0], "seed": job[1]} | figures)
            rows.sort(key=lambda row: (order.index(row["variant"]), row["seed"]))
            frame = pd.DataFrame(rows)
            write_atomically(path, frame.to_csv(index=False).encode())
            write_atomically(path.with_suffix(".md"), table(frame).encode())
            bar.update()

        list(pool.map(finish, jobs))
    print(table(pd.DataFrame(rows)))


if __name__ == "__main__":
    main()
