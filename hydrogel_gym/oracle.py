"""The best design for each patient: the yardstick that turns a reward into a regret.

    python -m hydrogel_gym.oracle --cohort mine.csv --output best_designs.csv

The safety penalties make the reward jump, and the best designs often lie right at a jump, so the
search takes no gradient: for every polymer and coverage (96 pairs) the formulation box is sampled
with a low-discrepancy sequence [Sobol1967], and differential evolution [Storn1997] refines the best
samples of the pairs that still lead. The whole search is run twice with independent random numbers;
the gap between the two runs is the error bar of the better one. Random numbers are shared by all
patients, so a patient's result does not depend on who else is in the cohort.

References:
    [Sobol1967] Sobol. On the distribution of points in a cube and the approximate evaluation of
    integrals. USSR Comput Math Math Phys 7:86. Scrambled.
    [Storn1997] Storn, Price. Differential evolution. J Glob Optim 11:341. Here the variant
    current-to-best/1/bin.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
import io
import os
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hydrogel_gym import dynamics
from hydrogel_gym.cohort import Cohort, load_cohort
from hydrogel_gym.dynamics import RewardConfig, RewardFunction, compute_reward
from hydrogel_gym.files import write_atomically
from hydrogel_gym.polymers import load_polymers
from hydrogel_gym.reward_model import RewardModel, load_reward_model
from hydrogel_gym.spaces import (
    COVERAGES,
    FORMULATION_FIELDS,
    FORMULATION_HIGH,
    FORMULATION_LOW,
    NUM_POLYMERS,
    Design,
    Outcomes,
)

if TYPE_CHECKING:
    import pandas as pd

PAIRS = tuple(product(range(NUM_POLYMERS), range(len(COVERAGES))))
NUM_SOBOL = 128  # formulations per pair


class Round(NamedTuple):
    """Differential evolution of the leading pairs of a patient."""

    num_pairs: int
    population: int
    generations: int


# Every pair is refined a little before any is dropped: samples alone misjudge a pair whose good
# formulations lie in a thin layer under a safety limit.
ROUNDS = (Round(len(PAIRS), 24, 6), Round(24, 24, 16), Round(6, 24, 40))
CALLS_PER_SEARCH = len(PAIRS) * NUM_SOBOL + sum(
    r.num_pairs * r.population * r.generations for r in ROUNDS
)

DIFFERENTIAL_WEIGHT = (0.4, 0.9)  # drawn afresh for each trial ("dither")
CROSSOVER_RATE = 0.9  # [Storn1997] for parameters that depend on each other

# Batches of another shape, and other devices, round differently; a design must not lose its safety
# to that. The limits are tightened by this much in the search and by nothing in the score.
LIMIT_MARGIN = 1e-5

# Patients searched at once: what fits a core's cache; an accelerator wants more work at a time.
PATIENTS_AT_ONCE = {"cpu": 32}
PATIENTS_AT_ONCE_ELSEWHERE = 1024

NUM_PROBES = 8192  # designs by whose outcomes a reward model is recognised


@dataclass(frozen=True, eq=False)
class BestDesigns:
    """Best design found for each patient of a cohort; tensors on the CPU, P patients.

    Attributes:
        patient_ids: P names.
        design: polymer_id (P,), formulation (P, 4), coverage (P,).
        score: (P,) float32 reward of the design as a first step, novelty bonus included.
        outcomes: what the reward model predicts for it, (P,) each.
        seed_gap: (P,) float32 >= 0, difference between the scores of two independent searches, the
            better of which is `design`.
    """

    patient_ids: tuple[str, ...]
    design: Design
    score: Tensor
    outcomes: Outcomes
    seed_gap: Tensor

    def to_frame(self) -> pd.DataFrame:
        """Table with a row per patient; units are in the column names."""
        # Imported here, as in `cohort`: a table is not needed by whoever only trains.
        import pandas as pd

        names = load_polymers().names
        polymer_id, formulation, coverage = self.design
        return pd.DataFrame(
            {
                "patient_id": self.patient_ids,
                "polymer_id": polymer_id.numpy(),
                "polymer_name": [names[i] for i in polymer_id],
                **{f.name: formulation[:, i].numpy() for i, f in enumerate(FORMULATION_FIELDS)},
                "coverage": [COVERAGES[i] for i in coverage],
                **{name: value.numpy() for name, value in self.outcomes._asdict().items()},
                "reward": self.score.numpy(),
                "reward_seed_gap": self.seed_gap.numpy(),
            }
        )


def best_designs(
    cohort: Cohort | str | os.PathLike[str] | None = None,
    reward_model: str | RewardModel = "mechanistic",
    reward_config: RewardConfig | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> BestDesigns:
    """Search the whole design space for every patient of a cohort, twice.

    Args:
        cohort: as for the environments; the shipped 2,000 by default.
        reward_model: as for the environments.
        reward_config: weights and limits; the source's by default.
        seed: of the two searches.
        device: where to search.
        cache_dir: folder, made if missing, that keeps results by the content of all of the above
            and of the code; a file there that cannot be used is replaced.
        progress: show a bar on standard error.

    Returns:
        The better of the two designs found for each patient.

    Raises:
        ValueError: the cohort is empty, there is no such device, or the reward model returned an
            outcome that is not finite (names patient and design).
        CohortError, RewardModelError: the cohort or the model cannot be loaded.
    """
    cohort, patients, model, config = _problem(cohort, reward_model, reward_config, device)
    entry = None
    if cache_dir is not None:
        entry = _cache_entry(cache_dir, cohort, patients, model, config, seed)
        if (cached := _read_cache(*entry, len(cohort))) is not None:
            return _result(cohort, patients, *cached, model, config)

    chunks: list[tuple[Design, Tensor]] = []
    at_once = PATIENTS_AT_ONCE.get(patients.device.type, PATIENTS_AT_ONCE_ELSEWHERE)
    with tqdm(total=len(cohort), desc="oracle", unit="patient", disable=not progress) as bar:
        for start in range(0, len(cohort), at_once):
            rows = slice(start, start + at_once)
            one, other = (search(patients[rows], model, config, 2 * seed + k) for k in (0, 1))
            ids = cohort.patient_ids[rows]
            scores = [_judge(ids, patients[rows], x, model, config)[0] for x in (one, other)]
            gap = (scores[0] - scores[1]).abs()
            chunks.append((_better(one, other, scores[0] >= scores[1]), gap))
            bar.update(len(ids))
    designs, gaps = zip(*chunks, strict=True)
    design = Design(*map(torch.cat, zip(*designs, strict=True)))
    best = _result(cohort, patients, design, torch.cat(gaps), model, config)
    if entry is not None:
        entry[0].parent.mkdir(parents=True, exist_ok=True)
        _write_cache(*entry, best)
    return best


def cached_best_designs(
    cohort: Cohort | str | os.PathLike[str] | None = None,
    reward_model: str | RewardModel = "mechanistic",
    reward_config: RewardConfig | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    cache_dir: str | os.PathLike[str],
) -> BestDesigns | None:
    """What `best_designs` has kept in `cache_dir` for the same arguments; never searches.

    Returns:
        The designs, or None where there is no file of them that can be used.

    Raises:
        ValueError, CohortError, RewardModelError: as `best_designs`.
    """
    cohort, patients, model, config = _problem(cohort, reward_model, reward_config, device)
    cached = _read_cache(
        *_cache_entry(cache_dir, cohort, patients, model, config, seed), len(cohort)
    )
    return cached and _result(cohort, patients, *cached, model, config)


def _problem(
    cohort: Cohort | str | os.PathLike[str] | None,
    reward_model: str | RewardModel,
    reward_config: RewardConfig | None,
    device: str | torch.device,
) -> tuple[Cohort, Tensor, RewardModel, RewardConfig]:
    """Cohort, its (P, 11) features on the device, reward model and configuration."""
    cohort = cohort if isinstance(cohort, Cohort) else load_cohort(cohort)
    if len(cohort) == 0:
        raise ValueError(f"cohort {cohort.name!r} has no patients; the oracle needs at least one")
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used: {reason}") from error
    model = load_reward_model(reward_model, device)
    patients = cohort.features.to(device, torch.float32)
    return cohort, patients, model, reward_config or RewardConfig()


def _better(one: Design, other: Design, one_is_better: Tensor) -> Design:
    columns = one_is_better.unsqueeze(-1)
    return Design(
        torch.where(one_is_better, one.polymer_id, other.polymer_id),
        torch.where(columns, one.formulation, other.formulation),
        torch.where(one_is_better, one.coverage, other.coverage),
    )


@torch.no_grad()
def search(
    patients: Tensor, reward_model: RewardFunction, config: RewardConfig, seed: int
) -> Design:
    """Best design of each patient in one search; no host read, any device.

    A design whose outcomes are not all finite counts as the best there is, so that it is what the
    caller gets to see.

    Args:
        patients: (P, 11) float32.
        reward_model: the Stage-1 model.
        config: weights and limits.
        seed: of the samples and of the evolution, the same for every patient.

    Returns:
        `Design` of (P,), (P, 4) and (P,) tensors on the patients' device.
    """
    device = patients.device
    num_patients, dim = patients.shape[0], len(FORMULATION_FIELDS)
    generator = torch.Generator().manual_seed(seed)
    low, high = (torch.from_numpy(b).to(device) for b in (FORMULATION_LOW, FORMULATION_HIGH))
    config = config.stricter(LIMIT_MARGIN)

    def judge(pairs: Tensor, share: Tensor) -> Tensor:
        """(P, K, N) scores of formulations (P, K, N, 4), shares of the box, for pairs (P, K, 2)."""
        batch = share.shape[:-1]
        # One batch dimension, as in the environments: not every model broadcasts.
        outcomes = reward_model(
            patients[:, None, None].expand(*batch, -1).reshape(-1, patients.shape[-1]),
            pairs[..., None, 0].expand(batch).reshape(-1),
            torch.lerp(low, high, share).reshape(-1, dim),
            pairs[..., None, 1].expand(batch).reshape(-1),
        )
        score = compute_reward(outcomes, config=config)
        return torch.where(functools.reduce(torch.add, outcomes).isfinite(), score, torch.inf).view(
            batch
        )

    sobol = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(NUM_SOBOL)
    pairs = torch.tensor(PAIRS, device=device).expand(num_patients, -1, -1)
    share = sobol.to(device).expand(num_patients, len(PAIRS), -1, -1)
    score = judge(pairs, share)
    for num_pairs, population, generations in ROUNDS:
        leading = score.amax(-1).topk(num_pairs, dim=1).indices
        pairs = pairs.gather(1, leading[..., None].expand(-1, -1, 2))
        score = score.gather(1, leading[..., None].expand(-1, -1, score.shape[2]))
        share = share.gather(1, leading[..., None, None].expand(-1, -1, *share.shape[2:]))
        score, fittest = score.topk(population, dim=2)
        share = share.gather(2, fittest[..., None].expand(-1, -1, -1, dim))
        for _ in range(generations):
            members = (1, num_pairs, population, 1)
            lowest, highest = DIFFERENTIAL_WEIGHT
            weight = lowest + (highest - lowest) * torch.rand(members, generator=generator)
            crossed = torch.rand((*members[:-1], dim), generator=generator) < CROSSOVER_RATE
            weight, crossed = weight.to(device), crossed.to(device)
            # Two distinct members other than the current one, by rotating the population.
            shifts = 1 + torch.randperm(population - 1, generator=generator)[:2]
            one, other = (share.roll(shift, 2) for shift in shifts.tolist())
            leader = score.argmax(-1)[..., None, None].expand(-1, -1, 1, dim)
            trial = share + weight * (share.gather(2, leader) - share + one - other)
            trial = torch.where(crossed, trial, share).clamp(0.0, 1.0)
            trial_score = judge(pairs, trial)
            accepted = trial_score >= score
            score = torch.where(accepted, trial_score, score)
            share = torch.where(accepted[..., None], trial, share)
    rows = torch.arange(num_patients, device=device)
    leader = score.flatten(1).argmax(-1)
    pair = pairs[rows, leader // score.shape[2]]
    return Design(pair[:, 0], torch.lerp(low, high, share.flatten(1, 2)[rows, leader]), pair[:, 1])


@torch.no_grad()
def _judge(
    patient_ids: tuple[str, ...],
    patients: Tensor,
    design: Design,
    model: RewardModel,
    config: RewardConfig,
) -> tuple[Tensor, Outcomes]:
    """Score and outcomes of one design per patient, as the environments have them.

    Raises:
        ValueError: an outcome is not finite; names patient and design.
    """
    outcomes = model(patients, *design)
    bad = ~torch.stack(outcomes).isfinite().all(0)
    if bad.any():
        row = int(bad.nonzero()[0])
        predicted = {name: value[row].item() for name, value in outcomes._asdict().items()}
        raise ValueError(
            f"the reward model returned {predicted} for patient {patient_ids[row]!r} and the "
            f"design polymer_id={int(design.polymer_id[row])}, "
            f"formulation={design.formulation[row].tolist()}, "
            f"coverage={int(design.coverage[row])}; expected finite outcomes"
        )
    return compute_reward(outcomes, config=config), outcomes


def _result(
    cohort: Cohort,
    patients: Tensor,
    design: Design,
    seed_gap: Tensor,
    model: RewardModel,
    config: RewardConfig,
) -> BestDesigns:
    design = Design(*(part.to(patients.device) for part in design))
    score, outcomes = _judge(cohort.patient_ids, patients, design, model, config)
    return BestDesigns(
        cohort.patient_ids,
        Design(*(part.cpu() for part in design)),
        score.cpu(),
        Outcomes(*(value.cpu() for value in outcomes)),
        seed_gap.cpu(),
    )


def _cache_entry(
    cache_dir: str | os.PathLike[str],
    cohort: Cohort,
    patients: Tensor,
    model: RewardModel,
    config: RewardConfig,
    seed: int,
) -> tuple[Path, str]:
    """File of a result, and the key that it has to carry."""
    key = _content_key(cohort, patients, model, config, seed)
    return Path(cache_dir) / f"oracle-{key[:16]}.parquet", key


@torch.no_grad()
def _content_key(
    cohort: Cohort, patients: Tensor, model: RewardModel, config: RewardConfig, seed: int
) -> str:
    """Hash of everything that a result depends on.

    A reward model can be any callable, so it is known by what it predicts for `NUM_PROBES` designs
    spread over the cohort, and by its weights if it has any.
    """
    digest = hashlib.sha256()

    def add(content: bytes) -> None:
        digest.update(len(content).to_bytes(8, "little") + content)

    for module in (sys.modules[__name__], dynamics):
        add(inspect.getsource(module).encode())
    add(version("hydrogel_gym").encode())
    add((files("hydrogel_gym") / "polymers.csv").read_bytes())
    add("\n".join(cohort.patient_ids).encode())
    add(cohort.features.numpy().tobytes())
    add(f"{config!r} {seed}".encode())

    share = torch.quasirandom.SobolEngine(6, scramble=True, seed=0).draw(NUM_PROBES)
    low, high = torch.from_numpy(FORMULATION_LOW), torch.from_numpy(FORMULATION_HIGH)
    design = Design(
        (share[:, 0] * NUM_POLYMERS).long().clamp(max=NUM_POLYMERS - 1),
        torch.lerp(low, high, share[:, 2:]),
        (share[:, 1] * len(COVERAGES)).long().clamp(max=len(COVERAGES) - 1),
    )
    rows = torch.arange(NUM_PROBES) % len(cohort)
    device = patients.device
    outcomes = model(patients[rows.to(device)], *(part.to(device) for part in design))
    add(torch.stack(outcomes).cpu().numpy().tobytes())
    if isinstance(model, nn.Module):
        for name, value in model.state_dict().items():
            add(name.encode())
            add(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_CACHED = ("polymer_id", *(field.name for field in FORMULATION_FIELDS), "coverage", "seed_gap")


def _write_cache(path: Path, key: str, best: BestDesigns) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    polymer_id, formulation, coverage = best.design
    columns = (polymer_id, *formulation.unbind(-1), coverage, best.seed_gap)
    arrays = [pa.array(column.numpy()) for column in columns]
    schema = pa.schema(
        [(name, array.type) for name, array in zip(_CACHED, arrays, strict=True)],
        metadata={"key": key},
    )
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), buffer)
    write_atomically(path, buffer.getvalue())


def _read_cache(path: Path, key: str, num_patients: int) -> tuple[Design, Tensor] | None:
    """Designs and seed gap of an earlier search with this key, if the file holds them.

    A score is never read but computed again from its design.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read()
        if table.schema.metadata.get(b"key", b"").decode() != key or len(table) != num_patients:
            return None
        # A copy: torch would warn of a read-only array.
        columns = {name: torch.tensor(np.asarray(table[name])) for name in _CACHED}
    except (OSError, KeyError, AttributeError, pa.ArrowException):
        return None
    formulation = torch.stack([columns[field.name] for field in FORMULATION_FIELDS], -1)
    return Design(columns["polymer_id"], formulation, columns["coverage"]), columns["seed_gap"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hydrogel_gym.oracle",
        description="Find the best design for every patient of a cohort and write them as a table.",
    )
    parser.add_argument(
        "--cohort", help="CSV or Parquet table, or train or holdout", default="train"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="table to write, .csv or .parquet"
    )
    parser.add_argument(
        "--reward-model",
        default="mechanistic",
        help="mechanistic, a .pt2 program, a .pt checkpoint or module:factory",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the two searches")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--cache-dir", type=Path, help="folder that keeps results by content")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        if args.output.suffix not in (".csv", ".parquet"):
            raise ValueError(f"--output is {str(args.output)!r}; allowed: a .csv or .parquet file")
        if not args.output.parent.is_dir():
            raise ValueError(f"--output is {str(args.output)!r}, in a folder that does not exist")
        if args.seed < 0:
            raise ValueError(f"--seed is {args.seed}; allowed: 0 or more")
        best = best_designs(
            args.cohort,
            args.reward_model,
            seed=args.seed,
            device=args.device,
            cache_dir=args.cache_dir,
            progress=True,
        )
        frame = best.to_frame()
        if args.output.suffix == ".csv":
            content = frame.to_csv(index=False).encode()
        else:
            content = frame.to_parquet(index=False)
        write_atomically(args.output, content)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    gap = best.seed_gap
    print(
        f"{len(gap)} patients in {time.perf_counter() - start:.1f} s: mean reward "
        f"{best.score.mean():.3f}; two searches agree within 0.02 for "
        f"{100 * (gap <= 0.02).float().mean():.1f} % of them (largest gap {gap.max():.4f})"
    )
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
