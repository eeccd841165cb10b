"""A request to stop reaches the run, once, and none of its loader workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from accelerate import PartialState
from accelerate.data_loader import skip_first_batches
from torch.utils.data import Dataset

from llava_compete import console
from llava_compete.train.stopping import STOP_SIGNALS, StopOnSignal
from llava_compete.train.trainer import StageLoader


@pytest.fixture
def killed() -> Iterator[list[int]]:
    """What would have ended the process."""
    received: list[int] = []
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in STOP_SIGNALS}
    yield received
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_asks_to_stop(killed: list[int], number: signal.Signals) -> None:
    trainer = SimpleNamespace(stop_requested=False)
    with StopOnSignal(trainer):
        os.kill(os.getpid(), number)
        assert trainer.stop_requested
    assert not killed
    os.kill(os.getpid(), number)
    assert killed == [number]


def test_a_request_to_stop_may_come_twice_at_once(killed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = SimpleNamespace(stop_requested=False)
    with StopOnSignal(trainer):
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert trainer.stop_requested
        assert not killed
        monkeypatch.setattr(StopOnSignal, "ECHO_SECONDS", -1.0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert killed == [signal.SIGTERM]


def test_what_nohup_ignores_stays_ignored(killed: list[int]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    trainer = SimpleNamespace(stop_requested=False)
    with StopOnSignal(trainer):
        os.kill(os.getpid(), signal.SIGHUP)
        assert not trainer.stop_requested
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


class _Rows(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("skipped", [0, 5])
def test_loader_workers_do_not_hear_a_request_to_stop(skipped: int) -> None:
    """Nor in an epoch that a run goes on in, where accelerate makes another loader."""
    rows = [[n] for n in range(skipped + 50)]
    loader: Any = StageLoader(_Rows(), batch_sampler=rows, num_workers=2, collate_fn=lambda row: row[0] - skipped)
    if skipped:
        PartialState(cpu=True)
        loader = skip_first_batches(loader, skipped)
        PartialState._reset_state()
    before = psutil.Process().children()  # such as what an earlier test's pool left to track its shared memory
    batches = iter(loader)
    workers = [child for child in psutil.Process().children() if child not in before]
    assert len(workers) == 2
    for number in STOP_SIGNALS:
        for worker in workers:  # before they have run a line, and after
            worker.send_signal(number)
    assert [next(batches) for _ in range(10)] == list(range(10))
    for worker in workers:
        worker.terminate()
    assert list(batches) == list(range(10, 50))
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(STOP_SIGNALS)
    del batches
    assert psutil.wait_procs(workers, timeout=20)[1] == []


def test_a_reader_that_leaves_does_not_end_the_writer() -> None:
    """As in `... 2>&1 | tee log`, when Ctrl-C has ended tee."""
    script = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("console", sys.argv[1])
console = importlib.util.module_from_spec(spec)
spec.loader.exec_module(console)
console.outlive_the_reader()
sys.stderr.write("before\\n")
sys.stdin.read()
for _ in range(3):
    sys.stderr.write("after\\n"); print("after", flush=True); os.write(2, b"a library\\n")
sys.exit(7)
"""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # The module without its package, which takes seconds to import.
    process = subprocess.Popen([sys.executable, "-c", script, console.__file__], **pipes)
    assert process.stderr.readline() == b"before\n"
    process.stderr.close()
    process.stdout.close()
    process.stdin.close()
    assert process.wait(timeout=60) == 7
