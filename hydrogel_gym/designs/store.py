"""The files that the designs of many patients are in.

    out/manifest.json                                       what made the rest
    out/top/patient_id=P0001/designs.parquet                the best, all unlike each other
    out/diverse/patient_id=P0001/designs.parquet            the best of each polymer and coverage
    out/candidates/patient_id=P0001/part-00000.parquet      every design that was tried

`grid` says which designs there are, `schema` what each column is.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args
from urllib.parse import quote, unquote

if TYPE_CHECKING:
    import pandas as pd

DesignTable = Literal["top", "diverse", "candidates"]


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
