"""Tables that people bring, CSV or Parquet: one reader for cohorts and for tables of outcomes.

Identifiers are text, numbers are what `float()` reads, and what could be taken for something else
is refused: a column that occurs twice, a cell beyond the header, a truth value for a number.
"""

from __future__ import annotations

import csv
import io
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hydrogel_gym.errors import UsageError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    import pandas as pd

SUFFIXES = (".csv", ".parquet")
_OTHER_SEPARATORS = {";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}


class TableError(ValueError):
    """A table cannot be used; the message names what is wrong, not the file."""


def read_table_file(source: Path | Traversable, wanted: Sequence[str]) -> pd.DataFrame:
    """The cells of a table: text from a CSV, typed from Parquet.

    Args:
        source: a file whose suffix, in any case, is one of `SUFFIXES`.
        wanted: columns that it must have, among others.

    Raises:
        TableError: it cannot be read, lacks a column or has one twice, has cells without a column,
            or has no row.
    """
    suffix = os.path.splitext(source.name)[1].lower()
    if suffix not in SUFFIXES:
        raise TableError(f"suffix {suffix!r}; allowed: {', '.join(SUFFIXES)}")
    try:
        content = source.read_bytes()
        return _parquet(content, wanted) if suffix == ".parquet" else _csv(content, wanted)
    except TableError:
        raise
    except UsageError as error:
        raise TableError(str(error)) from error
    except OSError as error:
        raise TableError(f"cannot be read: {error.strerror or error}") from error
    except Exception as error:  # whatever the readers raise of a damaged file
        why = " ".join(str(error).split()) or "no reason given"
        raise TableError(f"cannot be read: {type(error).__name__}: {why}") from error


def require_pyarrow(what: str) -> None:
    """Refuse a feature that needs pyarrow where that is not installed.

    Args:
        what: the feature, as the message begins.

    Raises:
        UsageError: it is not there.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f'{what} needs pyarrow, which is not installed: pip install "pyarrow>=15.0.2"'
        ) from error


def _parquet(content: bytes, wanted: Sequence[str]) -> pd.DataFrame:
    require_pyarrow("a Parquet table")
    import pyarrow.parquet as pq

    # Unlike pandas' reader, adds no column for a folder called `key=value`.
    table = pq.ParquetFile(io.BytesIO(content)).read()
    _check_columns(table.column_names, len(table), wanted)
    frame: pd.DataFrame = table.to_pandas()
    return frame.reset_index(drop=frame.index.names == [None])


def _csv(content: bytes, wanted: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    text = content.decode("utf-8-sig")
    header = next(csv.reader(io.StringIO(text)), [])
    if not any(header):
        raise TableError("cannot be read: it is empty")
    if not set(wanted) & set(header):
        for separator, name in _OTHER_SEPARATORS.items():
            if set(wanted) & set(next(csv.reader(io.StringIO(text), delimiter=separator))):
                raise TableError(f"its cells are separated by {name}; expected a comma")
    # With a header pandas renames a repeated column, and takes cells beyond it for an index, which
    # shifts all others. Columns to spare hold such cells instead.
    spare = len(header) + 1
    cells = pd.read_csv(
        io.StringIO(text),
        header=None,
        names=range(len(header) + spare),
        index_col=False,
        dtype=str,
        keep_default_na=False,
        low_memory=False,
    )
    frame = cells.iloc[1:].reset_index(drop=True).fillna("")
    names = [name.strip() for name in header]
    for column in range(frame.shape[1]):
        if column < len(header) and names[column]:
            continue
        filled = (frame[column].str.strip() != "").to_numpy()
        if filled.any():
            row = int(filled.argmax())
            raise TableError(
                f"row {row + 1}: {frame[column][row]!r} is in column {column + 1}, for which the "
                f"header has no name; it has {sum(map(bool, names))} columns"
            )
        frame = frame.drop(columns=column)
    names = [name for name in names if name]
    _check_columns(names, len(frame), wanted)
    frame.columns = pd.Index(names)
    return frame


def _check_columns(names: Sequence[str], num_rows: int, wanted: Sequence[str]) -> None:
    """Raise unless every wanted column is there, none is there twice, and there is a row."""
    if missing := [column for column in wanted if column not in names]:
        found = ", ".join(names)
        raise TableError(f"missing columns: {', '.join(missing)}; columns found: {found}")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise TableError(f"columns that occur twice: {', '.join(twice)}")
    if num_rows == 0:
        raise TableError("no rows, only a header")


def identifiers(cells: pd.Series) -> pd.Series:
    """Names as text, without blanks around them, each letter written in one way (NFC).

    Two names that look the same are the same. What is missing is empty.
    """
    text = cells.astype(object).where(cells.notna(), "").map(str)
    return text.map(clean_identifier)


def clean_identifier(name: str) -> str:
    """A name as `identifiers` has it."""
    return unicodedata.normalize("NFC", name).strip()


def numbers(cells: pd.Series) -> np.ndarray:
    """(N,) float64 of a column, as `float()` reads them; NaN for what is no number.

    Neither truth values nor text that only Python's source would take for a number (`4_0`) are.
    """
    if cells.dtype.kind in "iuf":
        return cells.to_numpy(np.float64, na_value=np.nan)
    if cells.dtype == "str" and not cells.str.contains("_", regex=False).any():
        try:  # at once, since a table may have millions of cells
            return cells.to_numpy(object).astype(np.float64)
        except ValueError:
            pass
    return np.array([_number(cell) for cell in cells], np.float64)


def _number(cell: Any) -> float:
    if isinstance(cell, (bool, np.bool_)) or (isinstance(cell, str) and "_" in cell):
        return np.nan
    try:
        return float(cell)
    except (TypeError, ValueError):
        return np.nan
