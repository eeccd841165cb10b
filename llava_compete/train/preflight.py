"""Minutes of a cluster are dear: before anything is loaded, find the rank that cannot take part, and name it.

A roll-call and a small all-reduce on the devices with a limit, equal package versions and settings, one shared output
directory. `disk_space` is looked at later, once the model's size is known.
"""

from __future__ import annotations

import hashlib
import json
import logging
import socket
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel

from llava_compete.errors import UserError
from llava_compete.manifest import package_versions
from llava_compete.train.distributed import Rank
from llava_compete.train.identity import flat
from llava_compete.train.waiting import SharedError, meet

logger = logging.getLogger(__name__)

LIMIT = timedelta(seconds=60)


def check_links(rank: Rank, store: dist.Store) -> None:
    """Everybody is there within the limit, and the devices can talk.

    Raises:
        UserError: naming the ranks that are missing, or the one whose device cannot reach the others.
    """
    meet(store, rank.number, rank.world_size, "preflight", LIMIT)
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


def check_same(rank: Rank, settings: Mapping[str, Any]) -> None:
    """All ranks were started with the same settings; with different ones they hang, or train what nobody asked for.

    Args:
        settings: values by dotted key, without what may differ by machine.

    Raises:
        SharedError: naming the first key that differs, with both values, and the rank and its host.
    """
    plain = {key: json.dumps(value, sort_keys=True, default=str) for key, value in settings.items()}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    digests = [""] * rank.world_size
    dist.all_gather_object(digests, digest)
    if len(set(digests)) == 1:
        return
    everyone: list[tuple[str, dict[str, str]]] = [("", {})] * rank.world_size
    dist.all_gather_object(everyone, (socket.gethostname(), plain))
    _, expected = everyone[0]
    for number, (host, found) in enumerate(everyone):
        for key in [*expected, *(found.keys() - expected.keys())]:
            if found.get(key) != expected.get(key):
                raise SharedError(
                    f"rank {number} on {host} was started with {_setting(key, found)}, rank 0 with "
                    f"{_setting(key, expected)}; give all the same command"
                )


def _setting(key: str, settings: dict[str, str]) -> str:
    return f"{key}={settings[key]}" if key in settings else f"no {key}"


# Keys that are a machine's own affair: where it logs, and how its loader works.
_OWN = {"logging_dir", "report_to", "run_name", "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node"}


def comparable_settings(config: BaseModel) -> dict[str, Any]:
    """A config's values by dotted key, for `check_same`; less logging and loader settings.

    Paths are left out too, since a machine may keep its copy elsewhere: the digest of the data is compared by itself.
    """
    return {key: value for key, value in flat(config.model_dump(), "") if not _is_own(key.rpartition(".")[2])}


def _is_own(name: str) -> bool:
    return name in _OWN or name.startswith("dataloader_")


def log_devices(rank: Rank) -> None:
    """One line for each machine: what its ranks train on."""
    if rank.on_gpu:
        device = f"cuda:{torch.cuda.current_device()} ({torch.cuda.get_device_name()})"
    else:
        threads = torch.get_num_threads()
        device = f"cpu ({threads} thread{'s' if threads > 1 else ''})"
    everyone: list[tuple[str, str]] = [("", "")] * rank.world_size
    dist.all_gather_object(everyone, (socket.gethostname(), device))
    for host in dict.fromkeys(host for host, _ in everyone):
        ranks = (f"rank {number} {device}" for number, (place, device) in enumerate(everyone) if place == host)
        logger.info("%s: %s", host, ", ".join(ranks))
