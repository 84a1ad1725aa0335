"""Tables of simulated or measured outcomes: reading, checking, and what a fit takes from one.

CSV or Parquet, a row per simulation or experiment: `patient_id`, the columns of a cohort
(`PATIENT_FIELDS`), `polymer_name`, those of a formulation (`FORMULATION_FIELDS`), `coverage` (a
name of `COVERAGES`), and the outcomes of `OUTCOME_COLUMNS`, whose cells may be empty. Other columns
are ignored.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hydrogel_gym.errors import UsageError, first_line
from hydrogel_gym.models.ensemble import OPTIMAL, FittedRange, Scaling
from hydrogel_gym.models.network import raw_numeric
from hydrogel_gym.problem.fields import (
    COVERAGES,
    FORMULATION_FIELDS,
    FORMULATION_LOW,
    OUTCOME_FIELDS,
    PATIENT_FIELDS,
    Field,
    Outcomes,
)
from hydrogel_gym.problem.polymers import load_polymers

LABEL = "is_optimal"  # 0 or 1; what is predicted of it is its logit
# In the order of `Outcomes`.
OUTCOME_COLUMNS = tuple(LABEL if name == "optimal_logit" else name for name in Outcomes._fields)
REGRESSED = tuple(name for name in OUTCOME_COLUMNS if name != LABEL)
# Factors between units that are confused: kPa and Pa, days and hours, mm and um, share and percent,
# S/m and mS/cm, days and weeks.
UNIT_FACTORS = (1000.0, 24.0, 100.0, 10.0, 7.0)

Fail = Callable[[str], UsageError]  # makes the error of a cause, with the name of the file


class OutcomeTable(NamedTuple):
    """Outcomes of N designs, checked."""

    patient: Tensor  # (N, C) in the order of `PATIENT_FIELDS`
    polymer_id: Tensor  # (N,) int64
    formulation: Tensor  # (N, D) in the order of `FORMULATION_FIELDS`
    coverage: Tensor  # (N,) int64
    outcome: Tensor  # (N, 6) in the order of `OUTCOME_COLUMNS`, NaN where missing
    group: np.ndarray  # (N,) of patients

    def rows(self, index: Any) -> OutcomeTable:
        """Some of them."""
        columns: Iterable[Any] = (column[index] for column in self)
        return OutcomeTable(*columns)

    def check_known(self, parts: dict[str, list[np.ndarray]]) -> None:
        """Refuse parts of which one knows nothing of an outcome.

        Args:
            parts: rows by what becomes of their patients, in shares that each have to know it.

        Raises:
            UsageError: names the outcome and the part.
        """
        for i, name in enumerate(OUTCOME_COLUMNS):
            known = ~self.outcome[:, i].isnan().numpy()
            for part, shares in parts.items():
                if not all(known[rows].any() for rows in shares):
                    raise UsageError(
                        f"{name} is empty for all patients that would be {part}; too few patients "
                        "have it, or take another --seed"
                    )

    def scaling(self) -> Scaling:
        """Means and standard deviations; of the outcomes robust ones, for rows that went wrong."""
        numeric = raw_numeric(self.patient, self.formulation, self.coverage)
        std = numeric.std(0)
        outcome = self.outcome.numpy()
        low, middle, high = np.nanpercentile(outcome, (5, 50, 95), axis=0)
        mean = torch.from_numpy(middle.astype(np.float32))
        spread = torch.from_numpy(((high - low) / (2 * 1.645)).astype(np.float32))
        # An outcome that is the same for most: its own deviation.
        deviation = torch.from_numpy(np.nanstd(outcome, axis=0).astype(np.float32))
        spread = torch.where(spread > 1e-3 * deviation, spread, deviation)
        mean[OPTIMAL], spread[OPTIMAL] = 0.0, 1.0
        std = torch.where(std > 0, std, torch.ones_like(std))
        return Scaling(numeric.mean(0), std, mean, spread)

    def standardised(self, scaling: Scaling) -> tuple[Tensor, Tensor]:
        """(N, 19) features in the order of `NUMERIC_FIELDS` and (N, 6) outcomes, NaN if missing."""
        numeric = raw_numeric(self.patient, self.formulation, self.coverage)
        return (
            (numeric - scaling.numeric_mean) / scaling.numeric_std,
            (self.outcome - scaling.outcome_mean) / scaling.outcome_std,
        )

    def fitted_range(self) -> FittedRange:
        """Where it has rows."""
        num_polymers = len(load_polymers())
        low = torch.from_numpy(FORMULATION_LOW).repeat(num_polymers, 1)
        high = low.clone()
        seen = torch.zeros(num_polymers, len(COVERAGES))
        for polymer in self.polymer_id.unique().tolist():
            mine = self.polymer_id == polymer
            formulation = self.formulation[mine]
            low[polymer], high[polymer] = formulation.amin(0), formulation.amax(0)
            seen[polymer, self.coverage[mine].unique()] = 1.0
        return FittedRange(self.patient.amin(0), self.patient.amax(0), low, high, seen)


def read_table(path: Path) -> OutcomeTable:
    """Read and check a table of outcomes.

    Raises:
        UsageError: names the column, the first row that is wrong, its value and what is allowed.
    """
    frame = read_frame(path)

    def fail(cause: str) -> UsageError:
        return UsageError(f"table {path}: {cause}")

    fields = (*PATIENT_FIELDS, *FORMULATION_FIELDS)
    numeric = [*(f.name for f in fields), *OUTCOME_COLUMNS]
    wanted = ["patient_id", "polymer_name", "coverage", *numeric]
    if missing := [name for name in wanted if name not in frame.columns]:
        found = ", ".join(map(str, frame.columns))
        raise fail(f"missing columns: {', '.join(missing)}; columns found: {found}")
    if frame.empty:
        raise fail("no rows, only a header")
    numbers = {name: _numbers(frame, name, fail) for name in numeric}
    for field in fields:
        _check_range(field, numbers[field.name], fail, required=True)
    _check_outcomes(numbers, fail)
    patient = np.column_stack([numbers[field.name] for field in PATIENT_FIELDS])
    return OutcomeTable(
        torch.from_numpy(patient.astype(np.float32)),
        torch.from_numpy(_codes(frame, "polymer_name", load_polymers().names, fail)),
        torch.from_numpy(
            np.column_stack([numbers[f.name] for f in FORMULATION_FIELDS]).astype(np.float32)
        ),
        torch.from_numpy(_codes(frame, "coverage", COVERAGES, fail)),
        torch.from_numpy(
            np.column_stack([numbers[name] for name in OUTCOME_COLUMNS]).astype(np.float32)
        ),
        _groups(frame["patient_id"], patient, fail),
    )


def read_frame(path: Path) -> pd.DataFrame:
    """The content of a CSV or Parquet file.

    Raises:
        UsageError: it is missing, damaged or of another kind.
    """
    suffixes: dict[str, Callable[[Path], pd.DataFrame]]
    suffixes = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
    if path.suffix not in suffixes:
        raise UsageError(f"table {path}: suffix {path.suffix!r}; allowed: {', '.join(suffixes)}")
    if not path.is_file():
        raise UsageError(f"table {path}: no such file")
    try:
        return suffixes[path.suffix](path)
    except Exception as error:  # whatever the readers raise of a damaged file
        raise UsageError(f"table {path} cannot be read: {first_line(error)}") from error


def _numbers(frame: pd.DataFrame, name: str, fail: Fail) -> np.ndarray:
    """(N,) float64, NaN where a cell is empty."""
    values = pd.to_numeric(frame[name], errors="coerce")
    if (bad := values.isna() & frame[name].notna()).any():
        row = int(bad.to_numpy().argmax())
        raise fail(f"row {row + 1}, {name}: {str(frame[name].iloc[row])!r}; expected a number")
    return values.to_numpy(np.float64, na_value=np.nan)


def _check_outcomes(numbers: dict[str, np.ndarray], fail: Fail) -> None:
    for field, name in zip(OUTCOME_FIELDS, OUTCOME_COLUMNS, strict=True):
        limits = Field(name, 0.0, 1.0, "") if name == LABEL else field
        _check_range(limits, numbers[name], fail, required=False)
        known = numbers[name][~np.isnan(numbers[name])]
        if len(np.unique(known)) < 2:
            constant = f"is {known[0]:g} in every row" if len(known) else "is empty in every row"
            raise fail(f"{name} {constant}; there is nothing to learn from a constant outcome")
    label = numbers[LABEL]
    if (bad := ~np.isin(label, (0.0, 1.0)) & ~np.isnan(label)).any():
        row = int(bad.argmax())
        raise fail(f"row {row + 1}, {LABEL}: {label[row]:g}; allowed: 0, 1 or empty")


def _check_range(field: Field, values: np.ndarray, fail: Fail, *, required: bool) -> None:
    missing = np.isnan(values)
    if required and missing.any():
        raise fail(f"row {int(missing.argmax()) + 1}, {field.name}: empty; only outcomes may be")
    # Bounds that were written as float32 come back a little beyond themselves.
    slack = 1e-5 * max(abs(field.low), abs(field.high)) if math.isfinite(field.high) else 0.0
    bad = ~missing & ~((values >= field.low - slack) & (values <= field.high + slack))
    if not bad.any():
        return
    row, middle = int(bad.argmax()), float(np.median(values[bad]))
    factors = [f for each in UNIT_FACTORS for f in (each, 1.0 / each)]
    fits = [f for f in factors if field.low <= middle / f <= field.high and middle != 0.0]
    hint = f"; is it in another unit? {1.0 / fits[0]:g} times the values would fit" if fits else ""
    unit = f" ({field.meaning})" if field.meaning else ""
    raise fail(
        f"row {row + 1}, {field.name}: {values[row]:g}; allowed: {field.low:g} to {field.high:g}"
        f"{unit}; rows out of range: {int(bad.sum())} of {len(values)}{hint}"
    )


def _codes(frame: pd.DataFrame, column: str, names: tuple[str, ...], fail: Fail) -> np.ndarray:
    """(N,) int64 index into `names`."""
    index = {name: code for code, name in enumerate(names)}
    codes = np.array([index.get(value, -1) for value in frame[column].astype(str)], np.int64)
    if (codes < 0).any():
        row = int((codes < 0).argmax())
        value = str(frame[column].iloc[row])
        near = difflib.get_close_matches(value, names, n=3, cutoff=0.4)
        known = f"nearest: {', '.join(near)}" if near else f"allowed: {', '.join(names)}"
        unknown = sorted(set(frame[column].astype(str)) - set(names))
        others = f"; unknown in all: {', '.join(unknown[:5])}" if len(unknown) > 1 else ""
        raise fail(f"row {row + 1}, {column}: {value!r} is unknown; {known}{others}")
    return codes


def _groups(ids: pd.Series, patient: np.ndarray, fail: Fail) -> np.ndarray:
    """(N,) int64, equal for rows of the same patient, by name or by features.

    Two names for one patient would put her on both sides of a split.
    """
    if ids.isna().any():
        raise fail(f"row {int(ids.isna().to_numpy().argmax()) + 1}, patient_id: empty")
    _, by_features = np.unique(patient, axis=0, return_inverse=True)
    by_features = by_features.reshape(-1)
    several = pd.Series(by_features).groupby(ids.astype(str).to_numpy()).nunique()
    if (several > 1).any():
        name = several.index[int((several > 1).to_numpy().argmax())]
        raise fail(
            f"patient {name!r} has {several[name]} different sets of features; expected one: a "
            "patient is held out whole, or her other rows would give her away"
        )
    return by_features.astype(np.int64)
