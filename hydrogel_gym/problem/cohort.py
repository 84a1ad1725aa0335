"""The patient table: which files are read, and what a row must satisfy to be a virtual patient.

Columns, units and ranges are `spaces.PATIENT_FIELDS`; `patients/README.md` describes the shipped
cohorts.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hydrogel_gym.problem.fields import PATIENT_FIELDS
from hydrogel_gym.problem.tables import (
    SUFFIXES,
    TableError,
    clean_identifier,
    identifiers,
    numbers,
    read_table_file,
)

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    import pandas as pd

ID_COLUMN = "patient_id"
FEATURE_COLUMNS = [field.name for field in PATIENT_FIELDS]
SHIPPED = {"train": "cohort.csv", "holdout": "cohort_holdout.csv"}

# Users round their tables, so an identity is checked to the rounding that is usual in print: with
# LVEF in whole percent and volumes in whole mL the shipped cohort is off by up to 1.05 points;
# three significant digits in both factors of the border-zone stress put their product off by up to
# 1 %.
LVEF_TOLERANCE_PP = 1.1
BZ_STRESS_TOLERANCE_FRAC = 0.01
# assumed: scar and border zone share one ventricle with the remote muscle that carries the load.
MAX_SCAR_PLUS_BZ_PCT = 65.0


class CohortError(ValueError):
    """A patient table cannot be used; the message names file, row, column, value and range."""


@dataclass(frozen=True, eq=False)
class Cohort:
    """Virtual patients in table order.

    `load_cohort` checks what it reads; a `Cohort` built by hand is taken as it is.

    Attributes:
        patient_ids: P unique names.
        features: (P, C) float64 on the CPU, columns and units of `PATIENT_FIELDS`.
        extra: P rows of the table's other columns, untouched.
        name: path of the file; "shipped train" or "shipped holdout".
    """

    patient_ids: tuple[str, ...]
    features: Tensor
    extra: pd.DataFrame
    name: str

    def __len__(self) -> int:
        return len(self.patient_ids)

    def index(self, patient_id: str) -> int:
        """Row of a patient.

        Raises:
            ValueError: the cohort has no such patient; the message offers the nearest names.
        """
        if patient_id not in self._row_of:
            patient_id = clean_identifier(patient_id)  # as tables are read
        if patient_id not in self._row_of:
            nearest = difflib.get_close_matches(patient_id, self.patient_ids, cutoff=0.0)
            raise ValueError(
                f"{self.name} has no patient {patient_id!r}; nearest: {', '.join(nearest)}"
            )
        return self._row_of[patient_id]

    def first(self, count: int) -> Cohort:
        """The first patients of the table, or all if there are no more."""
        rows = slice(count)
        return Cohort(self.patient_ids[rows], self.features[rows], self.extra[rows], self.name)

    @cached_property
    def has_whole_number_ids(self) -> bool:
        """Whether any id is a whole number, so that a number may mean an id."""
        return any(patient_id.isdecimal() for patient_id in self.patient_ids)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {patient_id: row for row, patient_id in enumerate(self.patient_ids)}


def load_cohort(path: str | os.PathLike[str] | None = None) -> Cohort:
    """Read and check a patient table.

    Args:
        path: a `.csv` or `.parquet` file with the columns `patient_id` and `PATIENT_FIELDS`, in
            any order and among others; or a shipped cohort, `"train"` (2,000 virtual patients,
            the default) or `"holdout"` (500 more).

    Raises:
        CohortError: the file cannot be read, lacks a column or has one twice, or has no row; or
            in some row the id is blank or used before, a value is not a number in its field's
            range, LVEF or border-zone stress disagrees with the columns it follows from, or scar
            and border zone leave too little of the ventricle.
    """
    path = "train" if path is None else os.fspath(path)
    if path in SHIPPED:
        name = f"shipped {path}"
        source: Path | Traversable = files("hydrogel_gym.patients") / SHIPPED[path]
    else:
        name, source = path, Path(path)
    try:
        frame = read_table_file(source, [ID_COLUMN, *FEATURE_COLUMNS])
    except TableError as error:
        is_table = os.path.splitext(path)[1].lower() in SUFFIXES
        shipped = "" if is_table else f", or a shipped cohort: {', '.join(SHIPPED)}"
        raise CohortError(f"{name}: {error}{shipped}") from error
    ids = identifiers(frame[ID_COLUMN])

    def fault(
        bad: np.ndarray, column: str, values: pd.Series[Any] | np.ndarray, allowed: str
    ) -> str:
        row, others = int(bad.argmax()), int(bad.sum()) - 1
        patient = str(frame[ID_COLUMN][row])
        return (
            f"{name}, row {row + 1} (patient {patient!r}), {column}: {str(values[row])!r}; "
            f"allowed: {allowed}" + (f"; other rows with this fault: {others}" if others else "")
        )

    for bad, allowed in (
        ((ids == "").to_numpy(), "a name that is not blank"),
        (ids.duplicated().to_numpy(), "each name once"),
    ):
        if bad.any():
            raise CohortError(fault(bad, ID_COLUMN, frame[ID_COLUMN], allowed))
    values_of = {column: numbers(frame[column]) for column in FEATURE_COLUMNS}
    ranges = ((item.name, values_of[item.name], item.low, item.high, "") for item in PATIENT_FIELDS)
    # Once every value is in its range, nothing divides by zero.
    for column, values, bad, allowed in violations(
        limit for limits in (ranges, patient_identities(values_of)) for limit in limits
    ):
        raise CohortError(fault(bad, column, frame.get(column, values), f"a number from {allowed}"))
    return Cohort(
        tuple(ids),
        torch.from_numpy(np.column_stack(list(values_of.values()))),
        frame.drop(columns=[ID_COLUMN, *FEATURE_COLUMNS]),
        name,
    )


# Column, its values, their lower and upper limit, and what these follow from.
Limits: TypeAlias = tuple[str, np.ndarray, float | np.ndarray, float | np.ndarray, str]


def violations(
    limits: Iterable[Limits], slack: float = 0.0
) -> Iterator[tuple[str, np.ndarray, np.ndarray, str]]:
    """Of each limit that a row breaks: column, values, which rows, and what the first may be.

    Args:
        limits: in the order in which they are looked at, and made.
        slack: share of a limit by which rounding may have moved a value beyond it.
    """
    for column, values, low, high, reason in limits:
        within = (values >= low - slack * np.abs(low)) & (values <= high + slack * np.abs(high))
        bad = ~within  # NaN is bad
        if bad.any():
            row_low, row_high = (np.broadcast_to(x, bad.shape)[bad.argmax()] for x in (low, high))
            yield column, values, bad, f"{row_low:g} to {row_high:g}{reason}"


def patient_identities(values: dict[str, np.ndarray]) -> Iterator[Limits]:
    """What columns of a patient have to do with each other; each value is in its range."""
    lvef = 100.0 * (values["edv_ml"] - values["esv_ml"]) / values["edv_ml"]
    low, high = lvef - LVEF_TOLERANCE_PP, lvef + LVEF_TOLERANCE_PP
    yield "lvef_pct", values["lvef_pct"], low, high, ", from 100 (edv_ml - esv_ml) / edv_ml"
    stress = values["stress_concentration"] * values["healthy_stress_kpa"]
    low = stress / (1.0 + BZ_STRESS_TOLERANCE_FRAC)
    high = stress / (1.0 - BZ_STRESS_TOLERANCE_FRAC)
    reason = ", from stress_concentration * healthy_stress_kpa"
    yield "bz_stress_kpa", values["bz_stress_kpa"], low, high, reason
    lesion_pct = values["scar_fraction_pct"] + values["bz_fraction_pct"]
    yield "scar_fraction_pct + bz_fraction_pct", lesion_pct, 0.0, MAX_SCAR_PLUS_BZ_PCT, ""
