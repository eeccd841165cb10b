"""Forked ranks with a real process group, for tests of what they say to each other."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

from llava_compete.errors import UserError
from llava_compete.train import distributed
from llava_compete.train.distributed import Rank


def _rank(number: int, port: int, action: Callable[[Rank, Any], None], after: Callable[[Rank], None], out: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rank = Rank(number, number, 2, on_gpu=False)
    try:
        with distributed.process_group(rank) as store:
            action(rank, store)
        after(rank)
        out.send("")
    except UserError as error:
        out.send(str(error))
    os._exit(0)


def errors_of_ranks(
    action: Callable[[Rank, Any], None],
    *,
    ranks: Sequence[int] = (0, 1),
    answers: Sequence[int] | None = None,
    after: Callable[[Rank], None] = lambda rank: None,
) -> list[str]:
    """The message of each rank (or of those in `answers`); "" where all went well.

    Args:
        action: what a rank of a world of two does with the store, inside the process group.
        ranks: those that are started.
        after: what it does once it has left the group.
    """
    return start_ranks(action, ranks=ranks, answers=answers, after=after)()


def start_ranks(
    action: Callable[[Rank, Any], None],
    *,
    ranks: Sequence[int] = (0, 1),
    answers: Sequence[int] | None = None,
    after: Callable[[Rank], None] = lambda rank: None,
    port: int | None = None,
) -> Callable[[], list[str]]:
    """Starts the ranks of `errors_of_ranks`; calling the result waits for their messages.

    port: where they meet; default a free one.
    """
    if port is None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in ranks]
    processes = [
        context.Process(target=_rank, args=(number, port, action, after, sender))
        for number, (_, sender) in zip(ranks, pipes, strict=True)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()

    def wait() -> list[str]:
        try:
            return [_answer(pipes[rank][0]) for rank in (range(len(ranks)) if answers is None else answers)]
        finally:
            for process in processes:
                process.kill()
                process.join()

    return wait


def _answer(receiver: Any) -> str:
    try:
        return receiver.recv() if receiver.poll(60) else "no answer"
    except EOFError:  # ended by another error: the others have gone
        return "died"
