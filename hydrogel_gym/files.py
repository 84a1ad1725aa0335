"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
from pathlib import Path

from hydrogel_gym.errors import UsageError

try:
    import fcntl
except ModuleNotFoundError:  # not a POSIX system: what a kill leaves there stays
    fcntl = None  # type: ignore[assignment]

# `.NAME.` and eight characters, where NAME is of a kind that this project writes.
_UNFINISHED = re.compile(r"\..+\.(?:csv|html|json|parquet|png|pt|pt2)\.[0-9a-z_]{8}")


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file beside its place, flush it to the disk, rename it into place, flush the folder.

    What a crash leaves of an unfinished one is a file named `.NAME.` and eight characters, which
    `remove_unfinished` removes. The file's mode is what the process's umask leaves of 0666.

    Args:
        path: where; its folder must exist.
        content: the whole file.

    Raises:
        OSError: the folder is missing or cannot be written to; whatever was at `path` is untouched.
    """
    path = Path(path)
    descriptor, temporary = _create_beside(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if fcntl:  # while it is locked, or somebody could take it for left over
                os.replace(temporary, path)
        if not fcntl:
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):  # an interrupt after the rename
            os.unlink(temporary)
        raise
    # A rename is in the folder, and may be lost with the power until the folder is flushed too.
    # Network mounts refuse that, and Windows to open a folder at all.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def make_folder(path: Path, flag: str) -> None:
    """Make a folder if it is missing, and try whether it can be written to.

    Args:
        path: the folder.
        flag: that names it.

    Raises:
        UsageError: it cannot be used.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".probe.json."):
            pass
    except OSError as error:
        why = error.strerror or error
        raise UsageError(f"{flag} {path} cannot be written to: {why}") from error


def _create_beside(path: Path) -> tuple[int, Path]:
    """A new file beside another, locked by its descriptor."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            descriptor = os.open(temporary, flags, 0o666)
        except FileExistsError:
            continue
        lock(descriptor)
        if temporary.exists():
            return descriptor, temporary
        os.close(descriptor)  # removed before it was locked


def lock(descriptor: int) -> bool | None:
    """Hold a file for as long as its descriptor is open, so at the most until this process ends.

    Returns:
        Whether it is held; None where files cannot be locked.
    """
    if not fcntl:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def remove_unfinished(folder: str | os.PathLike[str]) -> None:
    """Remove what killed processes left of files in a folder and below; not what is being written.

    Best effort: what cannot be locked or removed stays.
    """
    for parent, _, names in os.walk(folder):
        for name in filter(_UNFINISHED.fullmatch, names):
            with contextlib.suppress(OSError):
                descriptor = os.open(os.path.join(parent, name), os.O_RDWR)
                try:
                    if lock(descriptor):
                        os.unlink(os.path.join(parent, name))
                finally:
                    os.close(descriptor)
