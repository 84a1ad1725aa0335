"""The best design of every patient, with the error bar of its search.

The whole search is run twice with independent random numbers; the gap between the two runs is the
error bar of the better one.
"""

from __future__ import annotations

import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from hydrogel_gym.errors import first_line
from hydrogel_gym.files import remove_unfinished, write_atomically
from hydrogel_gym.models.contract import RewardModel, load_reward_model
from hydrogel_gym.oracle.cache import (
    StoredDesigns,
    cache_file,
    content_key,
    designs_file,
    places,
    read_designs,
)
from hydrogel_gym.oracle.search import search
from hydrogel_gym.problem.cohort import Cohort, load_cohort
from hydrogel_gym.problem.fields import COVERAGES, FORMULATION_FIELDS, Design, Outcomes
from hydrogel_gym.problem.polymers import load_polymers
from hydrogel_gym.problem.reward import RewardConfig, compute_reward

if TYPE_CHECKING:
    import pandas as pd


# Patients searched at once by a thread: a tensor of their designs nearly fits a core's cache. An
# accelerator wants more work at a time.
PATIENTS_AT_ONCE = 128
PATIENTS_OF_ALL_THREADS = 256  # or so: each takes some 6 MB
PATIENTS_AT_ONCE_ELSEWHERE = 1024
# What stored designs may score otherwise than when they were stored: a hundred roundings.
SAME_SCORE = 1e-3


@dataclass(frozen=True, eq=False)
class BestDesigns:
    """Best design found for each patient of a cohort; tensors on the CPU, P patients.

    Attributes:
        patient_ids: P names.
        design: polymer_id (P,), formulation (P, D), coverage (P,).
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

    def to_file(self, key: str) -> bytes:
        """The file that keeps these designs under a key; see `cache`."""
        stored = StoredDesigns(self.design, self.score, self.seed_gap)
        return designs_file(key, self.patient_ids, stored)


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
    """The best design of every patient of a cohort: shipped, kept, or searched now.

    Shipped are those of the two shipped cohorts by the built-in model, with the default weights and
    limits and seed 0; see `patients/README.md`.

    Args:
        cohort: as for the environments; the shipped 2,000 by default.
        reward_model: as for the environments.
        reward_config: weights and limits; the source's by default.
        seed: of the two searches.
        device: where to search.
        cache_dir: folder, made if missing, that keeps results by the content of all of the above
            and of the code; a file there that cannot be used is replaced, and a folder that cannot
            be written to costs a warning.
        progress: show a bar on standard error.

    Returns:
        The better of the two designs found for each patient.

    Raises:
        ValueError: the cohort is empty, there is no such device, or the reward model returned an
            outcome that is not finite (names patient and design).
        CohortError, RewardModelError: the cohort or the model cannot be loaded.
    """
    cohort, patients, model, config = _problem(cohort, reward_model, reward_config, device)
    key = content_key(cohort, patients, model, config, seed)
    if (known := _known(cohort, patients, model, config, key, cache_dir)) is not None:
        return known
    best = search_designs(cohort, model, config, seed=seed, device=device, progress=progress)
    if cache_dir is not None:
        path = cache_file(key, cache_dir)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_unfinished(path.parent)
            write_atomically(path, best.to_file(key))
        except OSError as error:  # the result is there all the same
            why = first_line(error)
            print(f"warning: the oracle's result could not be kept: {why}", file=sys.stderr)
    return best


def cached_best_designs(
    cohort: Cohort | str | os.PathLike[str] | None = None,
    reward_model: str | RewardModel = "mechanistic",
    reward_config: RewardConfig | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    cache_dir: str | os.PathLike[str] | None = None,
) -> BestDesigns | None:
    """What is shipped, or kept in `cache_dir`, for these arguments of `best_designs`; no search.

    Returns:
        The designs, or None where there is no file of them that can be used.

    Raises:
        ValueError, CohortError, RewardModelError: as `best_designs`.
    """
    cohort, patients, model, config = _problem(cohort, reward_model, reward_config, device)
    key = content_key(cohort, patients, model, config, seed)
    return _known(cohort, patients, model, config, key, cache_dir)


def search_designs(
    cohort: Cohort | str | os.PathLike[str] | None = None,
    reward_model: str | RewardModel = "mechanistic",
    reward_config: RewardConfig | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> BestDesigns:
    """Search the whole design space twice, as `best_designs` does for what it has no file of."""
    cohort, patients, model, config = _problem(cohort, reward_model, reward_config, device)
    threads, at_once = 1, PATIENTS_AT_ONCE_ELSEWHERE
    if patients.device.type == "cpu":
        threads = torch.get_num_threads()
        share = math.ceil(min(len(cohort), PATIENTS_OF_ALL_THREADS) / threads)
        at_once = min(PATIENTS_AT_ONCE, share)

    def search_some(start: int) -> tuple[Design, Tensor]:
        rows = slice(start, start + at_once)
        one, other = (search(patients[rows], model, config, 2 * seed + k) for k in (0, 1))
        ids = cohort.patient_ids[rows]
        scores = [_score(ids, patients[rows], x, model, config)[0] for x in (one, other)]
        gap = (scores[0] - scores[1]).abs()
        return _better(one, other, scores[0] >= scores[1]), gap

    chunks = []
    # Single-threaded threads need not wait for each other within every operation.
    with (
        tqdm(total=len(cohort), desc="oracle", unit="patient", disable=not progress) as bar,
        ThreadPoolExecutor(threads, "oracle", torch.set_num_threads, (1,)) as pool,
    ):
        for found in pool.map(search_some, range(0, len(cohort), at_once)):
            chunks.append(found)
            bar.update(len(found[1]))
    designs, gaps = zip(*chunks, strict=True)
    design = Design(*map(torch.cat, zip(*designs, strict=True)))
    return _result(cohort, patients, design, torch.cat(gaps), model, config)


def key_of(cohort: Cohort | str | os.PathLike[str]) -> str:
    """Key of the result for a cohort by the built-in model, with every default."""
    return content_key(*_problem(cohort, "mechanistic", None, "cpu"), seed=0)


def _known(
    cohort: Cohort,
    patients: Tensor,
    model: RewardModel,
    config: RewardConfig,
    key: str,
    cache_dir: str | os.PathLike[str] | None,
) -> BestDesigns | None:
    """The result of a key from a file, if there is one whose designs score what they did."""
    for path in places(key, cache_dir):
        if (stored := read_designs(path, key)) is None:
            continue
        best = _result(cohort, patients, stored.design, stored.seed_gap, model, config)
        if ((best.score - stored.score).abs() <= SAME_SCORE).all():
            return best
    return None


def _problem(
    cohort: Cohort | str | os.PathLike[str] | None,
    reward_model: str | RewardModel,
    reward_config: RewardConfig | None,
    device: str | torch.device,
) -> tuple[Cohort, Tensor, RewardModel, RewardConfig]:
    """Cohort, its (P, C) features on the device, reward model and configuration."""
    cohort = cohort if isinstance(cohort, Cohort) else load_cohort(cohort)
    if len(cohort) == 0:
        raise ValueError(f"cohort {cohort.name!r} has no patients; the oracle needs at least one")
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used: {first_line(error)}") from error
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
def _score(
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
    score, outcomes = _score(cohort.patient_ids, patients, design, model, config)
    return BestDesigns(
        cohort.patient_ids,
        Design(*(part.cpu() for part in design)),
        score.cpu(),
        Outcomes(*(value.cpu() for value in outcomes)),
        seed_gap.cpu(),
    )
