"""The polymer table: what each of the hydrogels can be made to be, and how tissue takes it.

`polymers.csv` has one row per polymer with the evidence for it in the columns `source` and
`confidence` (A read in a study's abstract, B secondary source, C from memory of the literature,
D assumption). The windows are those of the public HYDRA-BERT configuration [Potluri2026] and are
not individually sourced there. The indices are ranks expressed as numbers, ordered by the studies
that each row names; no index is a measurement.

References:
    [Potluri2026] Potluri. HYDRA-BERT, public configuration, MIT licence. 2026.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from importlib.resources import files
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_TEXT_COLUMNS = ("name", "category", "smiles", "source", "confidence")
# Parameters of a formulation for which a polymer has a window, and the columns of its ends.
WINDOWS = {
    "youngs_modulus_kpa": ("youngs_modulus_min_kpa", "youngs_modulus_max_kpa"),
    "half_life_days": ("half_life_min_days", "half_life_max_days"),
    "conductivity_s_per_m": ("conductivity_min_s_per_m", "conductivity_max_s_per_m"),
}
# A request is compared with these windows as a ratio, so their ends must not be zero.
_POSITIVE_WINDOWS = ("youngs_modulus_kpa", "half_life_days")
_INDICES = (
    "bioactivity",
    "base_toxicity",
    "filler_toxicity",
    "filler_mid_dose_s_per_m",
    "foreign_body_tendency",
    "cohesion",
)
_COLUMNS = (
    "polymer_id",
    *_TEXT_COLUMNS,
    *(column for ends in WINDOWS.values() for column in ends),
    *_INDICES,
)


@dataclass(frozen=True, eq=False)
class PolymerTable:
    """Properties of N polymers; row i is `polymer_id` i.

    Attributes:
        names: unique name, as in [Potluri2026].
        categories: chemical family, as in [Potluri2026].
        smiles: repeat unit or its mimic, as in [Potluri2026], whose string for PEDOT is corrected,
            since it cannot be read; not used by the built-in model.
        sources: the evidence behind the row.
        confidences: grade of the windows, of the indices and of the order of the indices.
        youngs_modulus_kpa: (N, 2) lowest and highest stiffness it can be made with, kPa.
        half_life_days: (N, 2) shortest and longest degradation half-life, days. Read the upper
            end of the PEGDA windows as "slower than that".
        conductivity_s_per_m: (N, 2) lowest and highest conductivity, S/m; 0 to 0 without filler.
        bioactivity: (N,) index, 0 (inert) to 1: how well cells take to it.
        base_toxicity: (N,) index: hazard of the gel itself at a reference dose.
        filler_toxicity: (N,) index: additional hazard of a conductive filler at saturation, 0
            without filler.
        filler_mid_dose_s_per_m: (N,) conductivity at which half of that hazard is reached, S/m;
            1 without filler, where the file is blank.
        foreign_body_tendency: (N,) index, 0 to 1: tendency to be walled off while it persists.
        cohesion: (N,) index, 0 to 1: how well it holds together and in place.

    All numbers are float64 CPU tensors.
    """

    names: tuple[str, ...]
    categories: tuple[str, ...]
    smiles: tuple[str, ...]
    sources: tuple[str, ...]
    confidences: tuple[str, ...]
    youngs_modulus_kpa: Tensor
    half_life_days: Tensor
    conductivity_s_per_m: Tensor
    bioactivity: Tensor
    base_toxicity: Tensor
    filler_toxicity: Tensor
    filler_mid_dose_s_per_m: Tensor
    foreign_body_tendency: Tensor
    cohesion: Tensor

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str) -> int:
        """Row of the polymer called `name`.

        Raises:
            ValueError: there is no such polymer.
        """
        try:
            return self.names.index(name)
        except ValueError:
            raise ValueError(f"polymer is {name!r}; allowed: {', '.join(self.names)}") from None


def load_polymers(path: str | PathLike[str] | None = None) -> PolymerTable:
    """Read and validate a polymer table.

    Args:
        path: a CSV file with the columns of the packaged one, in any order; extra columns are
            ignored. None reads the packaged table.

    Raises:
        ValueError: names the file, the row (`polymer_id`), the column, the value and what is
            allowed.
    """
    resource = files("hydrogel_gym") / "polymers.csv" if path is None else Path(fspath(path))
    table = _Cells(str(resource), _rows(resource))
    if path is not None and len(table.rows) != NUM_POLYMERS:
        raise ValueError(
            f"{resource}: {len(table.rows)} rows; expected {NUM_POLYMERS}, one per polymer"
        )
    table.check_texts()
    every_row = range(len(table.rows))

    def texts(column: str) -> tuple[str, ...]:
        return tuple(row[column] for row in table.rows)

    def floats(values: list[float] | list[list[float]]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device="cpu")

    return PolymerTable(
        names=texts("name"),
        categories=texts("category"),
        smiles=texts("smiles"),
        sources=texts("source"),
        confidences=texts("confidence"),
        **{field: floats([table.window(row, field) for row in every_row]) for field in WINDOWS},
        **{
            field: floats([table.index_value(row, field) for row in every_row])
            for field in _INDICES
        },
    )


def _rows(resource: Traversable) -> list[dict[str, str]]:
    """Rows of a table, which must have every column."""
    # Line ends as they are: what to make of them is for the reader to decide.
    reader = csv.DictReader(io.StringIO(resource.read_bytes().decode("utf-8-sig"), newline=""))
    missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
    rows = list(reader)
    if missing:
        raise ValueError(f"{resource}: columns {missing} are missing")
    return rows


class _Cells(NamedTuple):
    """The cells of a table, read one by one; what is not allowed is a ValueError that names it."""

    name: str
    rows: list[dict[str, str]]

    def fault(self, row: int, column: str, allowed: str) -> ValueError:
        """What to raise of a cell."""
        return ValueError(
            f"{self.name}, row {row}, column {column}: value {self.rows[row][column]!r}; "
            f"allowed: {allowed}"
        )

    def check_texts(self) -> None:
        """Raise unless the rows are numbered, their names differ and no text is empty."""
        for row, cells in enumerate(self.rows):
            if cells["polymer_id"] != str(row):
                raise self.fault(row, "polymer_id", f"the row number, {row}")
            if cells["name"] in [earlier["name"] for earlier in self.rows[:row]]:
                raise self.fault(row, "name", "a name that no other row has")
            for column in _TEXT_COLUMNS:
                if not cells[column]:
                    raise self.fault(row, column, "a text that is not empty")

    def number(self, row: int, column: str) -> float:
        """A finite number, at least 0."""
        try:
            value = float(self.rows[row][column])
        except (TypeError, ValueError):  # TypeError: a row with too few cells
            value = math.nan
        if not (math.isfinite(value) and value >= 0.0):
            raise self.fault(row, column, "a finite number, at least 0")
        return value

    def window(self, row: int, field: str) -> list[float]:
        """Lower and upper end of what a polymer can be made with."""
        low, high = WINDOWS[field]
        ends = [self.number(row, low), self.number(row, high)]
        if ends[0] > ends[1]:
            raise self.fault(row, high, f"at least {low}, {ends[0]:g}")
        if field in _POSITIVE_WINDOWS and ends[0] == 0.0:
            raise self.fault(row, low, "a number above 0")
        return ends

    def index_value(self, row: int, column: str) -> float:
        """One of `_INDICES`."""
        if column != "filler_mid_dose_s_per_m":
            return self.number(row, column)
        if self.number(row, "filler_toxicity") == 0.0 and not self.rows[row][column]:
            return 1.0  # divides the dose, then is multiplied by zero: any number but 0 will do
        value = self.number(row, column)
        if value == 0.0:
            raise self.fault(row, column, "a number above 0")
        return value


NUM_POLYMERS = len(load_polymers())
