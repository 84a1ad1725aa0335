"""Results of the oracle by their content: the same question is searched once.

A file carries the hash of everything that its result depends on, and is of no use to any other.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hydrogel_gym.files import write_atomically
from hydrogel_gym.models.contract import RewardModel
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


def cache_entry(
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


def sources() -> list[Traversable]:
    """Code that a result depends on: the whole problem, and the whole oracle."""
    rooms = [files("hydrogel_gym") / name for name in ("problem", "oracle")]
    every = [file for room in rooms for file in sorted(room.iterdir(), key=lambda f: f.name)]
    return [file for file in every if file.name.endswith(".py")]


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

    for source in sources():
        add(source.read_bytes())
    add(version("hydrogel_gym").encode())
    add((files("hydrogel_gym") / "polymers.csv").read_bytes())
    add("\n".join(cohort.patient_ids).encode())
    add(cohort.features.numpy().tobytes())
    add(f"{config!r} {seed}".encode())

    dim = 2 + len(FORMULATION_FIELDS)
    share = torch.quasirandom.SobolEngine(dim, scramble=True, seed=0).draw(NUM_PROBES)
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


def _digest(arrays: Iterable[Any]) -> str:
    """Hash of the numbers of columns."""
    content = b"".join(np.asarray(array).tobytes() for array in arrays)
    return hashlib.sha256(content).hexdigest()


def write_cache(path: Path, key: str, design: Design, seed_gap: Tensor) -> None:
    """Keep the designs of a search, and the gap between its two halves."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    polymer_id, formulation, coverage = design
    columns = (polymer_id, *formulation.unbind(-1), coverage, seed_gap)
    arrays = [pa.array(column.numpy()) for column in columns]
    schema = pa.schema(
        [(name, array.type) for name, array in zip(_CACHED, arrays, strict=True)],
        metadata={"key": key, "content": _digest(arrays)},
    )
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), buffer)
    write_atomically(path, buffer.getvalue())


def read_cache(path: Path, key: str, num_patients: int) -> tuple[Design, Tensor] | None:
    """Designs and seed gap of an earlier search with this key, if the file has them.

    A score is never read but computed again from its design. A damaged file is none.
    """
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read()
        about = {name.decode(): text.decode() for name, text in table.schema.metadata.items()}
        arrays = [table[name].combine_chunks() for name in _CACHED]
        if about["key"] != key or about["content"] != _digest(arrays) or len(table) != num_patients:
            return None
        # A copy: torch would warn of a read-only array.
        columns = {
            name: torch.tensor(np.asarray(array))
            for name, array in zip(_CACHED, arrays, strict=True)
        }
    except Exception:  # whatever the reader raises of a damaged file
        return None
    formulation = torch.stack([columns[field.name] for field in FORMULATION_FIELDS], -1)
    return Design(columns["polymer_id"], formulation, columns["coverage"]), columns["seed_gap"]
