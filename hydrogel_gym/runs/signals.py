"""Signals as requests that training obeys when its iteration is done."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Any

import torch
from torch import Tensor

from hydrogel_gym.runs.ranks import World

# Windows has no SIGHUP.
STOPPING = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


class Signals:
    """Turns signals into requests that training obeys when its iteration is done.

    SIGINT, SIGTERM and SIGHUP (the terminal was closed) ask to save and stop, SIGUSR1 (what batch
    queues send as a warning) to save and go on. A second one does what it always did, unless a
    launcher watches over this process: that one sends every signal again, and kills after a time of
    its own. A signal
    that the process was started to ignore (`nohup`, a job in the background of a shell) stays
    ignored.
    """

    def __init__(self, world: World) -> None:
        self.world, self.stop = world, False
        self._warnings = self._warnings_obeyed = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        # Only the main thread may install handlers; elsewhere the caller keeps control.
        if threading.current_thread() is threading.main_thread():
            handlers: dict[int, Any] = {
                number: self._stop
                for number in STOPPING
                if signal.getsignal(number) is not signal.SIG_IGN
            }
            if hasattr(signal, "SIGUSR1"):  # not on Windows
                handlers[signal.SIGUSR1] = self._warn
            self._previous = {s: signal.signal(s, handler) for s, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requests(self, device: torch.device) -> Tensor:
        """(2,) int32 flags of any rank: stop, save."""
        # Counted, so that none is lost that comes between two of these lines.
        warnings = self._warnings
        save, self._warnings_obeyed = warnings > self._warnings_obeyed, warnings
        flags = torch.tensor([self.stop, save], dtype=torch.int32)
        requested: Tensor = self.world.any(flags.to(device, non_blocking=True))
        return requested

    def _stop(self, number: int, _: object) -> None:
        if not self.world.launched:
            signal.signal(number, self._previous[number])
            # Not print: the signal may have come in the middle of one.
            with contextlib.suppress(OSError):  # a terminal that is gone
                os.write(2, b"\nstopping after this iteration; again to stop at once\n")
        self.stop = True

    def _warn(self, *_: object) -> None:
        self._warnings += 1


def ignore_warnings() -> None:
    """While there is nothing to save, a warning of a batch queue must not end the run."""
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
