"""The files that the designs of many patients are in: written, and read back.

    out/manifest.json                            what made the rest
    out/top/P0001/designs.parquet                the best, all unlike each other
    out/diverse/P0001/designs.parquet            the best of each polymer and coverage
    out/candidates/P0001/part-00000.parquet      every design that was tried
    out/ranked_designs.parquet                   the best of all patients, ranked

Each file has a column `patient_id`; a folder's name is made from it, and is not read back.
`grid` decides which designs there are, `schema` what each column is.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args
from urllib.parse import quote, unquote

import numpy as np

from hydrogel_gym.designs.schema import DESIGNS_FILE, PART_FILE, arrow_table, parquet
from hydrogel_gym.designs.top import TopDesigns
from hydrogel_gym.errors import UsageError, differences
from hydrogel_gym.files import make_folder, remove_unfinished, write_atomically
from hydrogel_gym.problem.tables import require_pyarrow

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Self

DesignTable = Literal["top", "diverse", "candidates"]
Designs = tuple[np.ndarray, np.ndarray]  # (B,) cells and (R, B) rows of `NUMBERS`
MANIFEST = "manifest.json"
MAX_NAME = 100  # bytes of a file's name that a patient may take
WRITERS = 2  # threads, and files under way


def file_name(patient_id: str) -> str:
    """The patient as part of a file's name, whatever the identifier contains and however long."""
    name = quote(patient_id, safe="")
    if name[0] in "._":  # what begins so is taken for hidden
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if len(name) > MAX_NAME:
        digest = hashlib.sha256(patient_id.encode()).hexdigest()[:16]
        beginning = re.sub("%.?$", "", name[: MAX_NAME - 17])  # no half of a letter
        name = f"{beginning}+{digest}"
    return name


def partition(table: Path, patient_id: str) -> Path:
    """Folder of a patient's files."""
    return table / file_name(patient_id)


def _folders(table: Path) -> dict[str, Path]:
    """Folder of each patient of a table."""
    return {_patient_of(folder): folder for folder in sorted(table.iterdir()) if folder.is_dir()}


def _patient_of(folder: Path) -> str:
    from pyarrow import parquet as pq

    before_0_2 = folder.name.removeprefix("patient_id=")  # whose files lack the column
    if "+" not in folder.name:
        return unquote(before_0_2)
    for file in folder.glob("*.parquet"):
        for patient_id in pq.ParquetFile(file).read(["patient_id"])["patient_id"].unique():
            return str(patient_id)
    return folder.name


class Store:
    """Where designs are written, by threads: compressing takes as long as drawing.

    A context, at whose end all is written.

    Args:
        output_dir: the folder.
        manifest: what makes the designs what they are, of plain types.

    Raises:
        UsageError: the folder contains designs that something else made, or other files; or pyarrow
            is not installed.
    """

    def __init__(self, output_dir: Path, manifest: dict[str, Any]) -> None:
        require_pyarrow("writing designs")
        self.output_dir = output_dir
        self.bytes_written = 0
        self.writers = ThreadPoolExecutor(WRITERS)
        self.pending: list[Future[int]] = []
        make_folder(output_dir, "--output-dir")
        path = output_dir / MANIFEST
        if path.exists():
            try:
                found = json.loads(path.read_text())
            except ValueError as error:
                raise UsageError(f"{path} cannot be read: {error}") from error
            if differing := differences(found, manifest, "there"):
                raise UsageError(
                    f"{output_dir} contains designs of another run ({differing}); pass another "
                    "--output-dir, or remove it"
                )
            remove_unfinished(output_dir)
        # A hidden file may be the manifest that another rank is writing.
        elif any(p.name[0] != "." for p in output_dir.iterdir()):
            raise UsageError(
                f"{output_dir} is no folder of designs: it has files but no {MANIFEST}"
            )
        else:
            write_atomically(path, (json.dumps(manifest, indent=2) + "\n").encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.writers.shutdown()

    def is_done(self, patient_id: str) -> bool:
        """Whether all there is to write of a patient is there."""
        return (partition(self.output_dir / "top", patient_id) / DESIGNS_FILE).exists()

    def part(self, patient_id: str, index: int) -> Path:
        """File of some candidates."""
        return partition(self.output_dir / "candidates", patient_id) / PART_FILE.format(index)

    def write(self, patient_id: str, path: Path, blocks: list[Designs]) -> None:
        """Write a patient's designs as one file while the caller goes on, unless too many wait.

        Raises:
            OSError: a file before could not be written.
        """
        self.wait(WRITERS - 1)
        self.pending.append(self.writers.submit(self._write, patient_id, path, blocks))

    def write_best(self, patient_id: str, best: TopDesigns, diverse: TopDesigns) -> None:
        """Write what is kept of a patient, who is done with it.

        Raises:
            OSError: a file could not be written.
        """
        for table, designs in (("diverse", diverse), ("top", best)):
            path = partition(self.output_dir / table, patient_id) / DESIGNS_FILE
            self.wait()  # `top` is last: where it is, the rest is
            self.write(patient_id, path, [(designs.cell, designs.numbers)])
        self.wait()

    def wait(self, leave: int = 0) -> None:
        """Wait until no more than some files are under way.

        Raises:
            OSError: one could not be written.
        """
        while len(self.pending) > leave:
            self.bytes_written += self.pending.pop(0).result()

    def _write(self, patient_id: str, path: Path, blocks: list[Designs]) -> int:
        import pyarrow as pa

        path.parent.mkdir(parents=True, exist_ok=True)
        content = parquet(pa.concat_tables(arrow_table(patient_id, *block) for block in blocks))
        write_atomically(path, content)
        return len(content)


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
        UsageError: pyarrow is not installed.
    """
    require_pyarrow("reading designs")
    import pandas as pd
    from pyarrow import parquet as pq

    if table not in get_args(DesignTable):
        raise ValueError(f"table is {table!r}; allowed: {get_args(DesignTable)}")
    folder = Path(path) / table
    if not folder.is_dir():
        raise ValueError(f"{path} contains no table {table!r}: there is no {folder}")
    folders = _folders(folder)
    have = sorted(folders)
    wanted = have if patient_id is None else patient_id
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    for each in wanted:
        if each not in have:
            nearest = difflib.get_close_matches(each, have, cutoff=0.0)
            raise ValueError(f"{folder} has no patient {each!r}; nearest: {', '.join(nearest)}")
    parts = []
    for each in wanted:
        for file in sorted(folders[each].glob("*.parquet")):
            part = (
                pq.ParquetFile(file).read().to_pandas().drop(columns="patient_id", errors="ignore")
            )
            part.insert(0, "patient_id", each)
            parts.append(part)
    if not parts:
        raise ValueError(f"{folder} contains no designs of {', '.join(wanted) or 'anybody'} yet")
    designs: pd.DataFrame = pd.concat(parts, ignore_index=True)
    return designs
