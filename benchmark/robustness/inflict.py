"""Kills, lost ranks, full disks, damaged checkpoints and signals, each inflicted once in a trial.

A fault is a function of a trial, whose outcome it notes, of the ground it has, and of the number of
the trial among those of its kind.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from robustness import trials
from robustness.trials import ITERATIONS, Ended, FaultError, Trial, command, end, started

from hydrogel_gym.runs import checkpoints
from hydrogel_gym.runs.directory import METRICS_FILE, POLICY_FILE, SUMMARY_FILE

CUT, FLIPPED = "Newest checkpoint cut off", "One bit of the newest checkpoint flipped"
INTERVAL = 3  # between checkpoints, so that there is something to lose
PLENTY = 2**27  # bytes of a disk


@dataclass
class Ground:
    """Where faults are inflicted, with what random numbers, and runs to compare with."""

    work: Path
    rng: random.Random

    @property
    def run_dir(self) -> Path:
        """Of the run that suffers; to be removed after each trial."""
        return self.work / "run"

    def undisturbed(self, name: str, **options: int) -> tuple[Path, float]:
        """A run that nothing happens to: its directory, and its seconds from start to exit."""
        began = time.perf_counter()
        ended = trials.complete(command(self.work / name, **options))
        if ended.code:
            raise FaultError(f"undisturbed, a run ended with {ended.code}: {ended.said}")
        return self.work / name, time.perf_counter() - began

    @functools.cached_property
    def alone(self) -> tuple[Path, float]:
        """A run of one process that keeps every checkpoint, and its seconds."""
        self.undisturbed("first")  # what it takes from the disk, the others find in memory
        return self.undisturbed("alone", keep=ITERATIONS)

    @functools.cached_property
    def pair(self) -> Path:
        """A run of two ranks."""
        return self.undisturbed("pair", ranks=2)[0]

    @functools.cached_property
    def killed(self) -> dict[str, bytes]:
        """The files of a run that was killed half way."""
        run_dir = self.work / "killed"
        with started(command(run_dir)) as process:
            trials.wait_for_rows(process, run_dir, ITERATIONS // 2)
            process.kill()
            end(process)
        paths = [path for path in run_dir.rglob("*") if path.is_file()]
        return {str(path.relative_to(run_dir)): path.read_bytes() for path in paths}

    def wait(self, trial: Trial, process: subprocess.Popen, run_dir: Path) -> None:
        """Wait for a moment of the run that is drawn at random."""
        rows, delay = self.rng.randint(INTERVAL + 1, ITERATIONS - 6), self.rng.uniform(0.0, 0.1)
        trial.did = f"{1e3 * delay:.0f} ms after row {rows}"
        trials.wait_for_rows(process, run_dir, rows)
        time.sleep(delay)


def kill(trial: Trial, ground: Ground, _: int) -> None:
    """Kill a run at a moment between its start and its exit, then continue it."""
    trial.fault = "`kill -9` at a random moment of the run"
    run, run_dir = command(ground.run_dir, interval=INTERVAL), ground.run_dir

    def wait(process: subprocess.Popen) -> None:
        moment = ground.rng.uniform(0.0, ground.alone[1])
        trial.did = f"{moment:.2f} s after the start"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)

    kill_after(wait, run)
    ends = {0: "before the first row", ITERATIONS: "after the last row"}
    trial.saw = ends.get(trials.rows_written(run_dir), "in training")
    if trials.unfinished(run_dir):
        trial.saw += ", leaving an unfinished file"
    trial.resume(run, run_dir, ground.alone[0])


def kill_in_a_write(trial: Trial, ground: Ground, _: int) -> None:
    """Kill a run the instant that the temporary file of a checkpoint is seen, then continue it."""
    trial.fault = "`kill -9` while a checkpoint is written"
    run, run_dir, iteration = command(ground.run_dir), ground.run_dir, ground.rng.randint(1, 17)
    trial.did = f"the first seen from iteration {iteration} on"

    def wait(process: subprocess.Popen) -> None:
        # As often as it can be looked at: there may be only a millisecond between first sight and
        # the rename.
        while process.poll() is None:
            with contextlib.suppress(FileNotFoundError):
                for name in os.listdir(run_dir / "checkpoints"):
                    if name.startswith(".") and trials.iteration_of(Path(name)) >= iteration:
                        return

    kill_after(wait, run)
    trial.saw = "renamed before the kill took effect"
    for path in trials.unfinished(run_dir):
        try:
            checkpoints.unseal(path.read_bytes())
            trial.saw = "left a temporary file, whole but not renamed"
        except checkpoints.CheckpointError:
            trial.saw = "left a temporary file that is cut off"
    trial.resume(run, run_dir, ground.alone[0])


def kill_after(wait: Callable[[subprocess.Popen], None], run: list[str]) -> None:
    """Start a run and kill it when `wait` returns; it may just have ended by itself."""
    with started(run) as process:
        wait(process)
        process.kill()
        if (code := end(process).code) not in (0, -signal.SIGKILL):
            raise FaultError(f"undisturbed, the run ended with exit code {code}")


def kill_rank(trial: Trial, ground: Ground, number: int) -> None:
    """Kill rank 0 or, by turns, rank 1 in the middle of a run, which `torchrun` restarts."""
    trial.fault = f"`kill -9` of rank {number % 2} of 2 under `torchrun --max-restarts=1`"
    metrics, pair = ground.run_dir / METRICS_FILE, ground.pair
    with started(command(ground.run_dir, interval=INTERVAL, ranks=2)) as process:
        ground.wait(trial, process, ground.run_dir)
        before = ranks_of(process.pid)
        newest = trials.iteration_of(trials.saved(ground.run_dir)[-1])
        os.kill(before[number % 2], signal.SIGKILL)
        killed = time.perf_counter()

        def restarted() -> bool:
            now = set(ranks_of(process.pid).values())
            return len(now) == 2 and not now & set(before.values())

        # Until then a row may come from the ranks that were there before.
        trials.wait_until(process, restarted, "new ranks")
        old = metrics.stat().st_mtime_ns
        trials.wait_until(process, lambda: metrics.stat().st_mtime_ns != old, "a new row")
        trial.seconds = time.perf_counter() - killed
        ended = end(process)
    trial.expect(not ended.code, f"exit code {ended.code}: {' / '.join(ended.said[-3:])}")
    trial.compare(ground.run_dir, pair)
    if trial.same:
        went_on = json.loads((ground.run_dir / SUMMARY_FILE).read_text())["resumed_at_iteration"]
        said = f"went on after iteration {went_on}, with a checkpoint of {newest} there"
        trial.expect(went_on is not None and went_on >= newest, said)
        trial.saw = f"restarted by itself, exit code {ended.code}"


def ranks_of(launcher: int) -> dict[int, int]:
    """The process of each rank that a `torchrun` has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == launcher:
                variables = (folder / "environ").read_bytes().split(b"\0")
                ranks = [word[5:] for word in variables if word.startswith(b"RANK=")]
                found |= {int(rank): int(folder.name) for rank in ranks}
    return found


def fill_disk(trial: Trial, ground: Ground, number: int) -> None:
    """Let a disk fill up while a run writes to it, make room, and continue.

    Where no small disk can be mounted, a limit on the size of files is set instead.
    """
    alone, disk = ground.alone[0], ground.work / "disk"
    try:
        with mounted(disk, PLENTY):
            pass
    except (OSError, subprocess.CalledProcessError):
        return limit_files(trial, ground)
    trial.fault = "Disk too small for all checkpoints"
    sizes = [path.stat().st_size for path in trials.saved(alone)]
    room = ground.rng.uniform(3.2, ITERATIONS - 2)
    trial.did, size = f"room for {room:.1f} checkpoints", int(room * sizes[-1])
    if number == 0:  # room for all checkpoints, which take whole pages, and half of the policy
        trial.fault = "Disk too small for the policy and the pictures"
        pages = sum(-(-size // 4096) * 4096 for size in sizes) + 2**16
        trial.did, size = "", pages + (alone / POLICY_FILE).stat().st_size // 2
    run = command(disk / "run", keep=ITERATIONS)
    with mounted(disk, size):
        check(trial, trials.complete(run), disk / "run", errno.ENOSPC)
        larger = ["mount", "-o", f"remount,size={PLENTY}", str(disk)]
        subprocess.run(larger, check=True)
        trial.resume(run, disk / "run", alone)


@contextlib.contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    """A disk of a size in bytes, in memory."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def limit_files(trial: Trial, ground: Ground) -> None:
    """A run that at some moment may write only small files."""
    trial.fault, run = "File size limit, for want of a disk to fill", command(ground.run_dir)
    with started(run) as process:
        ground.wait(trial, process, ground.run_dir)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
        ended = end(process)
    check(trial, ended, ground.run_dir, errno.EFBIG)
    trial.resume(run, ground.run_dir, ground.alone[0])


def check(trial: Trial, ended: Ended, run_dir: Path, number: int) -> None:
    """Note how a run met an error of the disk: one line of advice, and a whole checkpoint left."""
    trial.expect(ended.code == 1, f"exit code {ended.code}")
    trial.expect(len(ended.said) == 1, f"said {len(ended.said)} lines: {' / '.join(ended.said)}")
    message, kept = ended.said[-1] if ended.said else "", trials.saved(run_dir)
    expected = ("error: ", os.strerror(number), "--resume auto", str(kept[-1]) if kept else "none")
    for part in expected:
        trial.expect(part in message, f"{part!r} is not in the message: {message}")
    try:
        checkpoints.read_checkpoint(kept[-1])
    except (IndexError, checkpoints.CheckpointError) as error:
        trial.problems.append(f"the last checkpoint is not whole: {error}")
    left = [path.name for path in trials.unfinished(run_dir)]
    trial.expect(not left, f"left behind: {', '.join(left)}")
    if not trial.problems:
        trial.saw = "exit code 1, one line that names the whole checkpoint and `--resume auto`"


def damage(trial: Trial, ground: Ground, number: int) -> None:
    """Damage the newest checkpoint, cut off or by one bit in turn; continue the first of each."""
    trial.fault, run_dir = (CUT, FLIPPED)[number % 2], ground.run_dir
    for name, content in ground.killed.items():
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_bytes(content)
    newest, previous = trials.saved(run_dir)[:-3:-1]
    whole = newest.read_bytes()
    place = place_of(trial.fault, len(whole), number // 2, ground.rng)
    trial.did, said = f"at {place:,} of {len(whole):,} bytes", io.StringIO()
    newest.write_bytes(damaged(whole, trial.fault, place))
    with contextlib.redirect_stderr(said):
        chosen = checkpoints.newest_checkpoint(run_dir)
    trial.expect(chosen == previous.read_bytes(), "the one before it was not chosen")
    start, stop = f"warning: checkpoint {newest} cannot be used: ", f"; going back to {previous}\n"
    warning = said.getvalue()
    reason = warning.removeprefix(start).removesuffix(stop)
    trial.expect(warning == f"{start}{reason}{stop}" and "\n" not in reason, f"said: {warning!r}")
    trial.saw = f"“{reason}”, the one before it used"
    if number < 2:
        ended = trial.resume(command(run_dir), run_dir, ground.alone[0])
        warned = [line for line in ended.said if line.startswith("warning:")]
        trial.expect(warned == [warning.strip()], f"continued, it said: {' / '.join(ended.said)}")


def place_of(fault: str, size: int, number: int, rng: random.Random) -> int:
    """Where to damage a file of so many bytes: length to cut it to, or byte of a bit."""
    # Nothing, all but one byte, and a hash, or the mark before it, that is damaged; then at random.
    special = [0, size - 1, size - (30 if fault == CUT else 68)]
    return special[number] if number < len(special) else rng.randrange(size)


def damaged(whole: bytes, fault: str, place: int) -> bytes:
    """A file's content that is cut off, or has one bit wrong."""
    if fault == CUT:
        return whole[:place]
    content = bytearray(whole)
    content[place] ^= 1 << place % 8
    return bytes(content)


def send_signal(trial: Trial, ground: Ground, number: int) -> None:
    """Send a signal that asks a run to save or, by turns, to save and stop, while it trains."""
    sent = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)[number % 3]
    # No checkpoint is written but what the signal asks for, and the last.
    trial.fault, run_dir = sent.name, ground.run_dir
    run = command(run_dir, interval=1000)
    with started(run) as process:
        ground.wait(trial, process, run_dir)
        done = trials.rows_written(run_dir)
        process.send_signal(sent)
        ended = end(process)
    kept = [trials.iteration_of(path) for path in trials.saved(run_dir)]
    last, goes_on = trials.rows_written(run_dir), sent == signal.SIGUSR1
    # The iteration that was under way; the next where it had just checked for signals.
    trial.expect(bool(kept) and 0 < kept[0] - done <= 2, f"row {done}, saved {kept}")
    trial.expect(ended.code == (0 if goes_on else 130), f"exit code {ended.code}")
    trial.expect(kept[1:] == [ITERATIONS] if goes_on else kept == [last], f"saved {kept}")
    if goes_on:
        trial.saw = "saved, went on to the end, exit code 0"
        trial.compare(run_dir, ground.alone[0])
    else:
        trial.saw = "saved the iteration under way, exit code 130"
        trial.resume(run, run_dir, ground.alone[0])
