"""The dense MLP of a tower's block, as a mixture of experts in its place must match it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from llava_compete.errors import UserError


class FeedForward(NamedTuple):
    """Shape of a block's dense MLP, which is what a MoE block must match."""

    hidden_size: int
    intermediate_size: int
    activation: str
    bias: bool


def block_feed_forward(block: Any) -> FeedForward:
    """Shape of the dense MLP of a block of either kind of trunk."""
    mlp = block.mlp
    up = mlp.c_fc if hasattr(mlp, "c_fc") else mlp.fc1 if hasattr(mlp, "fc1") else None
    activation = getattr(mlp, "gelu", None) or getattr(mlp, "act", None)
    norm = mlp.ln if hasattr(mlp, "ln") else getattr(mlp, "norm", nn.Identity())
    if up is None or activation is None or not isinstance(norm, nn.Identity):
        raise UserError(f"moe.vision: the tower's MLP {type(mlp).__name__} is not linear, activation, linear")
    return FeedForward(up.in_features, up.out_features, _activation_name(activation), up.bias is not None)


def _activation_name(activation: nn.Module) -> str:
    """The name in transformers' table of an activation module of open_clip or timm."""
    kind = type(activation).__name__
    if kind in ("GELU", "GELUTanh", "GELUQuick"):
        approximate = "tanh" if kind == "GELUTanh" else getattr(activation, "approximate", "none")
        return {"none": "gelu", "tanh": "gelu_pytorch_tanh"}[approximate]
    names = {"QuickGELU": "quick_gelu", "SiLU": "silu", "ReLU": "relu"}
    if kind not in names:
        raise UserError(f"moe.vision: the tower's activation {kind} is unknown; add it to {__name__}._activation_name")
    return names[kind]
