"""From image features to the language model's embedding space: `linear`, `mlp2x_gelu` or deeper, or a MoE.

`mlpNx_gelu` is LLaVA-1.5's chain of N linear layers with GELU between. Its last two layers are kept together as one
feed-forward block, which is what a mixture of experts replaces (layer 0 of the part `projector`).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from pydantic import Field
from torch import nn

from llava_compete.config import StrictConfig
from llava_compete.errors import UserError


class ProjectorSection(StrictConfig):
    """The projector's type: linear, mlp2x_gelu, mlp3x_gelu, ..."""

    type: str = Field(default="mlp2x_gelu", description="linear, mlp2x_gelu (LLaVA-1.5), mlp3x_gelu, ...")


class Mlp(nn.Module):
    """Linear, GELU, linear; parameter names as in the packed experts."""

    def __init__(self, hidden_size: int, intermediate_size: int, output_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, output_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., O]."""
        return self.down_proj(nn.functional.gelu(self.up_proj(hidden_states)))


class Projector(nn.Module):
    """Maps features [..., D] to embeddings [..., O].

    `make_block(hidden, intermediate, output)` builds the feed-forward block: `Mlp` or a MoE. A linear projector has
    no such block, so a MoE there is refused.
    """

    def __init__(
        self, kind: str, hidden_size: int, output_size: int, make_block: Callable[[int, int, int], nn.Module] = Mlp
    ) -> None:
        super().__init__()
        depth = projector_depth(kind)
        self.stem = nn.Sequential()
        if depth == 1:
            if make_block is not Mlp:
                raise UserError("moe.projector: a linear projector has no feed-forward block; use mlp2x_gelu")
            self.mlp: nn.Module = nn.Linear(hidden_size, output_size)
            return
        for _ in range(depth - 2):
            self.stem.append(nn.Linear(hidden_size, output_size))
            self.stem.append(nn.GELU())
            hidden_size = output_size
        self.mlp = make_block(hidden_size, output_size, output_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., O]."""
        return self.mlp(self.stem(features))


def projector_depth(kind: str) -> int:
    """Number of linear layers of a projector type."""
    if kind == "linear":
        return 1
    match = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if match is None or int(match[1]) < 2:
        raise UserError(f"projector.type: found {kind!r}; expected linear, mlp2x_gelu, mlp3x_gelu, ...")
    return int(match[1])
