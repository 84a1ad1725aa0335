"""The directory of a run: which files it has, who may write there, and files written whole."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydrogel_gym.errors import UsageError, first_line
from hydrogel_gym.files import lock, make_folder, remove_unfinished, write_atomically
from hydrogel_gym.runs.checkpoints import CHECKPOINTS, checkpoint_name, checkpoints, contains
from hydrogel_gym.runs.options import RunOptions

POLICY_FILE, SUMMARY_FILE, METRICS_FILE = "stage2_policy.pt", "summary.json", "metrics.csv"
CONFIG_FILE = "config.json"
CURVE_FILE, SELECTION_FILE = "learning_curve.png", "policy_selection.png"
LOCK_FILE = ".lock"  # held by the run that writes here
WANDB_FILE = "wandb.json"  # which W&B run is this one
RUN_FILES = (
    POLICY_FILE,
    SUMMARY_FILE,
    METRICS_FILE,
    WANDB_FILE,
    CONFIG_FILE,
    CURVE_FILE,
    SELECTION_FILE,
)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write plain data as JSON."""
    write_atomically(path, (json.dumps(content, indent=2, default=str) + "\n").encode())


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV; None becomes an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def save_figure(path: Path, figure: Any) -> None:
    """Write a figure of Matplotlib as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomically(path, buffer.getvalue())


def output_dir_of(options: RunOptions, name: str) -> Path:
    """The run directory that options name, or else that of this name."""
    return options.output_dir or default_output_dir(name)


def choose_output_dir(options: RunOptions, name: str) -> Path:
    """The run directory, before anything is done to it.

    Args:
        options: of the run.
        name: of the directory, unless the options name one.

    Raises:
        UsageError: it contains a run that may not be replaced.
    """
    output_dir = output_dir_of(options, name)
    found = [each for each in (*RUN_FILES, CHECKPOINTS) if (output_dir / each).exists()]
    if not found or options.overwrite:
        return output_dir
    if options.resume == "auto" and (
        # What a run that was killed before its first checkpoint leaves may be replaced.
        checkpoints(output_dir) or not (output_dir / SUMMARY_FILE).exists()
    ):
        return output_dir
    if options.resume not in (None, "auto") and contains(output_dir, Path(options.resume)):
        return output_dir
    go_on = "continue it with --resume auto, " if checkpoints(output_dir) else ""
    raise UsageError(
        f"--output-dir {output_dir} already contains a run ({found[0]}); "
        f"{go_on}choose another directory or pass --overwrite"
    )


@contextlib.contextmanager
def only_writer(output_dir: Path) -> Iterator[None]:
    """Keep other runs out of a run directory, which is made if missing; a dead run keeps none out.

    Raises:
        UsageError: another run is there, or the directory cannot be written to.
    """
    path, is_held = output_dir / LOCK_FILE, False
    made = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        while not is_held:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if lock(descriptor) is False:
                os.close(descriptor)
                raise UsageError(
                    f"--output-dir {output_dir}: another run is writing there; choose another "
                    "directory, or wait for its end"
                )
            # Not the file of a run that ended, and removed it, in between.
            with contextlib.suppress(FileNotFoundError):
                is_held = os.path.samestat(os.fstat(descriptor), path.stat())
            if not is_held:
                os.close(descriptor)
    except OSError as error:
        raise UsageError(f"--output-dir {output_dir} cannot be written to: {error}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
            for folder in made:  # for a run that was refused, and left nothing
                folder.rmdir()
        os.close(descriptor)


def default_output_dir(name: str) -> Path:
    """Of that name; in a W&B sweep, which varies more than names tell, by sweep and run."""
    sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    if sweep and run:
        return Path("runs") / f"sweep-{sweep}" / run
    return Path("runs") / name


def prepare_output_dir(output_dir: Path, options: RunOptions, resumed_at: int | None) -> None:
    """Make the run directory; empty it of what is replaced, and of files that were never finished.

    Args:
        output_dir: where.
        options: for `resume` and `overwrite`.
        resumed_at: iteration of the checkpoint to go on from, if any.

    Raises:
        UsageError: it cannot be written to.
    """
    folder = output_dir / CHECKPOINTS
    resume = options.resume or ""
    goes_on = resume == "auto" or contains(output_dir, Path(resume))
    make_folder(folder, "--output-dir")
    try:
        remove_unfinished(output_dir)
        paths: list[Path] = []
        if resumed_at is None or not goes_on:
            paths += [output_dir / name for name in RUN_FILES] + checkpoints(output_dir)
        else:
            here, mine = checkpoints(output_dir), checkpoint_name(resumed_at)
            # Killed before the oldest went, a run leaves one too many.
            paths += [p for p in here if p.name <= mine][: -options.keep_checkpoints]
            paths += [p for p in here if p.name > mine and options.overwrite]
        for path in paths:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"--output-dir {output_dir} cannot be written to: {error}") from error


@contextlib.contextmanager
def explaining_disk_failures(output_dir: Path, iteration: int) -> Iterator[None]:
    """Say of a failure to write what is lost by it, and what is not.

    Raises:
        OSError: the failure, with the checkpoint to go on from.
    """
    try:
        yield
    except OSError as error:
        left = checkpoints(output_dir)
        kept = f"{left[-1]} is whole, go on from it" if left else "nothing was saved, begin again"
        raise OSError(
            f"iteration {iteration} could not be saved: {first_line(error)}; "
            f"{kept} with --resume auto"
        ) from error
