"""Rows of a micro-batch to padded tensors.

Right padding, attention and labels go by length, never by token id (pad may be eos). An empty micro-batch (a rank
without rows in the last, smaller global batch) becomes one filler token that is part of no sequence, so that every rank
runs the same collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from llava_compete.parts import IGNORE_INDEX


class Collator:
    """Items of `ConversationDataset` to a batch.

    Keys: input_ids, attention_mask, labels (int64 [B, N]), sample_ids (a string for each item), and pixel_values
    ([images, 3, H, W] in reading order over the batch) only if the micro-batch has images; of images in tiles
    [tiles, 3, H, W], and image_sizes, a list of each image's height and width: the model reads it on the host.
    sequence_ids (int64
    [B, N]: number of the item that a token belongs to, -1 = none) only when packed, and for a filler.
    right_padded (True): the model needs no mask.
    label_positions (int64 [M]): where in [B, N] flattened the next token has a label, at least one. Found here, for
    on a device the search would wait for the host.

    `pack_to`: put several items into one row of at most this many tokens. Items stay whole, and each keeps positions
    and attention of its own, which the model reads off sequence_ids; so all losses stay what they were.
    """

    def __init__(self, processor: Any, pack_to: int | None = None) -> None:
        pad = processor.tokenizer.pad_token_id
        self.pad_token_id: int = pad if pad is not None else processor.tokenizer.eos_token_id
        self.pack_to = pack_to

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if not items:
            return self._filler()
        rows = _first_fit(items, self.pack_to) if self.pack_to else [[item] for item in items]
        ordered = [item for row in rows for item in row]
        batch: dict[str, Any] = {
            "input_ids": _pad([torch.cat([item["input_ids"] for item in row]) for row in rows], self.pad_token_id),
            "attention_mask": _pad([torch.ones(_length(row), dtype=torch.int64) for row in rows], 0),
            "labels": _pad([torch.cat([_targets(item) for item in row]) for row in rows], IGNORE_INDEX),
            "sample_ids": [item["sample_id"] for item in ordered],
            "right_padded": True,
        }
        batch["label_positions"] = label_positions(batch["labels"])
        images = [item["pixel_values"] for item in ordered if item["pixel_values"] is not None]
        if images:
            batch["pixel_values"] = torch.cat(images)
            sizes = [size for item in ordered for size in item.get("image_sizes", ())]
            if sizes:
                batch["image_sizes"] = sizes
        if self.pack_to:
            numbers = iter(range(len(ordered)))
            sequence_ids = [torch.cat([torch.full((len(i["input_ids"]),), next(numbers)) for i in row]) for row in rows]
            batch["sequence_ids"] = _pad(sequence_ids, -1)
        return batch

    def _filler(self) -> dict[str, Any]:
        filler = torch.full((1, 1), self.pad_token_id)
        labels = torch.full_like(filler, IGNORE_INDEX)
        return {
            "input_ids": filler,
            "attention_mask": torch.ones_like(filler),
            "labels": labels,
            "label_positions": label_positions(labels),
            "sequence_ids": torch.full_like(filler, -1),
            "sample_ids": [],
            "right_padded": True,
        }


def on_device(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """What a forward without a trainer takes of a batch: its tensors on the device, and sizes, read on the host."""
    tensors = {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
    return tensors | {key: value for key, value in batch.items() if key == "image_sizes"}


def _targets(item: dict[str, Any]) -> torch.Tensor:
    """Labels without the first token's: nothing precedes it that could predict it (packed, another sample would)."""
    labels = item["labels"].clone()
    labels[0] = IGNORE_INDEX
    return labels


def label_positions(labels_BN: torch.Tensor) -> torch.Tensor:
    """Where in [B, N] flattened the next token has a label, int64 [M]; waits for a device that the labels are on.

    Without a label the first position stands in: the head must be called on every rank, or ZeRO-3 waits for it.
    """
    positions = (F.pad(labels_BN[:, 1:], (0, 1), value=IGNORE_INDEX) != IGNORE_INDEX).flatten().nonzero()[:, 0]
    return positions if len(positions) else positions.new_zeros(1)


def _first_fit(items: Sequence[dict[str, Any]], limit: int) -> list[list[dict[str, Any]]]:
    """Rows of at most `limit` tokens: longest items first, each into the first row with room."""
    rows: list[list[dict[str, Any]]] = []
    for item in sorted(items, key=lambda item: -len(item["input_ids"])):
        row = next((row for row in rows if _length(row) + len(item["input_ids"]) <= limit), None)
        if row is None:
            rows.append([item])
        else:
            row.append(item)
    return rows


def _length(row: Sequence[dict[str, Any]]) -> int:
    return sum(len(item["input_ids"]) for item in row)


def _pad(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=value)
