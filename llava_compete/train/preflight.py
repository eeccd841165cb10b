"""Minutes of a cluster are dear: before anything is loaded, find the rank that cannot take part, and name it.

A roll-call and a small all-reduce on the devices with a limit, equal package versions, one shared output directory.
`check_space` runs later, once the model's size is known.
"""

from __future__ import annotations

import logging
import shutil
import socket
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from llava_compete.errors import UserError
from llava_compete.manifest import package_versions
from llava_compete.train.distributed import Rank, SharedError, meet

logger = logging.getLogger(__name__)

LIMIT = timedelta(seconds=60)
GIB = 2**30


def check_links(rank: Rank, store: dist.Store) -> None:
    """Everybody is there within the limit, and the devices can talk.

    Raises:
        UserError: naming the ranks that are missing, or the one whose device cannot reach the others.
    """
    meet(store, rank, "preflight", LIMIT)
    ones = torch.ones(1, device="cuda" if rank.on_gpu else "cpu")
    try:
        if not dist.all_reduce(ones, async_op=True).wait(timeout=LIMIT) or int(ones) != rank.world_size:
            raise RuntimeError(f"the sum of {rank.world_size} ones is {int(ones)}")
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise UserError(f"rank {rank.number} on {socket.gethostname()}: all-reduce failed: {text}") from error


def check_alike(rank: Rank, output_dir: Path) -> None:
    """All ranks have the same package versions and see the same output directory.

    Raises:
        UserError: naming the rank and its host.
    """
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
        for name in sorted(expected.keys() | versions.keys()):
            if expected.get(name) != versions.get(name):
                raise SharedError(
                    f"rank {number} on {host} has {_version(name, versions)}, rank 0 has {_version(name, expected)}; "
                    "install the same"
                )


def _version(name: str, versions: dict[str, str]) -> str:
    return f"{name} {versions[name]}" if name in versions else f"no {name}"


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
