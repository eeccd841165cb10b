"""Attention masks of a training step, made without a look at values that a GPU's host would have to wait for.

transformers looks at a padding mask, and at position ids, to find out whether a mask is needed at all; each look
drains the device's queue once a micro-batch. Here the caller knows: rows are padded on the right, which causal
attention never reaches from a real token, or they are packed and `sequence_ids` tell their samples apart. Without a
mask for padding, torch's flash kernel also serves rows of unequal length.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_masks_for_generate

# Attention implementations whose masks are tensors.
_WITH_MASKS = ("sdpa", "eager")
# What transformers calls the kinds of layers whose mask says which tokens see which.
_MASKED_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")


class AttentionInputs(NamedTuple):
    """What the language model is given; a dict of masks where its layers are of several kinds."""

    attention_mask: Tensor | dict[str, Tensor | None] | None
    past_key_values: Cache | None


class KeepsNothing(DynamicCache):
    """A cache that is always empty: where there is one, transformers does not search position ids for packed rows."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


def without_waiting(
    config: PreTrainedConfig, inputs_embeds: Tensor, given: AttentionInputs, sequence_ids: Tensor | None
) -> AttentionInputs:
    """For rows [B, N, H] without a cache, right-padded or, with `sequence_ids` [B, N], packed.

    given: what stays with kernels that take lengths in place of masks, and where there is a whole mask already.
    """
    whole = isinstance(given.attention_mask, Tensor) and given.attention_mask.ndim == 4
    if whole or config._attn_implementation not in _WITH_MASKS:
        return given
    masks = create_masks_for_generate(config, inputs_embeds, attention_mask=None, past_key_values=None)
    if sequence_ids is not None:
        same_B1NN = (sequence_ids[:, :, None] == sequence_ids[:, None, :]).unsqueeze(1)
        if isinstance(masks, dict):
            masks = {kind: _packed(mask, same_B1NN) if kind in _MASKED_LAYERS else mask for kind, mask in masks.items()}
        else:
            masks = _packed(masks, same_B1NN)
    return AttentionInputs(masks, KeepsNothing() if masks is None else None)


def _packed(mask: Tensor | None, same_B1NN: Tensor) -> Tensor:
    """Causal within each sample. sdpa's masks are true where a token sees, or None for all before it; eager's are
    added to the scores."""
    if mask is None:
        mask = torch.ones(same_B1NN.shape[-2:], dtype=torch.bool, device=same_B1NN.device).tril()
    return mask & same_B1NN if mask.dtype == torch.bool else mask.masked_fill(~same_B1NN, torch.finfo(mask.dtype).min)
