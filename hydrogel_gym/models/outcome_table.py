"""Tables of simulated or measured outcomes: reading, checking, and what a fit takes from one.

CSV or Parquet, a row per simulation or experiment: `patient_id`, the columns of a cohort
(`PATIENT_FIELDS`), `polymer_name`, those of a formulation (`FORMULATION_FIELDS`), `coverage` (a
name of `COVERAGES`), and the outcomes of `OUTCOME_COLUMNS`, whose cells may be empty. Other columns
are ignored. Patients are held to what a cohort is held to, and outcomes to each other.
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

from hydrogel_gym.errors import UsageError
from hydrogel_gym.models.ensemble import OPTIMAL, FittedRange, Scaling
from hydrogel_gym.models.network import raw_numeric
from hydrogel_gym.problem import tables
from hydrogel_gym.problem.cohort import patient_identities, violations
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
from hydrogel_gym.problem.reward import RewardConfig
from hydrogel_gym.problem.tables import TableError, identifiers, read_table_file

LABEL = "is_optimal"  # 0 or 1; what is predicted of it is its logit
# In the order of `Outcomes`.
OUTCOME_COLUMNS = tuple(LABEL if name == "optimal_logit" else name for name in Outcomes._fields)
REGRESSED = tuple(name for name in OUTCOME_COLUMNS if name != LABEL)
# How a cell says that it is missing, beside being empty.
MISSING = ("NA", "N/A", "#N/A", "NaN", "nan", "null", "NULL", "None")
# By the unit that a name ends in: units that are taken for it, and what to multiply them with.
OTHER_UNITS = {
    "_kpa": {"Pa": 0.001, "MPa": 1000.0, "mmHg": 0.133322},
    "_days": {"hours": 1.0 / 24.0, "weeks": 7.0, "months": 30.4375},
    "_mm": {"um": 0.001, "cm": 10.0, "m": 1000.0},
    "_ml": {"L": 1000.0},
    "_s_per_m": {"mS/cm": 0.1, "S/cm": 100.0, "mS/m": 0.001, "uS/cm": 0.0001},
    "_pct": {"shares of 1": 100.0},
    "": {"%": 0.01},  # what has no unit is a share of 1
}
# A conversion that leaves all values below this share of the range is not what was meant.
PLAUSIBLE_SHARE = 0.1

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
        seen = torch.zeros(num_polymers, len(COVERAGES), dtype=torch.float32)
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

    def fail(cause: str) -> UsageError:
        return UsageError(f"table {path}: {cause}")

    fields = (*PATIENT_FIELDS, *FORMULATION_FIELDS)
    numeric = [*(f.name for f in fields), *OUTCOME_COLUMNS]
    try:
        frame = read_table_file(path, ["patient_id", "polymer_name", "coverage", *numeric])
    except TableError as error:
        raise fail(str(error)) from error
    numbers = {name: _numbers(frame, name, fail) for name in numeric}
    for field in fields:
        _check_range(field, numbers[field.name], fail, required=True)
    _check_patients(numbers, fail)
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


def _numbers(frame: pd.DataFrame, name: str, fail: Fail) -> np.ndarray:
    """(N,) float64, NaN where a cell is missing."""
    cells = frame[name]
    missing = cells.isna()
    if cells.dtype.kind not in "iuf":
        text = cells.astype(object).where(~missing, "").map(str).str.strip()
        missing = text.isin(("", *MISSING))
        if name == LABEL:  # the one column that may hold truth values
            cells = text.replace({"True": "1", "true": "1", "False": "0", "false": "0"})
    values = tables.numbers(cells)
    if (bad := np.isnan(values) & ~missing.to_numpy()).any():
        row = int(bad.argmax())
        raise fail(f"row {row + 1}, {name}: {str(frame[name].iloc[row])!r}; expected a number")
    return values


def _check_patients(numbers: dict[str, np.ndarray], fail: Fail) -> None:
    """Hold the patients to the identities of a cohort."""
    # Numbers that were written as float32 come back a little beyond a limit.
    for column, values, bad, allowed in violations(patient_identities(numbers), slack=1e-5):
        row = int(bad.argmax())
        raise fail(
            f"row {row + 1}, {column}: {values[row]:g}; allowed: {allowed}; rows with this fault: "
            f"{int(bad.sum())} of {len(values)}"
        )


def _check_outcomes(numbers: dict[str, np.ndarray], fail: Fail) -> None:
    for field, name in zip(OUTCOME_FIELDS, OUTCOME_COLUMNS, strict=True):
        values = numbers[name]
        limits = Field(name, 0.0, 1.0, "") if name == LABEL else field
        _check_no_mark_for_missing(limits, values, fail)
        _check_range(limits, values, fail, required=False)
        known = values[~np.isnan(values)]
        if len(np.unique(known)) < 2:
            constant = f"is {known[0]:g} in every row" if len(known) else "is empty in every row"
            raise fail(f"{name} {constant}; there is nothing to learn from a constant outcome")
        if name.endswith("_pct") and np.abs(known).max() <= 1.0:
            raise fail(
                f"{name}: all values lie in -1 to 1; expected {field.meaning}; of shares of 1, "
                "100 times the values would fit"
            )
    label = numbers[LABEL]
    if (bad := ~np.isin(label, (0.0, 1.0)) & ~np.isnan(label)).any():
        row = int(bad.argmax())
        raise fail(f"row {row + 1}, {LABEL}: {label[row]:g}; allowed: 0, 1 or empty")
    _check_label(numbers, fail)


def _check_no_mark_for_missing(field: Field, values: np.ndarray, fail: Fail) -> None:
    """Refuse a whole number that several rows have and that lies far from all others.

    Zero and the ends of the range are what outcomes may well be.
    """
    levels, counts = np.unique(values[~np.isnan(values)], return_counts=True)
    if len(levels) < 3:
        return
    for end, others in ((0, levels[1:]), (-1, levels[:-1])):
        mark, gap = levels[end], np.abs(levels[end] - others).min()
        if mark != round(mark) or mark in (0.0, field.low, field.high):
            continue
        if counts[end] > 1 and gap > others[-1] - others[0]:
            row = int((values == mark).argmax())
            raise fail(
                f"row {row + 1}, {field.name}: {mark:g}, in {counts[end]} rows and far from all "
                f"other values ({others[0]:g} to {others[-1]:g}), looks like a mark for what is "
                "missing; leave such cells empty"
            )


def _check_label(numbers: dict[str, np.ndarray], fail: Fail) -> None:
    """Refuse labels that gain and stress reduction contradict more often than not."""
    config = RewardConfig()
    gain, relief, label = (numbers[name] for name in (*OUTCOME_COLUMNS[:2], LABEL))
    reaches = (gain >= config.optimal_delta_ef_pct) & (
        relief >= config.optimal_stress_reduction_pct
    )
    optimal = ~np.isnan(gain + relief) & (label == 1.0)
    wrong = optimal & ~reaches
    if 2 * wrong.sum() > optimal.sum():
        row = int(wrong.argmax())
        raise fail(
            f"row {row + 1}: {LABEL} is 1 with {OUTCOME_COLUMNS[0]} {gain[row]:g} and "
            f"{OUTCOME_COLUMNS[1]} {relief[row]:g}, and so in {int(wrong.sum())} of "
            f"{int(optimal.sum())} such rows; it is expected from "
            f"{config.optimal_delta_ef_pct:g} points and {config.optimal_stress_reduction_pct:g} % "
            "on; are both in their units?"
        )


def _check_range(field: Field, values: np.ndarray, fail: Fail, *, required: bool) -> None:
    missing = np.isnan(values)
    if required and missing.any():
        raise fail(f"row {int(missing.argmax()) + 1}, {field.name}: empty; only outcomes may be")
    # Bounds that were written as float32 come back a little beyond themselves.
    slack = 1e-5 * max(abs(field.low), abs(field.high)) if math.isfinite(field.high) else 0.0
    bad = ~missing & ~((values >= field.low - slack) & (values <= field.high + slack))
    if not bad.any():
        return
    row = int(bad.argmax())
    fits = _fitting_units(field, values[~missing & (values != 0.0)])
    hint = f"; is it in another unit? {' or '.join(fits)}" if fits else ""
    unit = f" ({field.meaning})" if field.meaning else ""
    raise fail(
        f"row {row + 1}, {field.name}: {values[row]:g}; allowed: {field.low:g} to {field.high:g}"
        f"{unit}; rows out of range: {int(bad.sum())} of {len(values)}{hint}"
    )


def _fitting_units(field: Field, values: np.ndarray) -> list[str]:
    """Conversions after which all of these values fit, if most of them do not fit as they are."""
    if np.mean((values >= field.low) & (values <= field.high)) > 0.5:
        return []
    others = next(units for end, units in OTHER_UNITS.items() if field.name.endswith(end))
    fits = []
    for unit, factor in others.items():
        converted = values * factor
        within = (converted >= field.low).all() and (converted <= field.high).all()
        if within and np.abs(converted).max() >= PLAUSIBLE_SHARE * field.high:
            fits.append(f"{factor:.6g} times the values would fit ({unit})")
    return fits


def _codes(frame: pd.DataFrame, column: str, names: tuple[str, ...], fail: Fail) -> np.ndarray:
    """(N,) int64 index into `names`."""
    index = {name: code for code, name in enumerate(names)}
    codes = np.array(
        [index.get(value.strip(), -1) for value in frame[column].astype(str)], np.int64
    )
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
    ids = identifiers(ids)
    if (ids == "").any():
        raise fail(f"row {int((ids == '').to_numpy().argmax()) + 1}, patient_id: empty")
    _, by_features = np.unique(patient, axis=0, return_inverse=True)
    by_features = by_features.reshape(-1)
    several = pd.Series(by_features).groupby(ids.to_numpy()).nunique()
    if (several > 1).any():
        name = several.index[int((several > 1).to_numpy().argmax())]
        raise fail(
            f"patient {name!r} has {several[name]} different sets of features; expected one: a "
            "patient is held out whole, or her other rows would give her away"
        )
    return by_features.astype(np.int64)
