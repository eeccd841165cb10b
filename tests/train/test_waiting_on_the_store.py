"""Ranks wait for a busy one for as long as it lives, and for a dead one not for long: two forked ranks."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from ranks_kit import errors_of_ranks, start_ranks

from llava_compete.errors import UserError
from llava_compete.train import distributed, waiting
from llava_compete.train.distributed import Rank, all_or_none, main_first, of_main


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A life of seconds: collectives give up after 2, silence counts from 1.5."""
    monkeypatch.setattr(distributed, "TIMEOUT", distributed.timedelta(seconds=2))
    monkeypatch.setattr(waiting, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(waiting, "SILENCE_SECONDS", 1.5)
    monkeypatch.setattr(waiting, "LONGEST_PAUSE", 0.064)


def test_a_busy_main_rank_is_waited_for() -> None:
    """For longer than any collective would: in each of the places where it works alone, by a pair of ranks for each."""

    def first(rank: Rank, store: Any) -> None:
        with all_or_none(rank, "model"), main_first(rank):
            _work(rank)
        assert of_main(rank.number) == 0

    def inside(rank: Rank, store: Any) -> None:
        with all_or_none(rank, "checkpoint"):
            _work(rank)
        assert of_main(rank.number) == 0

    def before_all(rank: Rank, store: Any) -> None:
        _work(rank)
        waiting.wait_for_all()

    pairs = [start_ranks(place) for place in (first, inside, before_all)]
    assert [wait() for wait in pairs] == [["", ""]] * len(pairs)


def _work(rank: Rank) -> None:
    if rank.is_main:
        time.sleep(3)


def test_a_silent_rank_is_given_up() -> None:
    def work(rank: Rank, store: Any) -> None:
        if rank.number == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        begun = time.monotonic()
        try:
            waiting.wait_for_all()
        finally:
            assert time.monotonic() - begun < 4

    assert errors_of_ranks(work, answers=[0]) == ["rank 1 of 2 gave no sign of life for 2 s; has its machine failed?"]


def test_a_rank_that_failed_alone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "SILENCE_SECONDS", 1000.0)

    def work(rank: Rank, store: Any) -> None:
        if rank.number == 1:
            raise UserError("row 7 is bad")
        waiting.wait_for_all()

    assert errors_of_ranks(work) == ["rank 1 of 2 has left", "row 7 is bad"]


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_is_lost_in_a_step_is_named(number: int) -> None:
    """By one of those that are left, also where the lost one held the store."""

    def work(rank: Rank, store: Any) -> None:
        distributed.dist.all_reduce(distributed.torch.ones(1))  # both have met
        if rank.number == number:
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.dist.all_reduce(distributed.torch.ones(1))

    (said,) = errors_of_ranks(work, answers=[1 - number])
    assert said == f"rank {number} of 2 was lost; the same command goes on from the last checkpoint"


def test_no_rank_leaves_before_the_others_have_ended(tmp_path: Path) -> None:
    """The launcher would end them, and one may be writing."""

    def work(rank: Rank, store: Any) -> None:
        if rank.is_main:
            time.sleep(1)
            (tmp_path / "written").touch()

    def has_left(rank: Rank) -> None:
        if not (tmp_path / "written").exists():
            raise UserError("left early")

    assert errors_of_ranks(work, after=has_left) == ["", ""]


def test_alone_there_is_nobody_to_wait_for() -> None:
    waiting.wait_for_all()
