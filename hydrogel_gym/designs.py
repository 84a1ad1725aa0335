"""Many designs for one patient: the grid they lie on, the best of them, and the files they are in.

    out/manifest.json                                       what made the rest
    out/top/patient_id=P0001/designs.parquet                the best, all unlike each other
    out/diverse/patient_id=P0001/designs.parquet            the best of each polymer and coverage
    out/candidates/patient_id=P0001/part-00000.parquet      every design that was tried

A design is given to the precision that a laboratory can keep, `RESOLUTION`, and evaluated as given;
so two designs are the same when all their numbers are. Columns carry the names of the HYDRA-BERT
Stage-2 document, section 5.2, and the safety outcomes beside them. Every outcome is a prediction of
the reward model, for a virtual patient, and no clinical fact.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args
from urllib.parse import quote, unquote

import numpy as np
import torch
from torch import Tensor

from hydrogel_gym.polymers import load_polymers
from hydrogel_gym.spaces import COVERAGES, FORMULATION_FIELDS, NUM_POLYMERS, Outcomes

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SCHEMA = "hydrogel_gym.designs.v1"
DesignTable = Literal["top", "diverse", "candidates"]

RESOLUTION = (0.01, 0.1, 0.001, 0.01)  # kPa, days, S/m, mm; as `FORMULATION_FIELDS`
NUM_LEVELS = tuple(
    round((field.high - field.low) / step) + 1
    for field, step in zip(FORMULATION_FIELDS, RESOLUTION, strict=True)
)
NUM_CELLS = NUM_POLYMERS * len(COVERAGES)  # a cell is a polymer and a coverage

FORMULATION_COLUMNS = ("stiffness_kPa", "degradation_days", "conductivity_S_m", "thickness_mm")
# What a design is known by in numbers; the rows of the arrays below, float32.
NUMBERS = (
    *FORMULATION_COLUMNS,
    "predicted_delta_EF",  # percentage points
    "predicted_stress_reduction",  # %
    "optimal_probability",
    "reward",
    "toxicity_risk",
    "structural_integrity",
    "fibrosis_risk",
)
REWARD = NUMBERS.index("reward")


def on_grid(share: Tensor) -> Tensor:
    """Formulations of `RESOLUTION` nearest to a share of the way through their ranges.

    Args:
        share: (..., 4), 0 to 1.

    Returns:
        (..., 4) in the units of `FORMULATION_FIELDS`.
    """
    columns = zip(share.unbind(-1), FORMULATION_FIELDS, RESOLUTION, NUM_LEVELS, strict=True)
    values = []
    for part, field, step, n in columns:
        # A quotient of whole numbers is the float nearest to the decimal, and prints as it.
        per_unit = round(1.0 / step)
        values.append(((part * (n - 1)).round() + field.low * per_unit) / per_unit)
    return torch.stack(values, dim=-1)


def numbers_of(formulation: Tensor, outcomes: Outcomes, reward: Tensor) -> Tensor:
    """(11, B) rows of `NUMBERS`, from (B, 4), outcomes of (B,) and (B,)."""
    rows = dict(zip(FORMULATION_COLUMNS, formulation.unbind(-1), strict=True))
    rows |= {
        "predicted_delta_EF": outcomes.delta_ef_pct,
        "predicted_stress_reduction": outcomes.stress_reduction_pct,
        "optimal_probability": outcomes.optimal_logit.sigmoid(),
        "reward": reward,
        "toxicity_risk": outcomes.toxicity_risk,
        "structural_integrity": outcomes.structural_integrity,
        "fibrosis_risk": outcomes.fibrosis_risk,
    }
    return torch.stack([rows[name] for name in NUMBERS])


def design_keys(cell: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """(B,) int64, one number for each design of the grid.

    Args:
        cell: (B,) polymer * 4 + coverage.
        numbers: (11, B) or more rows of `NUMBERS`, formulations on the grid.
    """
    keys = cell.astype(np.int64)
    for row, field, step, n in zip(
        numbers, FORMULATION_FIELDS, RESOLUTION, NUM_LEVELS, strict=False
    ):
        keys = keys * n + np.rint((row.astype(np.float64) - field.low) / step).astype(np.int64)
    return keys


class BestDesigns:
    """The designs of largest reward among all that were shown, no two the same.

    Whatever the order they come in and the batches they come in, the result is the same: of equal
    rewards the smaller key is kept.

    Args:
        size: how many to keep.
        per_cell: keep so many of each polymer and coverage instead of all together.
    """

    def __init__(self, size: int, *, per_cell: bool = False) -> None:
        self.size, self.per_cell = size, per_cell
        self.cell = np.empty(0, np.uint8)
        self.numbers = np.empty((len(NUMBERS), 0), np.float32)
        # What a design has to reach to matter, by cell; it only rises.
        self.floor = np.full(NUM_CELLS, -np.inf, np.float32)

    def promising(self, cell: np.ndarray, reward: np.ndarray) -> np.ndarray:
        """Indices of the designs, (B,) each, that may be among the best; safe in any thread."""
        floor = self.floor
        if self.per_cell and self.size == 1:
            # What is worse than another of the same batch is out, however low the floor still is.
            floor = floor.copy()
            np.maximum.at(floor, cell, reward)
        return np.flatnonzero(reward >= (floor[cell] if self.per_cell else floor[0]))

    def add(self, cell: np.ndarray, numbers: np.ndarray) -> None:
        """Show designs: (B,) cells and (11, B) numbers."""
        if not len(cell):
            return
        if not self.per_cell and len(cell) > 16 * self.size:
            # The first designs pass any floor, and telling all of them apart would take as long as
            # making them. Any `size` that are unlike each other are a floor for the rest.
            few = np.argpartition(-numbers[REWARD], 8 * self.size)[: 8 * self.size]
            if len(np.unique(design_keys(cell[few], numbers[:, few]))) >= self.size:
                rows = np.flatnonzero(numbers[REWARD] >= numbers[REWARD, few].min())
                cell, numbers = cell[rows], numbers[:, rows]
        cell = np.concatenate([self.cell, cell])
        numbers = np.concatenate([self.numbers, numbers], axis=1)
        keys = design_keys(cell, numbers)
        _, unlike = np.unique(keys, return_index=True)
        order = unlike[np.lexsort((keys[unlike], -numbers[REWARD, unlike]))]
        if self.per_cell:
            order = order[_rank_within(cell[order]) < self.size]
        else:
            order = order[: self.size]
        self.cell, self.numbers = cell[order], numbers[:, order]
        reward = self.numbers[REWARD]
        if self.per_cell:
            count = np.bincount(self.cell, minlength=NUM_CELLS)
            worst = np.full(NUM_CELLS, np.inf, np.float32)
            np.minimum.at(worst, self.cell, reward)
            self.floor = np.where(count == self.size, worst, -np.inf).astype(np.float32)
        elif len(order) == self.size:
            self.floor = np.full(NUM_CELLS, reward[-1])


def _rank_within(group: np.ndarray) -> np.ndarray:
    """How many of the entries before each are of its group."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    rank = np.arange(len(group)) - np.repeat(starts, np.diff(np.r_[starts, len(group)]))
    result = np.empty_like(rank)
    result[order] = rank
    return result


def arrow_table(cell: np.ndarray, numbers: np.ndarray) -> pa.Table:
    """Designs in the columns of the files; numbers are not copied."""
    import pyarrow as pa

    polymer, coverage = (part.astype(np.int8) for part in np.divmod(cell, len(COVERAGES)))
    columns = {
        "polymer_id": pa.array(polymer),
        "polymer_name": pa.DictionaryArray.from_arrays(polymer, list(load_polymers().names)),
        **{name: pa.array(row) for name, row in zip(NUMBERS[:4], numbers[:4], strict=True)},
        "coverage": pa.DictionaryArray.from_arrays(coverage, list(COVERAGES)),
        **{name: pa.array(row) for name, row in zip(NUMBERS[4:], numbers[4:], strict=True)},
    }
    return pa.table(columns).replace_schema_metadata({"hydrogel_gym": SCHEMA})


def parquet(table: pa.Table) -> pa.Buffer:
    """A Parquet file of one row group, compressed by zstd."""
    import pyarrow as pa
    from pyarrow import parquet as pq

    buffer = pa.BufferOutputStream()
    pq.write_table(
        table,
        buffer,
        row_group_size=len(table) or 1,
        compression="zstd",
        compression_level=1,
        use_dictionary=["polymer_name", "coverage"],
        # Bytes of one significance beside each other: random mantissas leave little else to gain.
        column_encoding=dict.fromkeys(NUMBERS, "BYTE_STREAM_SPLIT"),
        write_statistics=["reward"],  # those of all columns take as long as all the rest
    )
    return buffer.getvalue()


def file_name(patient_id: str) -> str:
    """The patient as part of a file's name, whatever the identifier holds."""
    return quote(patient_id, safe="")


def partition(folder: Path, patient_id: str) -> Path:
    """Folder of a patient's files, in the manner of Hive."""
    return folder / f"patient_id={file_name(patient_id)}"


def load_designs(
    path: str | os.PathLike[str],
    patient_id: str | Iterable[str] | None = None,
    *,
    table: DesignTable = "top",
) -> pd.DataFrame:
    """Read designs back.

    Args:
        path: what `generate_candidates.py` wrote.
        patient_id: one patient, or several; all by default.
        table: `"top"` for the best, `"diverse"` for the best of each polymer and coverage,
            `"candidates"` for all that were tried (13 million a patient, a gigabyte).

    Returns:
        A row per design, in the order of the files: patients by name, of each the best first.

    Raises:
        ValueError: there is no such table, or no such patient in it (offers the nearest).
    """
    import pandas as pd
    from pyarrow import parquet as pq

    if table not in get_args(DesignTable):
        raise ValueError(f"table is {table!r}; allowed: {get_args(DesignTable)}")
    folder = Path(path) / table
    if not folder.is_dir():
        raise ValueError(f"{path} holds no table {table!r}: there is no {folder}")
    have = sorted(unquote(p.name.partition("=")[2]) for p in folder.glob("patient_id=*"))
    wanted = have if patient_id is None else patient_id
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    for each in wanted:
        if each not in have:
            nearest = difflib.get_close_matches(each, have, cutoff=0.0)
            raise ValueError(f"{folder} has no patient {each!r}; nearest: {', '.join(nearest)}")
    parts = []
    for each in wanted:
        for file in sorted(partition(folder, each).glob("*.parquet")):
            # Of the file alone: its folder is no column here.
            part = pq.ParquetFile(file).read().to_pandas()
            part.insert(0, "patient_id", each)
            parts.append(part)
    if not parts:
        raise ValueError(f"{folder} holds no designs of {', '.join(wanted) or 'anybody'} yet")
    designs: pd.DataFrame = pd.concat(parts, ignore_index=True)
    return designs
