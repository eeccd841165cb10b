"""From image features to the language model's embedding space: `linear`, `mlp2x_gelu` or deeper, or a MoE.

`mlpNx_gelu` is LLaVA-1.5's chain of N linear layers with GELU between. Its last two layers are kept together as one
feed-forward block, which is what a mixture of experts replaces (layer 0 of the part `projector`). Before them the map
of features may be pooled, for fewer tokens a picture, and brought to one scale by a LayerNorm, as in InternVL's mlp1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from llava_compete.config import StrictConfig
from llava_compete.errors import UserError
from llava_compete.vision.tower_config import TowerConfig


class ProjectorSection(StrictConfig):
    """The projector's type, and how many features it makes one of."""

    type: str = Field(default="mlp2x_gelu", description="linear, mlp2x_gelu (LLaVA-1.5), mlp3x_gelu, ...")
    pool: int = Field(
        default=1,
        ge=1,
        description=(
            "features of pool x pool places become one, so that a picture has pool² times fewer tokens; "
            "it must divide the tower's map"
        ),
    )
    pool_mode: Literal["shuffle", "mean"] = Field(
        default="shuffle",
        description="shuffle: their channels side by side (pixel-shuffle, as InternVL and SmolVLM do); mean: averaged",
    )
    norm: bool = Field(
        default=False,
        description=(
            "a LayerNorm before the first linear layer (InternVL): for towers whose features are far smaller than "
            "one, such as a DINOv2 cut before its own last norm"
        ),
    )

    def width(self, feature_width: int) -> int:
        """Of what the first linear layer takes."""
        return feature_width * (self.pool**2 if self.pool_mode == "shuffle" else 1)


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
    """Maps features [n, P, D] to embeddings [n, P / pool², O].

    hidden_size: D. has_newline: a learned embedding ends the rows of pictures in tiles, see `tiles.Layout`.
    `make_block(hidden, intermediate, output)` builds the feed-forward block: `Mlp` or a MoE. A linear projector has
    no such block, so a MoE there is refused.
    """

    def __init__(
        self,
        section: ProjectorSection,
        hidden_size: int,
        output_size: int,
        make_block: Callable[[int, int, int], nn.Module] = Mlp,
        has_newline: bool = False,
    ) -> None:
        super().__init__()
        self.section = section
        if has_newline:
            self.image_newline = nn.Parameter(torch.randn(output_size) / math.sqrt(output_size))
        depth, hidden_size = projector_depth(section.type), section.width(hidden_size)
        self.norm = nn.LayerNorm(hidden_size) if section.norm else None
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

    def forward(
        self,
        features: torch.Tensor,
        sources: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
        rows: int = 0,
    ) -> torch.Tensor:
        """[n, P, D] -> [n, P / pool², O]; of tiles, with a `tiles.Layout` of `rows` embeddings, -> [rows, O]."""
        features = pooled(features, self.section.pool, self.section.pool_mode)
        if self.norm is not None:
            features = self.norm(features)
        embeddings = self.mlp(self.stem(features))
        if sources is None:
            return embeddings
        assert places is not None
        chosen = embeddings.flatten(0, 1).index_select(0, sources)
        return self.image_newline.to(chosen.dtype).expand(rows, -1).index_copy(0, places, chosen)


def pooled(features_nPD: torch.Tensor, pool: int, mode: str) -> torch.Tensor:
    """Square maps of features, pool x pool neighbours made one: [n, P / pool², D * pool²], or [n, P / pool², D]."""
    if pool == 1:
        return features_nPD
    side = math.isqrt(features_nPD.shape[1])
    map_nYXyxD = features_nPD.unflatten(1, (side // pool, pool, side // pool, pool)).transpose(2, 3)  # n Y X y x D
    if mode == "mean":
        return map_nYXyxD.mean((3, 4)).flatten(1, 2)
    return map_nYXyxD.flatten(3).flatten(1, 2)


def projector_depth(kind: str) -> int:
    """Number of linear layers of a projector type."""
    if kind == "linear":
        return 1
    match = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if match is None or int(match[1]) < 2:
        raise UserError(f"projector.type: found {kind!r}; expected linear, mlp2x_gelu, mlp3x_gelu, ...")
    return int(match[1])


def check_pool(section: ProjectorSection, tower: TowerConfig) -> None:
    """Raise a `UserError` where the tower's map cannot be cut into squares of pool x pool features."""
    if tower.max_patches is not None:
        if tower.max_patches < section.pool**2:
            raise UserError(f"projector.pool: {section.pool} needs naflex.max_patches of {section.pool**2} or more")
        return
    side = math.isqrt(tower.num_tokens)
    if section.pool > 1 and (tower.select != "patch" or side % section.pool):
        found = f"a map of {side} x {side} features" if tower.select == "patch" else f"select: {tower.select}"
        raise UserError(f"projector.pool: {section.pool} does not fit the tower, which gives {found}")
