"""Rows of language pre-training to micro-batches: which rows, and how they become tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llava_compete.errors import UserError


class TextCollator:
    """Rows of equal length to a batch; `sequence_ids`, numbered through the batch, only if documents are separate.

    No `label_positions`: rows are full and nearly every token has a label, so the head runs for them all.
    """

    def __init__(self, separate_documents: bool) -> None:
        self.separate_documents = separate_documents

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        input_ids = torch.stack([item["input_ids"] for item in items])
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "labels": torch.stack([item["labels"] for item in items]),
            "sample_ids": [item["sample_id"] for item in items],
            "right_padded": True,
        }
        if self.separate_documents:
            ids: list[Tensor] = []
            first = 0
            for item in items:
                ids.append(item["sequence_ids"] + first)
                first = int(ids[-1][-1]) + 1
            batch["sequence_ids"] = torch.stack(ids)
            # The first token of a document is not predicted from the document before it.
            starts = batch["sequence_ids"][:, 1:] != batch["sequence_ids"][:, :-1]
            batch["labels"][:, 1:][starts] = -100
        return batch


class TextBatchSampler:
    """Micro-batches of row numbers of one rank: rows [tB, (t + 1)B) form global batch t on any number of ranks.

    A rank takes the rows whose number is its own modulo the world size, so that it needs few packing streams.
    """

    def __init__(self, steps: int, global_batch_size: int, micro_batch_size: int, world_size: int, rank: int) -> None:
        if global_batch_size % (micro_batch_size * world_size):
            raise UserError(
                f"global batch of {global_batch_size} rows: expected a multiple of micro-batch {micro_batch_size} x "
                f"{world_size} processes"
            )
        self.steps, self.global_batch_size, self.micro_batch_size = steps, global_batch_size, micro_batch_size
        self.world_size, self.rank = world_size, rank
        self.accumulation_steps = global_batch_size // (micro_batch_size * world_size)
        self.start_step = 0

    def set_epoch(self, epoch: int) -> None:
        """The run is one epoch: passes over the documents are the streams' own affair."""

    def __len__(self) -> int:
        return (self.steps - self.start_step) * self.accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        size = self.micro_batch_size
        for step in range(self.start_step, self.steps):
            first = step * self.global_batch_size
            rows = [row for row in range(first, first + self.global_batch_size) if row % self.world_size == self.rank]
            for start in range(0, len(rows), size):
                yield rows[start : start + size]

    def streams(self, shards: int) -> set[int]:
        """Packing streams that this rank's rows come from."""
        common = math.gcd(self.world_size, shards)
        return {stream for stream in range(shards) if stream % common == self.rank % common}
