"""Processes that work for a command: how many, and that none outlives it."""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing import parent_process
from multiprocessing.process import BaseProcess


def usable_cores() -> int:
    """Cores on which this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent() -> None:
    """At the start of a pool's worker: it ends as soon as the process that started it has, however that ended.

    By itself a worker waits for more for ever where its parent was killed, for every worker holds both ends of the
    pool's pipes, so that none is ever told. Ctrl-C in a terminal, which reaches all of them, ends it without a word.
    """
    parent = parent_process()
    if parent is None:
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_after, args=(parent,), name="end-with-parent", daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
