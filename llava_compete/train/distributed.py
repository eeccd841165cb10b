"""The process group of a run: started before anything else, destroyed at the end, its failures in one line.

Works under the `deepspeed` launcher, under torchrun, and alone (one process, a free port).
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
from llava_compete.train import waiting
from llava_compete.train.waiting import SharedError, meet, wait_for_all

T = TypeVar("T")

# Of a collective, which all ranks come to at about the same time; where one may be late for long, they `wait_for_all`.
TIMEOUT = timedelta(minutes=30)
# Importing from a slow shared disk keeps some ranks back; one that has not come by then has not been started.
JOIN_LIMIT = timedelta(minutes=5)


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
    """Read the launcher's environment; a process started without one is a world of its own.

    Raises:
        UserError: a number there is none.
    """
    read = {name: _whole_number(name, default) for name, default in _ALONE.items()}
    return Rank(read["RANK"], read["LOCAL_RANK"], read["WORLD_SIZE"], torch.cuda.is_available())


_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def _whole_number(name: str, default: str) -> int:
    value = os.environ.get(name, default)
    if not value.strip().isdecimal():
        raise UserError(f"{name}={value}: expected a whole number")
    return int(value)


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
    elif _whole_number("MASTER_PORT", "") > 65535:
        raise UserError(f"MASTER_PORT={os.environ['MASTER_PORT']}: expected at most 65535")
    if not rank.on_gpu:
        # Gloo does; DeepSpeed would compile a kernel for this with the user's C++ compiler, for a minute or more.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    address = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"
    try:
        store = _open_store(rank)
        meet(store, rank.number, rank.world_size, "start", JOIN_LIMIT)
        store = _outliving_launcher(store, rank)
        _check_devices(store, rank)
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
        with waiting.company(store, rank.number, rank.world_size):
            yield store
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if own_port:  # a second run in this process finds another
            del os.environ["MASTER_PORT"]


def _open_store(rank: Rank) -> dist.Store:
    """The rendezvous: small keys and values that all ranks see."""
    port = int(os.environ["MASTER_PORT"])
    if not _is_agents_store():
        return _tcp_store(rank, port, serves=rank.is_main)
    # It stays where the agent starts the ranks anew (--max-restarts), and so do the keys of those before them.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"start {start}", _tcp_store(rank, port, serves=False))


def _is_agents_store() -> bool:
    """Whether it is torchrun's agent that serves the rendezvous, and not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _outliving_launcher(met: dist.Store, rank: Rank) -> dist.Store:
    """The store of the run: the one where ranks met, or rank 0's where that one would go with the launcher.

    Ranks whose launcher was killed still have to save, and wait for each other meanwhile.
    """
    if not _is_agents_store():
        return met
    if not rank.is_main:
        return _tcp_store(rank, int(met.get(_PORT_KEY)), serves=False)
    store = _tcp_store(rank, 0, serves=True)
    met.set(_PORT_KEY, str(store.port))
    return store


_PORT_KEY = "port of rank 0"


def _tcp_store(rank: Rank, port: int, serves: bool) -> dist.TCPStore:
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        port,
        rank.world_size,
        is_master=serves,
        timeout=JOIN_LIMIT,
        wait_for_workers=False,
    )


def _check_devices(store: dist.Store, rank: Rank) -> None:
    """Take this rank's GPU. Where GPUs were asked for, by NUM_GPUS, no rank trains on the CPU instead.

    Raises:
        SharedError: a rank has no usable GPU.
    """
    store.set(f"device/{rank.number}", _device_problem(rank))
    problems = [store.get(f"device/{number}").decode() for number in range(rank.world_size)]
    store.set(f"device/{rank.number}/read", "")
    if rank.is_main:  # its process may hold the store: it does not leave before all have read
        store.wait([f"device/{number}/read" for number in range(rank.world_size)], JOIN_LIMIT)
    for problem in filter(None, problems):
        raise SharedError(problem)
    if rank.on_gpu:
        torch.cuda.set_device(rank.local_index)


def _device_problem(rank: Rank) -> str:
    wanted = _whole_number("NUM_GPUS", "1" if rank.on_gpu else "0")
    usable = torch.cuda.device_count() if rank.on_gpu else 0
    if wanted == 0 or rank.local_index < usable:
        return ""
    reason = ""
    if not usable:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            reason = f" ({_first_line(error)})"
    return (
        f"rank {rank.number} on {socket.gethostname()}: NUM_GPUS is {wanted}, found {usable or 'no'} usable GPU"
        f"{'s' if usable > 1 else ''}{reason}; NUM_GPUS=0 trains on the CPU"
    )


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
    """Rank 0's value, on all ranks, however long it works on it; what it read from disk may not be everywhere yet."""
    wait_for_all()
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
    wait_for_all()
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
