"""timm's NaFlex transformer as a tower for pictures of different numbers of patches.

The pictures of a call are padded to the longest; attention sees no padding, and none leaves the tower.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llava_compete.errors import UserError
from llava_compete.vision.naflex import NaFlexLayout
from llava_compete.vision.tiles import Grid
from llava_compete.vision.tower import VisionTower, normalise
from llava_compete.vision.tower_config import TowerConfig
from llava_compete.vision.trunks import NaFlexTrunk, Trunk


class NaFlexTower(VisionTower):
    """Patches [T, 3, p, p] of n pictures -> features [T, width], in the order that the layout's `sources` say."""

    kind: NaFlexTrunk

    def __init__(self, config: TowerConfig) -> None:
        super().__init__(config)
        embeds = self.trunk.embeds
        # timm reads each picture's grid off its patches' coordinates, and waits for the device each time. The grids
        # themselves are passed in the coordinates' place, and timm's method is this one.
        embeds._apply_learned_naflex_pos_embed = partial(_add_positions, embeds)

    def num_chunks(self, num_pictures: int) -> int | None:
        """None: pictures are not taken in several goes."""
        return None

    def patch_image_ids(self, layout: NaFlexLayout) -> np.ndarray:
        """Picture of each token of the padded batch, int64 [n, tokens]; -1 for padding."""
        ids = np.full((len(layout.tiles), self.kind.num_prefix_tokens + max(layout.tiles)), -1)
        for image, count in enumerate(layout.tiles):
            ids[image, : self.kind.num_prefix_tokens + count] = image
        return ids

    def forward(self, pixel_values: Tensor, layout: NaFlexLayout) -> Tensor:  # type: ignore[override]
        """Features of the pictures' patches; pixel_values uint8 or normalised."""
        side = self.kind.patch
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, side, side):
            raise UserError(
                f"pixel_values: found shape {tuple(pixel_values.shape)}, expected [patches, 3, {side}, {side}]"
            )
        dtype = next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalise(pixel_values, self.config.preprocess)
        if self.trunk.embeds.channels_last:
            pixel_values = pixel_values.permute(0, 2, 3, 1)
        patches, longest = pixel_values.to(dtype).flatten(1), max(layout.tiles)
        places, sources = (
            torch.from_numpy(rows).to(patches.device, non_blocking=True) for rows in (layout.places, layout.sources)
        )
        count = len(layout.tiles) * longest
        padded = patches.new_zeros(count, patches.shape[1]).index_copy(0, places, patches)
        valid = torch.zeros(count, dtype=torch.bool, device=patches.device).index_fill(0, places, True)
        padded, valid = (rows.unflatten(0, (-1, longest)) for rows in (padded, valid))
        batch = {"patches": padded, "patch_valid": valid, "patch_coord": layout.grids}
        return self.kind.features(self.trunk(batch)).patches.flatten(0, 1).index_select(0, sources)


def check_naflex(trunk: Trunk, name: Any) -> NaFlexTrunk:
    """The trunk, for pictures of different numbers of patches.

    Raises:
        UserError: it takes none, or has position embeddings that this file does not know.
    """
    if not isinstance(trunk, NaFlexTrunk):
        raise UserError(
            f"vision_tower.naflex: found the tower {name}, expected one of timm's NaFlex transformers, such as "
            "naflexvit_base_patch16_siglip"
        )
    embeds = trunk.module.embeds
    if embeds.pos_embed_type != "learned" or trunk.module.rope is not None or embeds.pos_embed_use_grid_sample:
        kind = "rotary" if trunk.module.rope is not None else embeds.pos_embed_type
        raise UserError(f"vision_tower.naflex: {name} has {kind} position embeddings, expected a learned grid")
    if not embeds.is_linear or embeds.patch_size[0] != embeds.patch_size[1]:
        raise UserError(
            f"vision_tower.naflex: {name} takes whole pictures, expected square patches, projected linearly"
        )
    return trunk


def _add_positions(embeds: Any, x_nLD: Tensor, patch_coord: list[Grid]) -> Tensor:
    """The grid of position embeddings, resized to each picture's, added in place; as timm's own."""
    rows, columns = embeds.pos_embed.shape[1:3]
    table_1Dhw = embeds.pos_embed.permute(0, 3, 1, 2).float()

    def resized(grid: Grid) -> Tensor:
        if grid == (rows, columns):
            return embeds.pos_embed.flatten(1, 2)[0].to(x_nLD.dtype)
        side = max(grid)
        found = F.interpolate(
            table_1Dhw,
            size=(side, side) if embeds.pos_embed_ar_preserving else grid,
            mode=embeds.pos_embed_interp_mode,
            align_corners=embeds.pos_embed_align_corners,
            antialias=embeds.pos_embed_antialias,
        )
        return found[0, :, : grid[0], : grid[1]].flatten(1).T.to(x_nLD.dtype)

    tables = {grid: resized(grid) for grid in dict.fromkeys(patch_coord)}
    longest = x_nLD.shape[1]
    return x_nLD.add_(
        torch.stack([F.pad(tables[grid], (0, 0, 0, longest - len(tables[grid]))) for grid in patch_coord])
    )
