"""Kills, lost ranks, full disks, damaged checkpoints and signals, each a trial of a run."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from robustness.trials import (
    ITERATIONS,
    Ended,
    FaultError,
    Trial,
    command,
    complete,
    end,
    iteration_of,
    rows_written,
    saved,
    started,
    unfinished,
    wait_for_rows,
    wait_until,
)

from hydrogel_gym.runs import checkpoints
from hydrogel_gym.runs.directory import METRICS_FILE, POLICY_FILE, SUMMARY_FILE

KILLED = "`kill -9` at a random moment of the run"
KILLED_IN_A_WRITE = "`kill -9` while a checkpoint is written"
RANK_KILLED = "`kill -9` of rank {} of 2 under `torchrun --max-restarts=1`"
DISK_SMALL = "Disk too small for all checkpoints"
DISK_FILLED = "Disk filled by another program"
DISK_LIMITED = "File size limit, for want of a disk to fill"
CUT = "Newest checkpoint cut off"
FLIPPED = "One bit of the newest checkpoint flipped"
INTERVAL = 3  # between checkpoints, so that there is something to lose
NEVER = 1000  # no checkpoint but what a signal asks for, and the last
PLENTY = 2**27  # bytes of a disk


def undisturbed(work: Path, **options: int) -> tuple[Path, float]:
    """A run that nothing happens to: its directory, and its seconds from start to exit.

    Raises:
        FaultError: it fails.
    """
    run_dir = work / f"undisturbed-{len(list(work.iterdir()))}"
    began = time.perf_counter()
    ended = complete(command(run_dir, **options))
    if ended.code:
        raise FaultError(f"undisturbed, the run ended with {ended.code}: {' / '.join(ended.said)}")
    return run_dir, time.perf_counter() - began


def kills(work: Path, alone: Path, rng: random.Random, times: int) -> Iterator[Trial]:
    """Kill runs at moments between their start and their exit, then continue them."""
    seconds, run_dir = undisturbed(work)[1], work / "run"
    run = command(run_dir, interval=INTERVAL)
    for _ in range(times):
        trial = Trial(KILLED)

        def wait(process: subprocess.Popen, trial: Trial = trial) -> None:
            moment = rng.uniform(0.0, seconds)
            trial.did = f"{moment:.2f} s after the start"
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moment)

        with trial.noting():
            kill(trial, run, run_dir, wait)
            rows = rows_written(run_dir)
            ends = {0: "before the first row", ITERATIONS: "after the last row"}
            trial.saw = ends.get(rows, "in training")
            if unfinished(run_dir):
                trial.saw += ", leaving an unfinished file"
            trial.resume(run, run_dir, alone)
        shutil.rmtree(run_dir, ignore_errors=True)
        yield trial


def kills_in_writes(work: Path, alone: Path, rng: random.Random, times: int) -> Iterator[Trial]:
    """Kill runs the instant that the temporary file of a checkpoint is seen, then continue them."""
    run_dir = work / "run"
    run = command(run_dir)
    for _ in range(times):
        iteration = rng.randint(1, ITERATIONS)
        trial = Trial(KILLED_IN_A_WRITE, f"the first seen from iteration {iteration} on")

        def wait(process: subprocess.Popen, iteration: int = iteration) -> None:
            # As often as it can be looked at: there may be only a millisecond between first sight
            # and the rename.
            while process.poll() is None:
                with contextlib.suppress(FileNotFoundError):
                    for name in os.listdir(run_dir / "checkpoints"):
                        if name.startswith(".") and iteration_of(Path(name)) >= iteration:
                            return

        with trial.noting():
            kill(trial, run, run_dir, wait)
            trial.saw = "renamed before the kill took effect"
            for path in unfinished(run_dir):
                try:
                    checkpoints.unseal(path.read_bytes())
                    trial.saw = "left a temporary file, whole but not renamed"
                except checkpoints.CheckpointError:
                    trial.saw = "left a temporary file that is cut off"
            trial.resume(run, run_dir, alone)
        shutil.rmtree(run_dir, ignore_errors=True)
        yield trial


def kill(
    trial: Trial, run: list[str], run_dir: Path, wait: Callable[[subprocess.Popen], None]
) -> None:
    """Start runs until one was killed before it ended by itself.

    Args:
        trial: counts those that ended.
        run: their command.
        run_dir: theirs.
        wait: returns when it is time to kill.

    Raises:
        FaultError: one failed by itself.
    """
    while True:
        with started(run) as process:
            wait(process)
            process.kill()
            code = end(process).code
        if code == -signal.SIGKILL:
            return
        if code:
            raise FaultError(f"undisturbed, the run ended with exit code {code}")
        shutil.rmtree(run_dir)
        trial.redrawn += 1


def rank_kills(work: Path, _: Path, rng: random.Random, times: int) -> Iterator[Trial]:
    """Kill rank 0 and rank 1 by turns, in the middle of a run, which `torchrun` restarts."""
    pair, run_dir = undisturbed(work, ranks=2)[0], work / "run"
    for rank in (number % 2 for number in range(times)):
        rows, delay = rng.randint(INTERVAL + 1, ITERATIONS - 6), rng.uniform(0.0, 0.1)
        trial = Trial(RANK_KILLED.format(rank), f"{1e3 * delay:.0f} ms after row {rows}")
        with trial.noting():
            with started(command(run_dir, interval=INTERVAL, ranks=2)) as process:
                wait_for_rows(process, run_dir, rows)
                time.sleep(delay)
                before = processes(process.pid)
                newest = iteration_of(saved(run_dir)[-1])
                os.kill(before[rank], signal.SIGKILL)
                killed = time.perf_counter()
                restart(process, before, run_dir / METRICS_FILE)
                trial.seconds = time.perf_counter() - killed
                ended = end(process)
            trial.expect(not ended.code, f"exit code {ended.code}: {' / '.join(ended.said[-3:])}")
            trial.compare(run_dir, pair)
            if trial.same:
                went_on = json.loads((run_dir / SUMMARY_FILE).read_text())["resumed_at_iteration"]
                trial.expect(
                    went_on is not None and went_on >= newest,
                    f"went on after iteration {went_on}, with a checkpoint of {newest} there",
                )
                trial.saw = f"restarted by itself, exit code {ended.code}"
        shutil.rmtree(run_dir, ignore_errors=True)
        yield trial


def restart(launcher: subprocess.Popen, before: dict[int, int], metrics: Path) -> None:
    """Return once other ranks than those before have written a row of metrics."""

    def restarted() -> bool:
        now = set(processes(launcher.pid).values())
        return len(now) == 2 and not now & set(before.values())

    # Until then a row may come from the ranks that were there before.
    wait_until(launcher, restarted, "new ranks")
    old = metrics.stat()
    wait_until(launcher, lambda: metrics.stat().st_mtime_ns != old.st_mtime_ns, "a new row")


def processes(launcher: int) -> dict[int, int]:
    """The process of each rank that a `torchrun` has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent != launcher:
                continue
            variables = (folder / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has just ended
        for variable in variables:
            if variable.startswith(b"RANK="):
                found[int(variable[5:])] = int(folder.name)
    return found


def full_disks(work: Path, alone: Path, rng: random.Random, times: int) -> Iterator[Trial]:
    """Let disks fill up while a run writes to them, make room, and continue.

    Where no small disk can be mounted, a limit on the size of files is set instead.
    """
    if not can_mount(work):
        yield from (limited_files(work / "run", alone, rng) for _ in range(2 * times))
        return
    every = undisturbed(work, keep=ITERATIONS)[0]
    sizes = [path.stat().st_size for path in saved(every)]
    rooms = [rng.uniform(3.2, ITERATIONS - 2) for _ in range(times)]
    small = [(f"room for {room:.1f} checkpoints", int(room * sizes[-1])) for room in rooms]
    # The last one has room for all checkpoints, which take whole pages, and half of the policy.
    pages = sum(-(-size // 4096) * 4096 for size in sizes) + 2**16
    small.append(("for policy and pictures", pages + (every / POLICY_FILE).stat().st_size // 2))
    for did, size in small:
        trial, run_dir = Trial(DISK_SMALL, did), work / "disk" / "run"
        run = command(run_dir, keep=ITERATIONS)
        with mounted(work / "disk", size), trial.noting():
            check(trial, complete(run), run_dir, errno.ENOSPC)
            larger = ["mount", "-o", f"remount,size={PLENTY}", str(work / "disk")]
            subprocess.run(larger, check=True)
            trial.resume(run, run_dir, alone)
        yield trial
    yield from (filled_disk(work / "disk", alone, rng) for _ in range(times))


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


def filled_disk(disk: Path, alone: Path, rng: random.Random) -> Trial:
    """A run on a disk that is filled to the last byte at some moment."""
    rows, delay = rng.randint(2, ITERATIONS - 4), rng.uniform(0.0, 0.1)
    trial = Trial(DISK_FILLED, f"{1e3 * delay:.0f} ms after row {rows}")
    run_dir, filler = disk / "run", disk / "filler"
    run = command(run_dir)
    with mounted(disk, PLENTY), trial.noting():
        with started(run) as process:
            wait_for_rows(process, run_dir, rows)
            time.sleep(delay)
            with filler.open("wb", buffering=0) as file:
                # Also what a checkpoint that is removed gives back.
                while process.poll() is None:
                    with contextlib.suppress(OSError):
                        file.write(bytes(2**22))
                    time.sleep(0.001)
            ended = end(process)
        check(trial, ended, run_dir, errno.ENOSPC)
        filler.unlink()
        trial.resume(run, run_dir, alone)
    return trial


def limited_files(run_dir: Path, alone: Path, rng: random.Random) -> Trial:
    """A run that at some moment may write only small files."""
    rows = rng.randint(2, ITERATIONS - 4)
    trial, run = Trial(DISK_LIMITED, f"after row {rows}"), command(run_dir)
    with trial.noting():
        with started(run) as process:
            wait_for_rows(process, run_dir, rows)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
            ended = end(process)
        check(trial, ended, run_dir, errno.EFBIG)
        trial.resume(run, run_dir, alone)
    shutil.rmtree(run_dir, ignore_errors=True)
    return trial


def check(trial: Trial, ended: Ended, run_dir: Path, number: int) -> None:
    """Note how a run met an error of the disk: one line of advice, and a whole checkpoint left."""
    trial.expect(ended.code == 1, f"exit code {ended.code}")
    trial.expect(len(ended.said) == 1, f"said {len(ended.said)} lines: {' / '.join(ended.said)}")
    message, kept = ended.said[-1] if ended.said else "", saved(run_dir)
    expected = ("error: ", os.strerror(number), "--resume auto", str(kept[-1]) if kept else "none")
    for part in expected:
        trial.expect(part in message, f"{part!r} is not in the message: {message}")
    try:
        checkpoints.read_checkpoint(kept[-1])
    except (IndexError, checkpoints.CheckpointError) as error:
        trial.problems.append(f"the last checkpoint is not whole: {error}")
    left = [path.name for path in unfinished(run_dir)]
    trial.expect(not left, f"left behind: {', '.join(left)}")
    if not trial.problems:
        trial.saw = "exit code 1, one line that names the whole checkpoint and `--resume auto`"


def damages(work: Path, alone: Path, rng: random.Random, times: int) -> Iterator[Trial]:
    """Damage newest checkpoints in many places; continue once for each kind of damage."""
    killed, run_dir = work / "killed", work / "run"
    with started(command(killed)) as process:
        wait_for_rows(process, killed, ITERATIONS // 2)
        process.kill()
        end(process)
    size = saved(killed)[-1].stat().st_size
    for fault in (CUT, FLIPPED):
        for number, place in enumerate(places(fault, size, times, rng)):
            shutil.copytree(killed, run_dir)
            newest, previous = saved(run_dir)[:-3:-1]
            newest.write_bytes(damaged(newest.read_bytes(), fault, place))
            trial, said = Trial(fault, f"{place:,} of {size:,} bytes"), io.StringIO()
            with contextlib.redirect_stderr(said):
                chosen = checkpoints.newest_checkpoint(run_dir)
            trial.expect(chosen == previous.read_bytes(), "the one before it was not chosen")
            start = f"warning: checkpoint {newest} cannot be used: "
            reason = said.getvalue().removeprefix(start).partition(";")[0]
            whole = f"{start}{reason}; going back to {previous}\n"
            trial.expect(said.getvalue() == whole, f"said: {said.getvalue()!r}")
            trial.saw = f"“{reason}”, the one before it used"
            if number == 0:  # the first was drawn at random, like most
                ended = trial.resume(command(run_dir), run_dir, alone)
                warned = [line for line in ended.said if line.startswith("warning:")]
                trial.expect(warned == [whole.strip()], f"said: {' / '.join(ended.said)}")
            shutil.rmtree(run_dir)
            yield trial
    shutil.rmtree(killed)


def places(fault: str, size: int, times: int, rng: random.Random) -> list[int]:
    """Where to damage a file of so many bytes: length to cut it to, or byte of a bit."""
    # At random; and nothing, all but one byte, and a hash or the mark before it that is damaged.
    special = [0, size - 1, size - (30 if fault == CUT else 68)]
    return [*(rng.randrange(size) for _ in range(max(1, times - 3))), *special][:times]


def damaged(whole: bytes, fault: str, place: int) -> bytes:
    """A file's content that is cut off, or has one bit wrong."""
    if fault == CUT:
        return whole[:place]
    content = bytearray(whole)
    content[place] ^= 1 << place % 8
    return bytes(content)


def signals(work: Path, alone: Path, rng: random.Random, times: int) -> Iterator[Trial]:
    """Send each signal so many times, while a run trains."""
    run_dir = work / "run"
    run = command(run_dir, interval=NEVER)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT) * times:
        rows, delay = rng.randint(1, ITERATIONS - 6), rng.uniform(0.0, 0.1)
        trial = Trial(number.name, f"{1e3 * delay:.0f} ms after row {rows}")
        with trial.noting():
            with started(run) as process:
                wait_for_rows(process, run_dir, rows)
                time.sleep(delay)
                done = rows_written(run_dir)
                process.send_signal(number)
                ended = end(process)
            kept, last = [iteration_of(path) for path in saved(run_dir)], rows_written(run_dir)
            # The iteration that was under way; the next where it had just checked for signals.
            trial.expect(bool(kept) and 0 < kept[0] - done <= 2, f"row {done}, saved {kept}")
            goes_on = number == signal.SIGUSR1
            trial.expect(ended.code == (0 if goes_on else 130), f"exit code {ended.code}")
            if goes_on:
                trial.expect(len(kept) == 2, f"saved {kept}")
                trial.saw = "saved, went on to the end, exit code 0"
                trial.compare(run_dir, alone)
            else:
                trial.expect(kept == [last], f"{last} rows, saved {kept}")
                trial.saw = "saved the iteration under way, exit code 130"
                trial.resume(run, run_dir, alone)
        shutil.rmtree(run_dir, ignore_errors=True)
        yield trial
