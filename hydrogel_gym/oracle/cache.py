"""Results of the oracle by their content: the same question is searched once.

A file carries the hash of everything that its result depends on, and is of no use to any other. It
is a CSV of the designs below one line that has this key and the hash of the rest. The results of
the two shipped cohorts are such files too, made by `patients/make_best_designs.py`.
"""

from __future__ import annotations

import hashlib
import io
import os
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from hydrogel_gym.models.contract import RewardModel
from hydrogel_gym.models.mechanistic import MechanisticModel
from hydrogel_gym.problem.cohort import Cohort
from hydrogel_gym.problem.fields import (
    COVERAGES,
    FORMULATION_FIELDS,
    FORMULATION_HIGH,
    FORMULATION_LOW,
    Design,
)
from hydrogel_gym.problem.polymers import NUM_POLYMERS
from hydrogel_gym.problem.reward import RewardConfig

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

NUM_PROBES = 8192  # designs by whose outcomes a reward model is recognised
SHIPPED_DESIGNS = {"train": "best_designs.csv", "holdout": "best_designs_holdout.csv"}
# What a result depends on; a test holds it to all that these modules import.
SOURCES = (
    "polymers.csv",
    "problem/fields.py",
    "problem/polymers.py",
    "problem/reward.py",
    "problem/streams.py",
    "problem/response.py",
    "models/mechanistic.py",
    "oracle/search.py",
    "oracle/best.py",
)


class StoredDesigns(NamedTuple):
    """What a file of P best designs has."""

    design: Design
    score: Tensor  # (P,) float32, to tell whether the model still is what it was
    seed_gap: Tensor  # (P,) float32


def places(key: str, cache_dir: str | os.PathLike[str] | None) -> list[Path | Traversable]:
    """Files that may have the result of this key; the last is where to keep it, if anywhere."""
    shipped = [files("hydrogel_gym.patients") / name for name in SHIPPED_DESIGNS.values()]
    return shipped if cache_dir is None else [*shipped, cache_file(key, cache_dir)]


def cache_file(key: str, cache_dir: str | os.PathLike[str]) -> Path:
    """File of a folder that keeps the result of this key."""
    return Path(cache_dir) / f"oracle-{key[:16]}.csv"


def content_key(
    cohort: Cohort, patients: Tensor, model: RewardModel, config: RewardConfig, seed: int
) -> str:
    """Hash of everything that a result depends on.

    The built-in model is known by its equations, for the last digits of what they give are another
    processor's, where a shipped file has to be found too. Any other can be any callable, so it is
    known by what it predicts for `NUM_PROBES` designs spread over the cohort, and by its weights if
    it has any.
    """
    parts = [_text(files("hydrogel_gym") / name).encode() for name in SOURCES]
    parts += ["\n".join(cohort.patient_ids).encode(), cohort.features.numpy().tobytes()]
    parts.append(f"{config!r} {seed}".encode())
    known_by = _predictions(model, patients)
    # Not by its type alone: it may have other constants, or hooks.
    if type(model) is not MechanisticModel or known_by != _predictions(
        MechanisticModel().to(patients.device), patients
    ):
        parts += known_by
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


@torch.no_grad()
def _predictions(model: RewardModel, patients: Tensor) -> list[bytes]:
    """What a model predicts for the probes, and its weights."""
    dim = 2 + len(FORMULATION_FIELDS)
    engine = torch.quasirandom.SobolEngine(dim, scramble=True, seed=0)
    share = engine.draw(NUM_PROBES, dtype=torch.float32)
    low, high = torch.from_numpy(FORMULATION_LOW), torch.from_numpy(FORMULATION_HIGH)
    design = Design(
        (share[:, 0] * NUM_POLYMERS).long().clamp(max=NUM_POLYMERS - 1),
        torch.lerp(low, high, share[:, 2:]),
        (share[:, 1] * len(COVERAGES)).long().clamp(max=len(COVERAGES) - 1),
    )
    rows = torch.arange(NUM_PROBES) % len(patients)
    device = patients.device
    outcomes = model(patients[rows.to(device)], *(part.to(device) for part in design))
    found = [torch.stack(outcomes).cpu().numpy().tobytes()]
    if isinstance(model, nn.Module):
        for name, value in model.state_dict().items():
            weights = value.cpu().contiguous().view(-1).view(torch.uint8)
            found += [name.encode(), weights.numpy().tobytes()]
    return found


def _text(path: Path | Traversable) -> str:
    """A text file with the line ends of every system read as one."""
    return path.read_text(encoding="utf-8").replace("\r\n", "\n")


def _heading(key: str, rows: str) -> str:
    return f"# key {key} content {hashlib.sha256(rows.encode()).hexdigest()}"


def designs_file(key: str, patient_ids: tuple[str, ...], stored: StoredDesigns) -> bytes:
    """The file of a result; its numbers have the digits that float32 is read back from exactly."""
    import pandas as pd

    formulation = stored.design.formulation.numpy()
    columns = {
        "patient_id": patient_ids,
        "polymer_id": stored.design.polymer_id.numpy(),
        **{field.name: formulation[:, i] for i, field in enumerate(FORMULATION_FIELDS)},
        "coverage": stored.design.coverage.numpy(),
        "reward": stored.score.numpy(),
        "reward_seed_gap": stored.seed_gap.numpy(),
    }
    rows = pd.DataFrame(columns).to_csv(index=False, float_format="%.9g", lineterminator="\n")
    return f"{_heading(key, rows)}\n{rows}".encode()


def read_designs(path: Path | Traversable, key: str) -> StoredDesigns | None:
    """What the file of an earlier search with this key has; None if it is missing or damaged."""
    import pandas as pd

    try:
        heading, _, rows = _text(path).partition("\n")
    except (OSError, ValueError):
        return None
    if heading != _heading(key, rows):
        return None
    table = pd.read_csv(io.StringIO(rows), dtype={"patient_id": str})

    def numbers(column: str) -> Tensor:
        return torch.tensor(table[column].to_numpy("float32"))

    formulation = torch.stack([numbers(field.name) for field in FORMULATION_FIELDS], -1)
    polymer_id, coverage = (
        torch.tensor(table[name].to_numpy("int64")) for name in ("polymer_id", "coverage")
    )
    design = Design(polymer_id, formulation, coverage)
    return StoredDesigns(design, numbers("reward"), numbers("reward_seed_gap"))
