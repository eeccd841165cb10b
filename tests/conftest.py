"""Shared fixtures: tests' helper modules (tiny models, golden vectors) are importable by name."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True, scope="session")
def _no_thread_for_a_gpu_that_is_not_there() -> None:
    """The first backward pass of a process starts a thread for each GPU, and fake tensors, torch.compile's too, make
    torch believe in one. Ranks forked from a process with such a thread cannot go backwards; so the first is here."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture(autouse=True, scope="module")
def _no_group_left() -> Iterator[None]:
    """Stages that ran in this process, and libraries that they used, leave no process group to the next file."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
    for name in LAUNCHER:
        os.environ.pop(name, None)


@pytest.fixture(autouse=True, scope="module")
def _little_to_collect() -> None:
    """What is alive when a file begins, half a million objects of libraries above all, is not looked through again:
    accelerate collects garbage at the start of each stage, which was half of a tiny stage's time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()
