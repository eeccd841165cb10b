"""Counts of one optimizer step over all micro-batches and ranks, made on the host from the collated batches.

One small all-reduce over gloo before the step's first forward: it needs no device, so it never stalls a GPU queue.
The loss divides by these counts; the log's throughput and the agreement to stop on SIGTERM ride along.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llava_compete.parts import IGNORE_INDEX


@dataclass(frozen=True)
class StepCounts:
    """Global counts of one optimizer step.

    supervised_tokens: 0-dim int64 on the training device, labels that enter the loss.
    sequences: part -> 0-dim float32 on the device, images for vision and projector, samples for language.
    tokens, samples, images, tiles: host numbers for the log; an image that is not in tiles is one.
    sample_checksum: changes when any sample of the step is another one; independent of order and ranks.
    stop: whether any rank was told to stop.
    """

    supervised_tokens: Tensor
    sequences: dict[str, Tensor]
    num_supervised: int
    tokens: int
    samples: int
    images: int
    tiles: int
    sample_checksum: int
    stop: bool


def gather(
    batches: Sequence[dict[str, Any]],
    device: torch.device,
    *,
    stop: bool,
    num_chunks: Callable[[int], int | None] = lambda tiles: None,
) -> StepCounts:
    """Sum this rank's `batches` over ranks.

    num_chunks: in how many goes the tower takes so many tiles, or None. Each batch gets `num_tile_chunks`, that of the
    rank that needs most: under ZeRO-3 all must call the tower equally often.

    `sample_ids` is taken out of each batch: the model has no use for it. A batch with `sequence_ids` gets
    `num_local_sequences`, which the model would have to wait for the device for.
    """
    totals = torch.zeros(7, dtype=torch.int64)
    for batch in batches:
        totals += torch.tensor(_count(batch), dtype=torch.int64)
    totals[-1] = int(stop)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(totals)
    if num_chunks(1) is not None:
        chunks = torch.tensor([num_chunks(max(_num_tiles(batch), 1)) for batch in batches], dtype=torch.int64)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(chunks, dist.ReduceOp.MAX)
        for batch, count in zip(batches, chunks.tolist(), strict=True):
            batch["num_tile_chunks"] = count
    supervised, tokens, samples, images, tiles, checksum, stops = totals.tolist()
    as_float = {name: torch.tensor(float(max(count, 1)), device=device) for name, count in _named(samples, images)}
    return StepCounts(
        supervised_tokens=torch.tensor(max(supervised, 1), device=device),
        sequences=as_float,
        num_supervised=supervised,
        tokens=tokens,
        samples=samples,
        images=images,
        tiles=tiles,
        sample_checksum=checksum % 2**32,
        stop=stops > 0,
    )


def _named(samples: int, images: int) -> list[tuple[str, int]]:
    return [("vision", images), ("projector", images), ("language", samples)]


def _count(batch: dict[str, Any]) -> list[int]:
    """[supervised tokens, tokens, samples, images, tiles, checksum, 0] of one micro-batch on this rank."""
    # A causal language model predicts position i + 1 from i, so the first label of a row is never a target.
    supervised = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    tiles = _num_tiles(batch)
    images = len(batch["image_sizes"]) if "image_sizes" in batch else tiles
    sequence_ids = batch.get("sequence_ids")
    # A rank without rows in the last batch has one filler token, which is part of no sequence.
    tokens = batch["attention_mask"] if sequence_ids is None else sequence_ids >= 0
    if sequence_ids is not None:
        batch["num_local_sequences"] = int(sequence_ids.max()) + 1
    checksum = sum(zlib.crc32(str(sample).encode()) for sample in batch.pop("sample_ids", ()))
    return [supervised, int(tokens.sum()), _num_samples(batch), images, tiles, checksum, 0]


def _num_tiles(batch: dict[str, Any]) -> int:
    """Pictures, or tiles of pictures, of one micro-batch."""
    return len(batch["pixel_values"]) if "pixel_values" in batch else 0


def _num_samples(batch: dict[str, Any]) -> int:
    """Samples with at least one token: rows, or the packed sequences inside them."""
    sequence_ids = batch.get("sequence_ids")
    if sequence_ids is None:
        return int(batch["attention_mask"].any(dim=1).sum())
    return sum(len(row[row >= 0].unique()) for row in sequence_ids)
