"""Where the options of a run start: at a preset, or at the run that it goes on with."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydrogel_gym.errors import UsageError
from hydrogel_gym.runs.checkpoints import checkpoint_at, unseal
from hydrogel_gym.runs.command_line import read_command_line, spelled_as_flags
from hydrogel_gym.runs.options import REMOVED_FLAGS, from_config


def read_run_options(
    kind: type,
    presets: Mapping[str, Mapping[str, Any]],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
) -> Any:
    """Options of the command line, on top of the preset that it names or the run that it resumes.

    Args:
        kind: the dataclass of the options, whose first preset is its default.
        presets: options by the name of the preset.
        argv: the flags; those of this process by default.
        prog: name of the script.

    Raises:
        UsageError: a flag or a value is unknown, or the run cannot be resumed.
    """
    argv = spelled_as_flags(sys.argv[1:] if argv is None else argv, kind)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=next(iter(presets)))
    first.add_argument("--resume")
    given = first.parse_known_args(argv)[0]
    if given.preset not in presets:
        raise UsageError(f"--preset is {given.preset!r}; allowed: {', '.join(presets)}")
    if given.resume in (None, "auto"):
        default = kind(preset=given.preset, **presets[given.preset])
    else:
        default = options_of_checkpoint(kind, Path(given.resume))
    return read_command_line(kind, argv, prog=prog, default=default, removed=REMOVED_FLAGS)


def options_of_checkpoint(kind: type, path: Path) -> Any:
    """The options of the run that a checkpoint, or the newest of a run directory, belongs to.

    Raises:
        UsageError: it cannot be used.
    """
    output_dir = path if path.is_dir() else path.absolute().parent.parent
    saved = unseal(checkpoint_at(path))["args"]
    return from_config(kind, saved | {"output_dir": output_dir, "overwrite": False})
