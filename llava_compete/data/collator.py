"""Rows of a micro-batch to padded tensors.

Caller: the trainer's data loader. Right padding, attention and labels go by length, never by token id (pad may be
eos). An empty micro-batch (a rank without rows in the last, smaller global batch) becomes one filler token that is
part of no sequence, so that every rank runs the same collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from llava_compete.data.encoding import IGNORE_INDEX


class Collator:
    """Items of `ConversationDataset` to a batch.

    Keys: input_ids, attention_mask, labels (int64 [B, N]), sample_ids (list of B strings), and pixel_values (float32
    [images of the batch in reading order, 3, H, W]) only if the micro-batch has images. sequence_ids (int64 [B, N],
    -1 = part of no sequence) only for a filler.
    """

    def __init__(self, processor: Any) -> None:
        pad = processor.tokenizer.pad_token_id
        self.pad_token_id: int = pad if pad is not None else processor.tokenizer.eos_token_id

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if not items:
            filler = torch.full((1, 1), self.pad_token_id)
            return {
                "input_ids": filler,
                "attention_mask": torch.ones_like(filler),
                "labels": torch.full_like(filler, IGNORE_INDEX),
                "sequence_ids": torch.full_like(filler, -1),
                "sample_ids": [],
            }
        batch: dict[str, Any] = {
            "input_ids": _pad([item["input_ids"] for item in items], self.pad_token_id),
            "attention_mask": _pad([torch.ones_like(item["input_ids"]) for item in items], 0),
            "labels": _pad([item["labels"] for item in items], IGNORE_INDEX),
            "sample_ids": [item["sample_id"] for item in items],
        }
        images = [item["pixel_values"] for item in items if item["pixel_values"] is not None]
        if images:
            batch["pixel_values"] = torch.cat(images)
        return batch


def _pad(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=value)
