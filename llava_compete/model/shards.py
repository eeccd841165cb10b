"""Write the weights of a checkpoint one tensor at a time, so that memory stays near one shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from llava_compete.files import mode_by_umask
from llava_compete.model.checkpoint import MODEL, index_name

SHARD_BYTES = 2 * 1024**3


class PlannedTensor(NamedTuple):
    """A tensor of a checkpoint: what it will be, and how it is made when its shard is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """In bytes."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def write_shards(
    directory: Path,
    tensors: Mapping[str, PlannedTensor],
    shard_bytes: int = SHARD_BYTES,
    title: str = "",
    stem: str = MODEL,
) -> int:
    """Write `tensors` as safetensors of at most `shard_bytes` (a larger tensor is alone), with an index if there are
    several; returns how many.

    title: stands before the progress bar; without one there is none.
    stem: how the files' names begin.
    """
    sizes = {key: tensor.size for key, tensor in tensors.items()}
    shards = list(_group(sizes, shard_bytes))
    weight_map = {}
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc=title, leave=False, disable=not title) as bar:
        for number, keys in enumerate(shards, 1):
            part = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
            name = f"{stem}{part}.safetensors"
            shard = {}
            for key in keys:
                shard[key] = tensors[key].make()
                bar.update(sizes[key])
            save_file(shard, directory / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(keys, name))
    mode_by_umask(directory)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / index_name(stem)).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(shards)


def _group(sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
    """Keys in order, in groups of at most `limit` bytes (a larger tensor is alone)."""
    group: list[str] = []
    total = 0
    for key, size in sizes.items():
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(key)
        total += size
    if group:
        yield group
