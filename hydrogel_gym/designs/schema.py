"""The columns of the files of designs, by the name of the file.

Columns carry the names of the HYDRA-BERT Stage-2 document, section 5.2, and the safety outcomes
beside them. Every outcome is a prediction of the reward model, for a virtual patient, and no
clinical fact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hydrogel_gym.problem.fields import COVERAGES, FORMULATION_FIELDS, Outcomes
from hydrogel_gym.problem.polymers import load_polymers

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA = "hydrogel_gym.designs.v1"
FORMULATION_COLUMNS = tuple(field.stage2_name for field in FORMULATION_FIELDS)
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


def numbers_of(formulation: Tensor, outcomes: Outcomes, reward: Tensor) -> Tensor:
    """(R, B) rows of `NUMBERS`, from (B, D), outcomes of (B,) and (B,)."""
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


def arrow_table(cell: np.ndarray, numbers: np.ndarray) -> pa.Table:
    """Designs in the columns of the files; numbers are not copied."""
    import pyarrow as pa

    polymer, coverage = (part.astype(np.int8) for part in np.divmod(cell, len(COVERAGES)))
    named = {name: pa.array(row) for name, row in zip(NUMBERS, numbers, strict=True)}
    formulation = {name: named.pop(name) for name in FORMULATION_COLUMNS}
    columns = {
        "polymer_id": pa.array(polymer),
        "polymer_name": pa.DictionaryArray.from_arrays(polymer, list(load_polymers().names)),
        **formulation,
        "coverage": pa.DictionaryArray.from_arrays(coverage, list(COVERAGES)),
        **named,
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
