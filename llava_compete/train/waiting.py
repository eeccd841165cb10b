"""Waiting for ranks that are busy: on the store that they met at, for as long as they show that they are alive.

A collective gives up after its limit, and one rank may read, convert or write for longer than any limit that would
still notice a dead machine. So each rank tells the store every few seconds that it lives, from a thread, and the others
wait for it until that stops.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from llava_compete.errors import UserError

BEAT_SECONDS = 10.0
# Without a sign of life for this long a rank is taken for dead: a network that hangs comes back sooner.
SILENCE_SECONDS = 300.0
LONGEST_PAUSE = 1.0
_GONE = "gone"
# How gloo and NCCL say that another process is no longer there.
_LOST_CONTACT = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL communicator was aborted",
)


class SharedError(UserError):
    """An error that all ranks know of; only rank 0 says it."""


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed since another rank is gone, and not by itself."""
    return any(sign in str(error) for sign in _LOST_CONTACT)


def meet(store: dist.Store, rank: int, world_size: int, place: str, limit: timedelta) -> None:
    """Wait for all ranks to call this with the same `place`; needs no group, so it can tell who stays away.

    Raises:
        SharedError: naming the ranks that have not come within `limit`.
    """
    keys = [f"{place}/{number}" for number in range(world_size)]
    store.set(keys[rank], "here")
    try:
        store.wait(keys, limit)
    except dist.DistStoreError:  # its way of saying that the time is over
        absent = [number for number, key in enumerate(keys) if not store.check([key])]
        raise SharedError(
            f"{_names(absent)} of {world_size} did not come to the {place} within {limit.seconds} s; "
            "is it running, and can its machine reach MASTER_ADDR?"
        ) from None


@contextmanager
def company(store: dist.Store, rank: int, world_size: int) -> Iterator[None]:
    """While entered, this rank shows that it lives, and `wait_for_all` works; one that fails alone tells the others.

    Ranks leave together: a launcher ends the others as soon as one has left, and one of them may still be writing.
    """
    global _company
    _company = _Company(store, rank, world_size)
    try:
        yield
        _company.part()
    except SharedError:
        raise
    except Exception as error:
        if is_lost_contact(error):
            # A launcher tells the others to end as soon as one is gone; who that was is still to be found, and said.
            told = signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if lost := _company.lost():
                _company.say_lost(lost, error)
            signal.signal(signal.SIGTERM, told)
        _company.failed = True
        raise
    except BaseException:
        _company.failed = True
        raise
    finally:
        _company.leave()
        _company = None


def wait_for_all() -> None:
    """Return once all ranks have called this, as a barrier does, but without a limit while the absent ones live.

    Outside of `company` there is nobody to wait for.

    Raises:
        SharedError: an absent rank has left, or has given no sign of life for `SILENCE_SECONDS`.
    """
    if _company is not None:
        _company.wait()


class _Company:
    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.failed = False
        self._waits = 0
        self._last_beat: dict[int, tuple[str, float]] = {}  # of another rank, and when it was new
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)
        if world_size > 1:
            # The run's own may be waiting for an answer. Made here: connecting to a store that is gone takes minutes,
            # for which the end of this rank would wait.
            self._connection = store.clone()
            self._thread.start()

    def _live(self) -> None:
        connection, beats = self._connection, 0
        try:
            while not self._leaving.is_set():
                connection.set(_beat_key(self.rank), str(beats))
                beats += 1
                self._leaving.wait(BEAT_SECONDS)
            if self.failed:
                connection.set(_beat_key(self.rank), _GONE)
        except (dist.DistError, RuntimeError):
            return  # the process that holds the store is gone; whoever needs it finds out

    def leave(self) -> None:
        self._leaving.set()
        if self._thread.ident is not None:
            self._thread.join()

    def wait(self) -> None:
        self._waits += 1
        self._arrive(f"wait/{self._waits}")
        self._wait_for(f"wait/{self._waits}")

    def part(self) -> None:
        self.wait()
        self._arrive("part")
        if self.rank == 0:  # its process may hold the store: it leaves last
            self._wait_for("part")

    def lost(self) -> list[int]:
        """Ranks that ended without a word, once all others have shown that they live; none where one says its error
        itself."""
        others = [number for number in range(self.world_size) if number != self.rank]
        try:
            before = {number: self._beat(number) for number in others}
            silent, begun = others, time.monotonic()
            while silent and time.monotonic() - begun < 1.5 * BEAT_SECONDS:
                time.sleep(BEAT_SECONDS / 10)
                silent = [number for number in silent if self._beat(number) == before[number] != _GONE]
            return [] if any(self._beat(number) == _GONE for number in others) else silent
        except (dist.DistError, RuntimeError):
            return [0] if self.rank else []  # whose process held the store

    def say_lost(self, lost: list[int], error: Exception) -> NoReturn:
        """Raise what is to be said of lost ranks, by the first that is left."""
        text = f"{_names(lost)} of {self.world_size} was lost; the same command goes on from the last checkpoint"
        first = min(number for number in range(self.world_size) if number not in lost)
        raise (SharedError if self.rank > first or self.rank == 0 else UserError)(text) from error

    def _arrive(self, place: str) -> None:
        self.store.set(f"{place}/{self.rank}", "here")

    def _wait_for(self, place: str) -> None:
        keys = [f"{place}/{number}" for number in range(self.world_size)]
        begun, pause = time.monotonic(), 0.001
        while not self.store.check(keys):
            time.sleep(pause)  # not `store.wait`, which writes to the console whenever its time is over
            pause = min(2 * pause, LONGEST_PAUSE)
            if pause == LONGEST_PAUSE:
                self._check_absent(keys, begun)

    def _check_absent(self, keys: list[str], begun: float) -> None:
        absent = [number for number, key in enumerate(keys) if not self.store.check([key])]
        # One that has failed may have come here just before.
        gone = [n for n in absent if self._beat(n) == _GONE and not self.store.check([keys[n]])]
        if gone:
            raise SharedError(f"{_names(gone)} of {self.world_size} has left")
        silent = [n for n in absent if time.monotonic() - max(begun, self._heard(n)) > SILENCE_SECONDS]
        if silent:
            raise SharedError(
                f"{_names(silent)} of {self.world_size} gave no sign of life for {SILENCE_SECONDS:.0f} s; "
                "has its machine failed?"
            )

    def _beat(self, number: int) -> str:
        key = _beat_key(number)
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _heard(self, number: int) -> float:
        """When `number` was last seen to live."""
        beat = self._beat(number)
        if number not in self._last_beat or self._last_beat[number][0] != beat:
            self._last_beat[number] = (beat, time.monotonic())
        return self._last_beat[number][1]


_company: _Company | None = None


def _beat_key(rank: int) -> str:
    return f"beat/{rank}"


def _names(ranks: list[int]) -> str:
    return f"rank {', '.join(map(str, ranks))}"
