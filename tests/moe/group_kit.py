"""A group of forked ranks over gloo, for what tokens and experts do across ranks; no launcher and no new Python."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def _rank(number: int, ranks: int, store: Path, action: Callable[[int], Any], out: Path) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", store=dist.FileStore(str(store), ranks), rank=number, world_size=ranks)
        answer: Any = action(number)
        dist.barrier()
    except Exception:  # noqa: BLE001 (the parent says it)
        answer = RuntimeError(traceback.format_exc())
    out.write_bytes(pickle.dumps(answer))
    os._exit(0)


def of_ranks(ranks: int, action: Callable[[int], Any]) -> list[Any]:
    """What `action(rank)` gives on each of so many ranks, plain data or tensors on the CPU."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        outs = [folder / f"rank{number}" for number in range(ranks)]
        processes = [
            context.Process(target=_rank, args=(number, ranks, folder / "store", action, out))
            for number, out in enumerate(outs)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            process.kill()
        answers = [pickle.loads(out.read_bytes()) if out.exists() else RuntimeError("no answer") for out in outs]
    for answer in answers:
        if isinstance(answer, RuntimeError):
            raise answer
    return answers
