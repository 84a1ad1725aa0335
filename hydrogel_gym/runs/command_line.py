"""Command lines of the scripts: flags from a dataclass, failures as one line and an exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import itertools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import gymnasium as gym
import torch
import tyro

from hydrogel_gym.errors import UsageError, first_line
from hydrogel_gym.models.contract import RewardModelError
from hydrogel_gym.output import unfailing_output
from hydrogel_gym.problem.cohort import CohortError
from hydrogel_gym.runs.ranks import RankLostError, world_from_environment
from hydrogel_gym.runs.signals import ignore_warnings

REFUSED, FAILED, INTERRUPTED = 2, 1, 130  # exit codes


def read_command_line(
    kind: type,
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    default: Any = None,
    removed: Mapping[str, str] | None = None,
) -> Any:
    """An instance of a dataclass from flags, by tyro, whose errors are one line here.

    Args:
        kind: the dataclass.
        argv: the flags; those of this process by default.
        prog: name of the script.
        default: values of the flags that are not given.
        removed: flags that an earlier version had, and what replaces each.

    Raises:
        UsageError: a flag or a value is unknown.
    """
    argv = spelled_as_flags(sys.argv[1:] if argv is None else argv, kind)
    for word in argv:
        flag = word.partition("=")[0].replace("_", "-")
        if removed and flag in removed:
            raise UsageError(f"{flag} is gone; {removed[flag]}")
    options: dict[str, Any] = {} if default is None else {"default": default}
    boxed = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxed):
            return tyro.cli(kind, args=argv, prog=prog, **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # tyro draws its message in a box of several lines.
        lines = (line.strip(" │╭╮╰╯─") for line in boxed.getvalue().splitlines()[1:])
        message = " ".join(itertools.takewhile(bool, lines))
        raise UsageError(message or "the arguments cannot be read; see --help") from None


def spelled_as_flags(argv: Sequence[str], kind: type) -> list[str]:
    """Booleans as W&B's agents write them, `--flag=True` and `--flag=False`, as tyro does."""
    booleans = {field.name for field in dataclasses.fields(kind) if field.type == "bool"}

    def spelled(word: str) -> str:
        flag, _, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if name not in booleans or value.lower() not in ("true", "false"):
            return word
        return f"--{name}" if value.lower() == "true" else f"--no_{name}"

    return [spelled(word) for word in argv]


def check_ranges(args: Any, *ranges: tuple[str, str, Callable[[Any], bool]]) -> None:
    """Refuse a flag whose value is out of its range.

    Args:
        args: of a script.
        ranges: names of flags, what is allowed in words, and whether a value is.

    Raises:
        UsageError: names the flag, its value and what is allowed.
    """
    for names, allowed, is_allowed in ranges:
        for name in names.split():
            if not is_allowed(value := getattr(args, name)):
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} is {value}; allowed: {allowed}")


def run_script(body: Callable[[], int | None], *, out_of_memory: str = "") -> int:
    """Run a script; returns its exit code, having said in one line why it is not 0.

    Args:
        body: the script; returns its exit code, or None for 0.
        out_of_memory: what to change where memory is short.
    """
    with unfailing_output():
        return _run_script(body, out_of_memory)


def _run_script(body: Callable[[], int | None], out_of_memory: str) -> int:
    who = ""
    try:
        rank = world_from_environment().rank
        # Only rank 0 prints, but for what may be wrong on one machine of several.
        who = f"rank {rank}: " if rank else ""
        return body() or 0
    except (UsageError, CohortError, RewardModelError, gym.error.Error) as error:
        code, line = REFUSED, f"error: {error}"
    except (FloatingPointError, OSError, RankLostError) as error:
        code, line = FAILED, _with_notes(f"error: {error}", error)
    except (MemoryError, torch.OutOfMemoryError) as error:
        hint = f"; {out_of_memory}" if out_of_memory else ""
        code, line = FAILED, f"error: out of memory: {first_line(error)}{hint}"
    except KeyboardInterrupt as error:
        code, line = INTERRUPTED, _with_notes("interrupted", error)
    print(f"{who}{line}", file=sys.stderr)
    return code


def _with_notes(line: str, error: BaseException) -> str:
    return "; ".join([line, *getattr(error, "__notes__", [])])


def run_process(main: Callable[[], int]) -> NoReturn:
    """Run a command line as the whole of this process, and end it."""
    ignore_warnings()
    code = main()
    gc.freeze()  # or the last collection goes through all of torch and its compiler, for a second
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # A thread of a process group, which outlives it, rarely aborts an interpreter that is being
        # taken down; a launcher would take that for a failure. All files are closed.
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(code)
    sys.exit(code)
