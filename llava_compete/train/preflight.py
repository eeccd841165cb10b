"""Minutes of a cluster are dear: before anything is loaded, find the rank that cannot take part, and name it.

A barrier with a limit, a small all-reduce on the devices, equal package versions, one shared output directory.
`check_space` runs later, once the model's size is known.
"""

from __future__ import annotations

import logging
import shutil
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llava_compete.errors import UserError
from llava_compete.manifest import package_versions
from llava_compete.train.distributed import Rank, SharedError

logger = logging.getLogger(__name__)

LIMIT = timedelta(seconds=60)
GIB = 2**30


def preflight(rank: Rank, output_dir: Path) -> None:
    """Check that all ranks can work together.

    Raises:
        UserError: naming the rank and its host.
    """
    if rank.world_size == 1:
        return
    _meet(rank)
    facts: list[tuple[str, dict[str, str], bool]] = [("", {}, False)] * rank.world_size
    probe = output_dir / "run" / ".preflight"
    if rank.is_main:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text(socket.gethostname(), encoding="utf-8")
    dist.barrier()
    dist.all_gather_object(facts, (socket.gethostname(), package_versions(), probe.is_file()))
    dist.barrier()
    if rank.is_main:
        probe.unlink()
    _, expected, _ = facts[0]
    for number, (host, versions, sees_output) in enumerate(facts):
        if not sees_output:
            raise SharedError(f"rank {number} on {host} does not see {output_dir}, where rank 0 writes; share it")
        for name, version in versions.items():
            if expected.get(name) != version:
                raise SharedError(
                    f"rank {number} on {host} has {name} {version}, rank 0 has {expected.get(name)}; install the same"
                )


def _meet(rank: Rank) -> None:
    """Everybody is there within the limit, and the devices can talk."""
    group: Any = dist.new_group(backend="gloo")
    try:
        dist.monitored_barrier(group, timeout=LIMIT, wait_all_ranks=True)
        if rank.on_gpu:
            ones = torch.ones(1, device="cuda")
            if not dist.all_reduce(ones, async_op=True).wait(timeout=LIMIT) or int(ones) != rank.world_size:
                raise RuntimeError(f"all-reduce over {rank.world_size} GPUs gave {int(ones)}")
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise UserError(f"rank {rank.number} on {socket.gethostname()}: the ranks do not meet: {text}") from error


def check_space(output_dir: Path, parameters: int, trainable: int) -> None:
    """Refuse to start when one checkpoint will not fit on the disk.

    Args:
        parameters, trainable: numbers; a checkpoint holds the weights twice (model directory and engine state) and
            three float32 copies (weights, two moments) of what trains.
    """
    needed = 2 * 4 * parameters + 3 * 4 * trainable
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise UserError(
            f"{output_dir}: {free / GIB:.2f} GiB free, a checkpoint needs about {needed / GIB:.2f} GiB; "
            "make room or set another output_dir"
        )
