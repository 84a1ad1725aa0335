"""The columns of the files of designs, and which file has which.

One schema per file name: `designs.parquet` and `part-00000.parquet`, of a patient, have `SCHEMA`;
`ranked_designs.parquet`, of all patients, has `RANKED_SCHEMA`. The version is in the metadata of
each file. `COLUMNS` is the one table of both, and a new column is one row of it.

Columns carry the names of the HYDRA-BERT Stage-2 document, section 5.2, and the safety outcomes
beside them. Every outcome is a prediction of the reward model, for a virtual patient, and no
clinical fact.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hydrogel_gym.problem.fields import COVERAGES, FORMULATION_FIELDS, Field, Outcomes
from hydrogel_gym.problem.polymers import load_polymers
from hydrogel_gym.problem.reward import SAFETY, SafetyLimit
from hydrogel_gym.problem.tables import require_pyarrow

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SCHEMA = "hydrogel_gym.designs.v2"
RANKED_SCHEMA = "hydrogel_gym.ranked_designs.v1"
DESIGNS_FILE, PART_FILE, RANKED_FILE = (
    "designs.parquet",
    "part-{:05d}.parquet",
    "ranked_designs.parquet",
)


class Predicted(NamedTuple):
    """Designs and what is predicted of them."""

    formulation: Tensor  # (B, D)
    outcomes: Outcomes  # of (B,)
    reward: Tensor  # (B,)


class Column(NamedTuple):
    """One column of the files."""

    name: str
    meaning: str
    unit: str
    schemas: tuple[str, ...]
    # Of a number that every design is evaluated to: (B,), stored as float32.
    value: Callable[[Predicted], Tensor] | None = None

    @property
    def description(self) -> str:
        """Meaning and unit."""
        return f"{self.meaning}, {self.unit}" if self.unit else self.meaning


BOTH, RANKED = (SCHEMA, RANKED_SCHEMA), (RANKED_SCHEMA,)


def _requested(index: int, field: Field) -> Column:
    meaning, _, unit = field.meaning.rpartition(", ")
    return Column(field.stage2_name, meaning, unit, BOTH, lambda p: p.formulation[..., index])


def _predicted(item: SafetyLimit) -> Column:
    return Column(
        item.outcome, "predicted", "0 to 1", BOTH, lambda p: getattr(p.outcomes, item.outcome)
    )


def _margin(item: SafetyLimit) -> Column:
    difference = "limit less risk" if item.is_ceiling else f"{item.name} less limit"
    return Column(f"{item.name}_margin", f"{difference}; below 0 the limit is broken", "", RANKED)


# In the order of the files. The first twelve are the source's, section 5.2.
COLUMNS = (
    Column("patient_id", "virtual patient", "", BOTH),
    Column("polymer_id", "row of the polymer table", "", BOTH),
    Column("polymer_name", "its name", "", BOTH),
    *(_requested(index, field) for index, field in enumerate(FORMULATION_FIELDS)),
    Column("coverage", "what the patch covers: the scar and a share of the border zone", "", BOTH),
    Column(
        "predicted_delta_EF",
        "predicted change in ejection fraction",
        "percentage points",
        BOTH,
        lambda p: p.outcomes.delta_ef_pct,
    ),
    Column(
        "predicted_stress_reduction",
        "predicted, of border-zone stress",
        "%",
        BOTH,
        lambda p: p.outcomes.stress_reduction_pct,
    ),
    Column(
        "optimal_probability",
        "predicted probability that the design is optimal",
        "0 to 1",
        BOTH,
        lambda p: p.outcomes.optimal_logit.sigmoid(),
    ),
    Column("reward", "of the design as a first step", "dimensionless", BOTH, lambda p: p.reward),
    Column("rank", "among the patient's designs by reward; from 1", "", RANKED),
    *map(_predicted, SAFETY),
    *map(_margin, SAFETY),
    Column(
        "feasibility",
        "how nearly the polymer can be made as requested, 1 within its windows",
        "0 to 1",
        RANKED,
    ),
    Column(
        "window_distance",
        "to the nearest edge of the polymer's windows",
        "share of a whole range",
        RANKED,
    ),
    Column("reward_worst_5pct", "worst reward if each parameter may be missed by 5 %", "", RANKED),
    Column("reward_mean_5pct", "mean reward over the same cases", "", RANKED),
    Column(
        "pareto_rank",
        "1 if none of the patient's designs is better in gain, relief and both risks",
        "",
        RANKED,
    ),
)


def columns_of(schema: str) -> dict[str, Column]:
    """The columns of the files of a schema by their names, in the order of the files."""
    return {column.name: column for column in COLUMNS if schema in column.schemas}


FORMULATION_COLUMNS = tuple(field.stage2_name for field in FORMULATION_FIELDS)
# What a design is known by in numbers; the rows of the arrays below, float32, formulation first.
_VALUES = {column.name: column.value for column in COLUMNS if column.value is not None}
NUMBERS = tuple(_VALUES)
REWARD = NUMBERS.index("reward")


def numbers_of(formulation: Tensor, outcomes: Outcomes, reward: Tensor) -> Tensor:
    """(R, B) rows of `NUMBERS`, from (B, D), outcomes of (B,) and (B,)."""
    predicted = Predicted(formulation, outcomes, reward)
    return torch.stack([value(predicted) for value in _VALUES.values()])


def arrow_table(patient_id: str, cell: np.ndarray, numbers: np.ndarray) -> pa.Table:
    """A patient's designs in the columns of the files; numbers are not copied."""
    import pyarrow as pa

    polymer, coverage = (part.astype(np.int8) for part in np.divmod(cell, len(COVERAGES)))
    columns = {
        # In each file, as text: from the name of a folder readers would make numbers of 7 and 007.
        "patient_id": pa.DictionaryArray.from_arrays(np.zeros_like(polymer), [patient_id]),
        "polymer_id": pa.array(polymer),
        "polymer_name": pa.DictionaryArray.from_arrays(polymer, list(load_polymers().names)),
        "coverage": pa.DictionaryArray.from_arrays(coverage, list(COVERAGES)),
        **{name: pa.array(row) for name, row in zip(NUMBERS, numbers, strict=True)},
    }
    table = pa.table({name: columns[name] for name in columns_of(SCHEMA)})
    return table.replace_schema_metadata({"hydrogel_gym": SCHEMA})


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
        use_dictionary=["patient_id", "polymer_name", "coverage"],
        # Bytes of one significance beside each other: random mantissas leave little else to gain.
        column_encoding=dict.fromkeys(NUMBERS, "BYTE_STREAM_SPLIT"),
        # Those of all columns take as long as all the rest.
        write_statistics=["patient_id", "reward"],
    )
    return buffer.getvalue()


def ranked_parquet(table: pd.DataFrame) -> pa.Buffer:
    """A Parquet file of ranked designs, with the meaning of each column in its metadata.

    Raises:
        UsageError: pyarrow is not installed.
    """
    require_pyarrow("writing ranked designs")
    import pyarrow as pa
    from pyarrow import parquet as pq

    meanings = {name: column.description for name, column in columns_of(RANKED_SCHEMA).items()}
    metadata = {"hydrogel_gym": RANKED_SCHEMA, "columns": json.dumps(meanings)}
    arrow = pa.Table.from_pandas(table[list(meanings)], preserve_index=False)
    buffer = pa.BufferOutputStream()
    pq.write_table(arrow.replace_schema_metadata(metadata), buffer, compression="zstd")
    return buffer.getvalue()
