"""How a stage is asked to stop: it saves after the step and leaves with status 143, to go on another time.

`kill` and schedulers send SIGTERM or SIGUSR1, a terminal SIGINT (Ctrl-C) or, when it is closed, SIGHUP.
"""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.context import ForkContext, ForkProcess
from types import FrameType
from typing import Any, Protocol

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# Exit status of a stage that was stopped before its end, whichever signal it was: 128 + SIGTERM.
STOPPED = 143


class Stoppable(Protocol):
    """What looks at its flag once a step."""

    stop_requested: bool


class StopOnSignal:
    """While entered, a signal asks the trainer to save and stop after the step; asked later again, it kills.

    One request often arrives twice: Ctrl-C, systemd and Slurm signal the launchers and the ranks, and the launchers
    pass it on. What comes within `ECHO_SECONDS` is the same request.
    """

    ECHO_SECONDS = 5.0

    def __init__(self, trainer: Stoppable) -> None:
        self.trainer = trainer
        self._asked: float | None = None

    def __enter__(self) -> None:
        # `nohup` and a shell's `&` have some of them ignored, and that is to stay.
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous: dict[signal.Signals, Any] = {number: signal.signal(number, self._request) for number in heard}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
        elif now - self._asked > self.ECHO_SECONDS:
            signal.signal(number, self._previous[signal.Signals(number)])
            os.kill(os.getpid(), number)
        self.trainer.stop_requested = True


class _DeafProcess(ForkProcess):
    def start(self) -> None:
        """With the signals blocked, and not ignored by the child once it runs: they may arrive before it does."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class DeafContext(ForkContext):
    """Starts processes that never get these signals.

    A loader worker that left at the first of them would end the run, which waits for its data, before it has saved.
    """

    Process = _DeafProcess
