"""Archives of weights: read back if they are whole, plain, and no larger than their file."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor


def check_zip(source: str | os.PathLike[str] | IO[bytes], size: int) -> None:
    """Refuse a ZIP archive that is damaged or that would take more memory than its file.

    Args:
        source: the file, or what it contains.
        size: of the file, bytes.

    Raises:
        ValueError: says what is wrong with it.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            total = sum(member.file_size for member in archive.infolist())
            if total > size:
                raise ValueError(
                    f"its members add up to {total:,} bytes, more than the {size:,} of the file; "
                    "expected an archive that is not compressed"
                )
            damaged = archive.testzip()
    except zipfile.BadZipFile:
        raise ValueError("it is cut off, or is no archive of weights") from None
    if damaged:
        raise ValueError(f"it is damaged: {damaged} does not have its checksum")


def load_archive(path: str | os.PathLike[str]) -> Any:
    """The content of a file of `torch.save`, of plain types and CPU tensors; runs no code.

    Raises:
        ValueError: it is damaged, or would take more memory than its file.
        OSError: it cannot be read.
    """
    check_zip(path, Path(path).stat().st_size)
    return torch.load(path, map_location="cpu", weights_only=True)


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], size: int) -> None:
    """Refuse weights that do not fit, before anything is allocated for them.

    Args:
        state: as read.
        expected: of the right shapes, on the meta device.
        size: of the file that they come from, bytes.

    Raises:
        ValueError: names the first that is missing, unknown, of another shape or not finite.
    """
    for name in [*expected, *state]:
        if name not in state or name not in expected:
            raise ValueError(f"{name} is {'missing' if name in expected else 'unknown'}")
        if state[name].shape != expected[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)}; expected "
                f"{tuple(expected[name].shape)}"
            )
    # A tensor may be a view that repeats a few numbers.
    if (total := sum(value.numel() * value.element_size() for value in state.values())) > size:
        raise ValueError(f"its weights add up to {total:,} bytes, more than the file's {size:,}")
    for name, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} is not finite")
