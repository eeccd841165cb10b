"""The process group of a run: started before anything else, destroyed at the end, its failures in one line.

Works under the `deepspeed` launcher, under torchrun, and alone (one process, a free port). Called by run.py only.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar

import deepspeed
import torch
import torch.distributed as dist

from llava_compete.errors import UserError

T = TypeVar("T")

# Long enough for rank 0 to convert a data set while the others wait.
TIMEOUT = timedelta(minutes=30)
# Importing from a slow shared disk keeps some ranks back; one that has not come by then has not been started.
JOIN_LIMIT = timedelta(minutes=5)


class SharedError(UserError):
    """An error that all ranks know of; only rank 0 says it."""


class Rank(NamedTuple):
    """Who this process is."""

    number: int
    local_index: int
    world_size: int
    on_gpu: bool

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the console."""
        return self.number == 0


def this_rank() -> Rank:
    """Read the launcher's environment; a process started without one is a world of its own."""
    read = {name: int(os.environ.get(name, default)) for name, default in _ALONE.items()}
    return Rank(read["RANK"], read["LOCAL_RANK"], read["WORLD_SIZE"], torch.cuda.is_available())


_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


@contextmanager
def process_group(rank: Rank) -> Iterator[dist.Store]:
    """Hold the default process group (gloo on CPU, NCCL beside gloo on GPU); gives the store that ranks met at.

    Raises:
        UserError: the rendezvous port is taken or other ranks did not come.
    """
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    own_port = rank.world_size == 1 and "MASTER_PORT" not in os.environ
    if own_port:
        os.environ["MASTER_PORT"] = str(_free_port())
    if rank.on_gpu:
        torch.cuda.set_device(rank.local_index)
    else:
        # Gloo does; DeepSpeed would compile a kernel for this with the user's C++ compiler, for a minute or more.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    address = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"
    try:
        store = _open_store(rank)
        meet(store, rank, "start", JOIN_LIMIT)
        backend = "cpu:gloo,cuda:nccl" if rank.on_gpu else "gloo"
        dist.init_process_group(
            backend,
            timeout=TIMEOUT,
            store=dist.PrefixStore("group", store),
            rank=rank.number,
            world_size=rank.world_size,
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise UserError(f"port in use: {address}; set MASTER_PORT to a free port") from error
        raise UserError(f"rank {rank.number}: no process group at {address}: {_first_line(error)}") from error
    try:
        yield store
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if own_port:  # a second run in this process finds another
            del os.environ["MASTER_PORT"]


def _open_store(rank: Rank) -> dist.Store:
    """The rendezvous: small keys and values that all ranks see."""
    # Under torchrun its agent serves the store already.
    serves = rank.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        rank.world_size,
        is_master=serves,
        timeout=JOIN_LIMIT,
        wait_for_workers=False,
    )


def meet(store: dist.Store, rank: Rank, place: str, limit: timedelta) -> None:
    """Wait for all ranks to call this with the same `place`; needs no group, so it can tell who stays away.

    Raises:
        SharedError: naming the ranks that have not come within `limit`.
    """
    keys = [f"{place}/{number}" for number in range(rank.world_size)]
    store.set(keys[rank.number], "here")
    try:
        store.wait(keys, limit)
    except dist.DistStoreError:  # its way of saying that the time is over
        absent = [str(number) for number, key in enumerate(keys) if not store.check([key])]
        raise SharedError(
            f"rank {', '.join(absent)} of {rank.world_size} did not come to the {place} within {limit.seconds} s; "
            "is it running, and can its machine reach MASTER_ADDR?"
        ) from None


def main_first(rank: Rank) -> _MainFirst:
    """`with main_first(rank):` rank 0 runs the body before the others do (it writes what they read)."""
    return _MainFirst(rank)


class _MainFirst:
    def __init__(self, rank: Rank) -> None:
        self.rank = rank

    def __enter__(self) -> None:
        if not self.rank.is_main and not self._share(None):
            raise UserError("rank 0 failed")  # before the body, which would miss what rank 0 was to write

    def __exit__(self, kind: object, *_: object) -> None:
        if self.rank.is_main:
            self._share(kind is None)

    @staticmethod
    def _share(succeeded: bool | None) -> bool:
        """Rank 0 tells the others whether its body went well."""
        return bool(of_main(succeeded))


def of_main(value: T) -> T:
    """Rank 0's value, on all ranks; what it read from disk may not be everywhere yet."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def all_or_none(rank: Rank, what: str) -> Iterator[None]:
    """A `UserError` of one rank inside becomes a `SharedError` on all.

    Other exceptions are bugs and leave at once: the launcher then ends the other ranks.
    """
    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    messages: list[str | None] = [None] * rank.world_size
    dist.all_gather_object(messages, message)
    for index, found in enumerate(messages):
        if found is not None:
            raise SharedError(found if index == 0 else f"rank {index}: {what}: {found}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
