"""SigLIP 2 NaFlex weights in transformers' layout, under the names of timm's NaFlex transformer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_NAMES = {
    r"embeddings\.patch_embedding\.(weight|bias)": r"embeds.proj.\1",
    r"encoder\.layers\.(\d+)\.layer_norm([12])\.(weight|bias)": r"blocks.\1.norm\2.\3",
    r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.(weight|bias)": r"blocks.\1.attn.proj.\2",
    r"encoder\.layers\.(\d+)\.mlp\.(fc[12])\.(weight|bias)": r"blocks.\1.mlp.\2.\3",
    r"post_layernorm\.(weight|bias)": r"norm.\1",
}
_QUERY = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)")
_POSITIONS = "embeddings.position_embedding.weight"


def is_siglip2(names: Iterable[str]) -> bool:
    """Whether these are names of transformers' `Siglip2Model` or `Siglip2VisionModel`."""
    return any(name.removeprefix("vision_model.") == _POSITIONS for name in names)


def timm_weights(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tower's tensors; the text model and the pooling head are left out."""
    vision = {name.removeprefix("vision_model."): tensor for name, tensor in stored.items()}
    found = {}
    for name, tensor in vision.items():
        for pattern, ours in _NAMES.items():
            if match := re.fullmatch(pattern, name):
                found[match.expand(ours)] = tensor
        if match := _QUERY.fullmatch(name):
            parts = [vision[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            found[f"blocks.{match[1]}.attn.qkv.{match[2]}"] = torch.cat(parts)
    positions = vision[_POSITIONS]  # of a square grid
    side = math.isqrt(len(positions))
    found["embeds.pos_embed"] = positions.view(1, side, side, -1)
    return found
