"""The forward's arithmetic on plain tensors: placeholder counts, positions, the language loss, the routing losses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_compete.errors import UserError
from llava_compete.moe.state import RoutingRecord
from llava_compete.parts import IGNORE_INDEX


def check_counts(places: Tensor, num_images: int, features_per_image: int, may_wait: bool) -> None:
    """As many placeholders (true in `places`) as features.

    may_wait: read the count back from an accelerator for an error that names both; else, in training, where the
        collator has counted already, an asynchronous assertion that costs no synchronisation.
    """
    expected = num_images * features_per_image
    count = places.sum()
    if places.device.type == "cpu" or (may_wait and places.device.type != "meta"):
        if int(count) != expected:
            raise UserError(
                f"the text has {int(count)} image placeholders, but {num_images} image(s) of "
                f"{features_per_image} features make {expected}"
            )
    elif places.device.type != "meta":
        torch._assert_async(count == expected, f"image placeholders in the text differ from {expected} image features")


def place_features(embeds_BNH: Tensor, places_BN: Tensor, features_FH: Tensor) -> Tensor:
    """The embeddings with feature f in the f-th true place, in reading order over the batch.

    `masked_scatter` would do in the forward, but its backward selects by the mask, whose size a GPU's host waits for.
    A stable sort brings the places to the front in their order; there are as many as features (`check_counts`).
    """
    rows_F = torch.argsort(places_BN.flatten().to(torch.uint8), descending=True, stable=True)[: len(features_FH)]
    return embeds_BNH.flatten(0, 1).index_copy(0, rows_F, features_FH).view_as(embeds_BNH)


def sample_positions(attention_mask: Tensor | None, sequence_ids: Tensor | None) -> Tensor | None:
    """Positions counted from each sample's first token, so that neither left padding nor packing shifts them."""
    if sequence_ids is not None:
        index = torch.arange(sequence_ids.shape[1], device=sequence_ids.device).expand_as(sequence_ids)
        starts = F.pad(sequence_ids[:, 1:] != sequence_ids[:, :-1], (1, 0), value=True)
        return index - torch.where(starts, index, 0).cummax(dim=1).values
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return None


def language_loss(logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
    """Cross entropy of predicting token n+1 at n, summed, over `num_items` (default: the supervised tokens here)."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten().to(logits.device)
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    if num_items is None:
        return total / (targets != IGNORE_INDEX).sum().clamp(min=1)
    return total / torch.as_tensor(num_items, device=total.device)


def routing_losses(records: dict[str, RoutingRecord]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """For each part the mean over its layers of the auxiliary loss and of each term (absent counts as 0)."""
    layers: dict[str, list[str]] = {}
    for name in records:
        layers.setdefault(name.split(".")[0], []).append(name)
    aux_losses: dict[str, Tensor] = {}
    terms: dict[str, Any] = {}
    for part, names in layers.items():
        part_records = [records[name] for name in names]
        device = part_records[0].aux_loss.device
        aux_losses[part] = torch.stack([record.aux_loss.to(device) for record in part_records]).mean()
        for record in part_records:
            for term, value in record.losses.items():
                key = f"{part}/{term}"
                terms[key] = terms.get(key, 0) + value.detach().to(device) / len(part_records)
    return aux_losses, terms
