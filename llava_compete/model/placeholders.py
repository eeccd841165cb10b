"""Where a text's tokens stand: image placeholders against features, and positions within each sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llava_compete.errors import UserError


def check_counts(places: Tensor, lengths: Sequence[int], may_wait: bool) -> None:
    """As many placeholders (true in `places`) as features.

    lengths: features of each image.
    may_wait: read the count back from an accelerator for an error that names both; else, in training, where the
        collator has counted already, an asynchronous assertion that costs no synchronisation.
    """
    expected = sum(lengths)
    count = places.sum()
    if places.device.type == "cpu" or (may_wait and places.device.type != "meta"):
        if int(count) != expected:
            sizes = " and ".join(map(str, sorted(set(lengths))))
            given = f"{len(lengths)} image(s) of {sizes} features make {expected}" if lengths else "no image is given"
            raise UserError(f"the text has {int(count)} image placeholders, but {given}")
    elif places.device.type != "meta":
        torch._assert_async(count == expected, f"image placeholders in the text differ from {expected} image features")


def place_features(embeds_BNH: Tensor, places_BN: Tensor, features_FH: Tensor) -> Tensor:
    """The embeddings with feature f in the f-th true place, in reading order over the batch.

    `masked_scatter` would do in the forward, but its backward selects by the mask, whose size a GPU's host waits for.
    """
    rows_F = placeholder_rows(places_BN, len(features_FH))
    return embeds_BNH.flatten(0, 1).index_copy(0, rows_F, features_FH).view_as(embeds_BNH)


def placeholder_rows(places_BN: Tensor, count: int) -> Tensor:
    """Where in [B, N] flattened the `count` true places are, without waiting for the device.

    A stable sort brings them to the front in their order; there are as many as features (`check_counts`).
    """
    return torch.argsort(places_BN.flatten().to(torch.uint8), descending=True, stable=True)[:count]


def sent(values: np.ndarray, device: torch.device) -> Tensor:
    """Numbers of the host on a device, without waiting for it."""
    return torch.from_numpy(values).to(device, non_blocking=True)


def sample_positions(attention_mask: Tensor | None, sequence_ids: Tensor | None) -> Tensor | None:
    """Positions counted from each sample's first token, so that neither left padding nor packing shifts them."""
    if sequence_ids is not None:
        index = torch.arange(sequence_ids.shape[1], device=sequence_ids.device).expand_as(sequence_ids)
        starts = F.pad(sequence_ids[:, 1:] != sequence_ids[:, :-1], (1, 0), value=True)
        return index - torch.where(starts, index, 0).cummax(dim=1).values
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return None
