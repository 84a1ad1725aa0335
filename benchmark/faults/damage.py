"""A newest checkpoint that is cut off, or in which one bit is wrong."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from faults import runs
from faults.runs import Trial
from hydrogel_gym.runs import checkpoints

CUT = "Newest checkpoint cut off"
FLIPPED = "One bit of the newest checkpoint flipped"


def inflict(work: Path, undisturbed: Path, seed: int, times: int) -> Iterator[Trial]:
    """Damage checkpoints in many places; continue once for each kind of damage.

    Args:
        work: folder for the run directories.
        undisturbed: run directory to compare with.
        seed: of the places.
        times: places for each kind of damage, at least four.
    """
    rng = random.Random(f"damage {seed}")
    killed, run_dir = work / "killed", work / "run"
    command = runs.command(run_dir)
    with runs.started(runs.command(killed)) as process:
        runs.wait_for_rows(process, killed, runs.ITERATIONS // 2)
        process.kill()
        runs.end(process)
    whole = runs.checkpoints(killed)[-1].read_bytes()
    for fault in (CUT, FLIPPED):
        for number, place in enumerate(places(fault, len(whole), times, rng)):
            shutil.copytree(killed, run_dir)
            trial = damage(fault, run_dir, whole, place)
            # The first was drawn at random, like most.
            if number == 0:
                newest, previous = runs.checkpoints(run_dir)[:-3:-1]
                ended = runs.resume(trial, command, run_dir, undisturbed)
                warned = [line for line in ended.said if line.startswith("warning:")]
                trial.expect(
                    len(warned) == 1 and str(newest) in warned[0] and str(previous) in warned[0],
                    f"continued, it said: {' / '.join(ended.said)}",
                )
            shutil.rmtree(run_dir)
            yield trial
    shutil.rmtree(killed)


def places(fault: str, size: int, times: int, rng: random.Random) -> list[int]:
    """Where to damage a file of so many bytes: length to cut it to, or position of a bit."""
    if fault == CUT:
        # Nothing, all but one byte, and a hash that is cut off.
        return [*(rng.randrange(size) for _ in range(times - 3)), 0, size - 1, size - 30]
    # The first bit, the last, and one of the mark before the hash.
    return [*(rng.randrange(8 * size) for _ in range(times - 3)), 0, 8 * size - 1, 8 * (size - 68)]


def damage(fault: str, run_dir: Path, whole: bytes, place: int) -> Trial:
    """Damage the newest checkpoint, and ask the trainer which one it would go on from."""
    newest, previous = runs.checkpoints(run_dir)[:-3:-1]
    if fault == CUT:
        trial = Trial(fault, f"to {place:,} of {len(whole):,} bytes")
        newest.write_bytes(whole[:place])
    else:
        trial = Trial(fault, f"bit {place % 8} of byte {place // 8:,} of {len(whole):,}")
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        newest.write_bytes(damaged)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        chosen = checkpoints.newest_checkpoint(run_dir)
    trial.expect(chosen == previous.read_bytes(), "the one before it was not chosen")
    start, stop = f"warning: checkpoint {newest} cannot be used: ", f"; going back to {previous}\n"
    warning = said.getvalue()
    if warning.startswith(start) and warning.endswith(stop) and warning.count("\n") == 1:
        trial.saw = f"“{warning.removeprefix(start).removesuffix(stop)}”, the one before it used"
    else:
        trial.problems.append(f"said: {warning!r}")
    return trial
