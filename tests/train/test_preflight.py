"""The rank that cannot take part is named before anything is loaded: real process groups of two forked ranks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llava_compete.errors import UserError
from llava_compete.train import distributed, preflight
from llava_compete.train.callbacks.between_steps import StopOnSignal
from llava_compete.train.distributed import Rank

HOST = socket.gethostname()


def _rank(number: int, port: int, action: Callable[[Rank, Any], None], sender: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rank = Rank(number, number, 2, on_gpu=False)
    try:
        with distributed.process_group(rank) as store:
            action(rank, store)
        sender.send("")
    except UserError as error:
        sender.send(str(error))
    os._exit(0)


def _errors(action: Callable[[Rank, Any], None], ranks: Sequence[int] = (0, 1)) -> list[str]:
    """The message of each rank; "" where all went well."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in ranks]
    processes = [
        context.Process(target=_rank, args=(number, port, action, sender))
        for number, (_, sender) in zip(ranks, pipes, strict=True)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()
    try:
        return [_answer(receiver) for receiver, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answer(receiver: Any) -> str:
    try:
        return receiver.recv() if receiver.poll(60) else "no answer"
    except EOFError:  # ended by another error: the others have gone
        return "died"


def test_ranks_that_fit_pass(tmp_path: Path) -> None:
    def check(rank: Rank, store: Any) -> None:
        preflight.check_links(rank, store)
        preflight.check_alike(rank, tmp_path)

    assert _errors(check) == ["", ""]
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"torch": "1.0"}, f"rank 1 on {HOST} has torch 1.0, rank 0 has torch 2"),
        ({"peft": None}, f"rank 1 on {HOST} has no peft, rank 0 has peft "),
        ({"extra": "3"}, f"rank 1 on {HOST} has extra 3, rank 0 has no extra"),
    ],
)
def test_other_versions_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    def check(rank: Rank, store: Any) -> None:
        if rank.number == 1:
            versions = {**preflight.package_versions(), **change}
            monkeypatch.setattr(preflight, "package_versions", lambda: {k: v for k, v in versions.items() if v})
        preflight.check_alike(rank, tmp_path)

    for error in _errors(check):
        assert error.startswith(message)


def test_an_output_directory_that_is_not_shared_is_named(tmp_path: Path) -> None:
    errors = _errors(lambda rank, _: preflight.check_alike(rank, tmp_path / f"node{rank.number}"))
    assert errors[0] == f"rank 1 on {HOST} does not see {tmp_path}/node0, where rank 0 writes; share it"


def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "JOIN_LIMIT", timedelta(seconds=2))
    (error,) = _errors(lambda rank, store: None, ranks=[0])
    assert error.startswith("rank 1 of 2 did not come to the start within 2 s")


def test_a_rank_that_hangs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "LIMIT", timedelta(seconds=2))

    def check(rank: Rank, store: Any) -> None:
        if rank.number == 1:
            time.sleep(4)
        preflight.check_links(rank, store)

    assert _errors(check)[0].startswith("rank 1 of 2 did not come to the preflight within 2 s")


def test_a_disk_too_small_for_a_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    preflight.check_space(tmp_path, 10**7, 10**7)
    with pytest.raises(UserError, match=r"1\.00 GiB free, a checkpoint needs about 18\.63 GiB"):
        preflight.check_space(tmp_path, 10**9, 10**9)


def test_a_request_to_stop_may_come_twice_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: killed.append(number))
    trainer: Any = SimpleNamespace(stop_requested=False)
    try:
        with StopOnSignal(trainer):
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
                os.kill(os.getpid(), number)
            assert trainer.stop_requested
            assert not killed
            monkeypatch.setattr(StopOnSignal, "ECHO_SECONDS", -1.0)
            os.kill(os.getpid(), signal.SIGTERM)
            assert killed == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
