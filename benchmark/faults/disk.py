"""A disk that fills up while a run writes to it."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from faults import runs
from faults.runs import Trial
from hydrogel_gym.runs import checkpoints

SMALL = "Disk too small for all checkpoints"
LAST_FILES = "Disk too small for the policy and the pictures"
FILLED = "Disk filled by another program"
LIMITED = "File size limit, for want of a disk to fill"
PLENTY = 2**27


def inflict(work: Path, undisturbed: Path, seed: int, times: int) -> Iterator[Trial]:
    """Let disks fill up, make room, and continue.

    Where no small disk can be mounted, a limit on the size of files is set instead.

    Args:
        work: folder for the run directories.
        undisturbed: directory of a run that kept all its checkpoints.
        seed: of sizes and moments.
        times: trials of a small disk, and of one that is filled.
    """
    rng = random.Random(f"disk {seed}")
    if not can_mount(work):
        for _ in range(2 * times + 1):
            yield limit_files(work / "run", undisturbed, rng)
        return
    sizes = [path.stat().st_size for path in runs.checkpoints(undisturbed)]
    for _ in range(times):
        room = rng.uniform(3.2, runs.ITERATIONS - 2)
        size = int(room * sizes[-1])
        did = f"room for {room:.1f} checkpoints"
        yield outgrow(Trial(SMALL, did), work / "disk", undisturbed, size)
    left = (undisturbed / "stage2_policy.pt").stat().st_size // 2
    trial = Trial(LAST_FILES, f"{left / 1e3:,.0f} kB beyond the checkpoints")
    # Each file takes whole pages.
    pages = sum(-(-size // 4096) * 4096 for size in sizes) + 2**16
    yield outgrow(trial, work / "disk", undisturbed, pages + left)
    for _ in range(times):
        yield fill(work / "disk", undisturbed, rng)


@contextlib.contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    """A disk of a size in bytes, in memory."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def can_mount(work: Path) -> bool:
    """Whether this user may mount a disk here."""
    try:
        with mounted(work / "disk", PLENTY):
            return True
    except (OSError, subprocess.CalledProcessError):
        shutil.rmtree(work / "disk", ignore_errors=True)
        return False


def outgrow(trial: Trial, disk: Path, undisturbed: Path, size: int) -> Trial:
    """A run that keeps every checkpoint, on a disk of this many bytes."""
    run_dir = disk / "run"
    command = runs.command(run_dir, keep=runs.ITERATIONS)
    with mounted(disk, size), runs.noting(trial):
        check(trial, runs.complete(command), run_dir, errno.ENOSPC)
        larger = ["mount", "-o", f"remount,size={PLENTY}", str(disk)]
        subprocess.run(larger, check=True)
        runs.resume(trial, command, run_dir, undisturbed)
    return trial


def fill(disk: Path, undisturbed: Path, rng: random.Random) -> Trial:
    """A run on a disk that is filled to the last byte at some moment."""
    rows, delay = rng.randint(2, runs.ITERATIONS - 4), rng.uniform(0.0, 0.1)
    trial = Trial(FILLED, f"{1e3 * delay:.0f} ms after row {rows}")
    run_dir, filler = disk / "run", disk / "filler"
    command = runs.command(run_dir)
    with mounted(disk, PLENTY):
        with runs.noting(trial):
            with runs.started(command) as process:
                runs.wait_for_rows(process, run_dir, rows)
                time.sleep(delay)
                with filler.open("wb", buffering=0) as file:
                    # Also what a checkpoint that is removed gives back.
                    while process.poll() is None:
                        with contextlib.suppress(OSError):
                            file.write(bytes(2**22))
                        time.sleep(0.001)
                ended = runs.end(process)
            check(trial, ended, run_dir, errno.ENOSPC)
            filler.unlink()
            runs.resume(trial, command, run_dir, undisturbed)
    return trial


def limit_files(run_dir: Path, undisturbed: Path, rng: random.Random) -> Trial:
    """A run that at some moment may write only small files."""
    rows = rng.randint(2, runs.ITERATIONS - 4)
    trial = Trial(LIMITED, f"after row {rows}")
    command = runs.command(run_dir)
    with runs.noting(trial):
        with runs.started(command) as process:
            runs.wait_for_rows(process, run_dir, rows)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
            ended = runs.end(process)
        check(trial, ended, run_dir, errno.EFBIG)
        runs.resume(trial, command, run_dir, undisturbed)
    shutil.rmtree(run_dir, ignore_errors=True)
    return trial


def check(trial: Trial, ended: runs.Ended, run_dir: Path, number: int) -> None:
    """Note how a run met an error of the disk: one line of advice, and a whole checkpoint left."""
    trial.expect(ended.code == 1, f"exit code {ended.code}")
    trial.expect(len(ended.said) == 1, f"said {len(ended.said)} lines: {' / '.join(ended.said)}")
    message = ended.said[-1] if ended.said else ""
    kept = runs.checkpoints(run_dir)
    expected = ("error: ", os.strerror(number), "--resume auto", str(kept[-1]) if kept else "none")
    for part in expected:
        trial.expect(part in message, f"{part!r} is not in the message: {message}")
    try:
        checkpoints.read_checkpoint(kept[-1])
    except (IndexError, checkpoints.CheckpointError) as error:
        trial.problems.append(f"the last checkpoint is not whole: {error}")
    left = [path.name for path in runs.unfinished(run_dir)]
    trial.expect(not left, f"left behind: {', '.join(left)}")
    if not trial.problems:
        trial.saw = "exit code 1, one line that names the whole checkpoint and `--resume auto`"
