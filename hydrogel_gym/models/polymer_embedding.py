"""A vector per polymer, for networks that predict outcomes: from its chemistry, or from a file."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from hydrogel_gym.errors import UsageError, first_line
from hydrogel_gym.problem.polymers import PolymerTable, load_polymers
from hydrogel_gym.problem.tables import TableError, numbers, read_table_file


def polymer_embedding(path: Path | None) -> tuple[np.ndarray, str]:
    """A vector per polymer, standardised, and where it is from.

    The windows of the polymer table are part of it, since polymers of one SMILES differ in them.

    Args:
        path: a file with a row per polymer: CSV or Parquet with a column `name`, or .npy in the
            order of the polymer table. None takes what RDKit computes from the table's SMILES.

    Returns:
        (24, d) float32 without constant columns, in the order of the polymer table, and a
        description.

    Raises:
        UsageError: the file lacks a finite vector for a polymer, or two are the same.
    """
    table = load_polymers()
    if path is None:
        vectors, origin = chemistry(table.smiles), "RDKit descriptors and Morgan fingerprints"
    else:
        vectors, origin = _read_embeddings(path, table.names), path.name
    joined = np.concatenate([_standard(vectors), _standard(_windows(table))], 1).astype(np.float32)
    for i in range(len(joined)):
        for j in range(i):
            if np.allclose(joined[i], joined[j]):
                raise UsageError(
                    f"polymers {table.names[j]} and {table.names[i]} have the same embedding and "
                    "the same windows, so that no model could tell them apart"
                )
    return joined * math.sqrt(joined.shape[1] / (joined**2).sum(1).mean()), origin


def polymer_categories() -> tuple[torch.Tensor, int]:
    """(24,) int64 category of each polymer, and how many categories there are."""
    categories = load_polymers().categories
    names = sorted(set(categories))
    return torch.tensor([names.index(each) for each in categories]), len(names)


def _windows(table: PolymerTable) -> np.ndarray:
    """(24, 6): what each polymer can be made to be."""
    windows = [
        table.youngs_modulus_kpa.log(),
        table.half_life_days.log(),
        table.conductivity_s_per_m,
    ]
    return torch.cat(windows, -1).numpy()


def _standard(x: np.ndarray) -> np.ndarray:
    """Standardised, without constant columns, and of the same total weight for any number."""
    std = x.std(0)
    x = (x[:, std > 1e-9] - x[:, std > 1e-9].mean(0)) / std[std > 1e-9]
    return x / math.sqrt(max(x.shape[1], 1))  # so that many columns weigh no more than few


def chemistry(smiles: tuple[str, ...]) -> np.ndarray:
    """(n, d) RDKit descriptors and Morgan fingerprints (counts, radius 2, 1,024 bits).

    Raises:
        UsageError: RDKit is missing.
    """
    if importlib.util.find_spec("rdkit") is None:
        raise UsageError(
            'the polymers\' chemistry needs rdkit: pip install -e ".[stage1]", or pass '
            "--polymer-embeddings"
        )
    from rdkit import Chem, RDLogger
    from rdkit.Chem import Descriptors, rdFingerprintGenerator

    RDLogger.DisableLog("rdApp.*")
    molecules = [Chem.MolFromSmiles(text) for text in smiles]
    frame = pd.DataFrame([Descriptors.CalcMolDescriptors(each) for each in molecules])
    # Some are undefined for an ion or a metal, and a few grow with the size beyond any use.
    described = frame.replace([np.inf, -np.inf], np.nan).dropna(axis=1).to_numpy(np.float64)
    described = np.sign(described) * np.log1p(np.abs(described))
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024)
    bits = np.stack([generator.GetCountFingerprintAsNumPy(each) for each in molecules])
    return np.concatenate([described, np.log1p(bits.astype(np.float64))], 1)


def _read_embeddings(path: Path, names: tuple[str, ...]) -> np.ndarray:
    """(24, d) of a file, in the order of the polymer table."""

    def fail(cause: str) -> UsageError:
        return UsageError(f"--polymer-embeddings {path}{cause}")

    if not path.is_file():
        raise fail(": no such file")
    vectors: np.ndarray
    if path.suffix == ".npy":
        try:
            vectors = np.load(path, allow_pickle=False).astype(np.float64)
        except Exception as error:  # whatever the reader raises of a damaged file
            raise fail(f" cannot be read: {first_line(error)}") from error
    else:
        try:
            frame = read_table_file(path, ["name"])
        except TableError as error:
            raise fail(f": {error}") from error
        frame = frame.set_index("name")
        if missing := [name for name in names if name not in frame.index]:
            raise fail(f": no row for {', '.join(missing)}")
        if frame.index.duplicated().any():
            raise fail(f": two rows for {frame.index[frame.index.duplicated()][0]}")
        columns = [numbers(cells) for _, cells in frame.loc[list(names)].items()]
        vectors = np.array(columns).reshape(-1, len(names)).T
    if vectors.ndim != 2 or len(vectors) != len(names) or not vectors.shape[1]:
        raise fail(f": shape {vectors.shape}; expected ({len(names)}, any)")
    finite = np.isfinite(vectors).all(1)
    if not finite.all():
        raise fail(f": {names[int(finite.argmin())]} is not finite")
    return vectors
