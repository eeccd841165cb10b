"""Pictures to embeddings: pixel values through tower and projector, each picture one sequence of both parts' losses.

Pictures are squares of one size, tiles (`vision.tiles`) or patches of their own proportions (`vision.naflex`). All of a
micro-batch pass in one call, at the same place on every rank; a micro-batch without pictures sends a blank one along.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from llava_compete.errors import UserError
from llava_compete.model.placeholders import sent
from llava_compete.moe.state import RoutingState, TokenGroups
from llava_compete.vision.naflex import NaFlexLayout, SizedPictures, naflex_layout
from llava_compete.vision.naflex_tower import NaFlexTower
from llava_compete.vision.projector import Projector
from llava_compete.vision.tiles import Layout
from llava_compete.vision.tower import VisionTower


class ImageFeaturesMixin:
    """For a model with these parts and settings."""

    config: Any
    routing: RoutingState
    vision_tower: VisionTower | None
    multi_modal_projector: Projector | None
    tiling: SizedPictures | None

    def image_lengths(self, pixel_values: Tensor | None, image_sizes: Any = None) -> tuple[list[int], list[int]]:
        """Tiles and features of each image."""
        if self.tiling is not None and pixel_values is not None:
            return self._layout(pixel_values, image_sizes)[:2]
        count = 0 if pixel_values is None else len(pixel_values)
        return [1] * count, [self.config.num_image_tokens] * count

    def _layout(self, pixel_values: Tensor, image_sizes: Any) -> Layout | NaFlexLayout:
        """Where the features of images in tiles or patches go.

        `image_sizes` is best a list or on the host: it is read there.
        """
        assert self.tiling is not None
        if image_sizes is None:
            raise UserError("image_sizes: missing; a model of tiles needs each picture's height and width beside them")
        sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes
        layout = self.tiling.layout([(int(height), int(width)) for height, width in sizes])
        if sum(layout.tiles) != len(pixel_values):
            raise UserError(
                f"pixel_values: found {len(pixel_values)} tiles, but {len(layout.tiles)} image(s) of image_sizes make "
                f"{sum(layout.tiles)}"
            )
        return layout

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, image_sizes: Any = None, **_: Any) -> BaseModelOutputWithPooling:
        """The projected features [n, P, H], as `pooler_output`, where transformers has them in all its models; of
        images in tiles a tuple, [F, H] of each."""
        features = self._image_features(pixel_values, None, image_sizes)
        if self.tiling is not None:
            features = features.split(self.image_lengths(pixel_values, image_sizes)[1])
        return BaseModelOutputWithPooling(pooler_output=features)

    def _image_features(
        self,
        pixel_values: Tensor,
        num_sequences: dict[str, Any] | None,
        image_sizes: Any,
        num_tile_chunks: int | None = None,
    ) -> Tensor:
        """Projected features [n, P, H], or [F, H] of images in tiles; each image is one sequence of tower and
        projector."""
        assert self.vision_tower is not None
        assert self.multi_modal_projector is not None
        counts = num_sequences or {}
        if self.tiling is not None:
            layout = self._layout(pixel_values, image_sizes)
            if isinstance(layout, NaFlexLayout):
                return self._naflex_features(pixel_values, counts, layout)
            return self._tiled_features(pixel_values, counts, layout, num_tile_chunks)
        if self.routing.is_recording:
            ids = self.vision_tower.tile_image_ids(len(pixel_values), pixel_values.device)
            self.routing.begin("vision", TokenGroups.from_ids(ids, len(pixel_values), counts.get("vision")))
        features = self.vision_tower(pixel_values, num_tile_chunks)
        if self.routing.is_recording:
            ones = torch.ones(len(features), self.config.num_image_tokens, device=features.device)
            self.routing.begin("projector", TokenGroups.from_mask(ones, counts.get("projector")))
        return self.multi_modal_projector(features)

    def _tiled_features(
        self, pixel_values: Tensor, counts: dict[str, Any], layout: Layout, num_tile_chunks: int | None
    ) -> Tensor:
        """All tiles of all images in one call. In the projector, features of black borders are in no statistic."""
        assert self.vision_tower is not None
        assert self.multi_modal_projector is not None
        device, num_images = pixel_values.device, len(layout.tiles)
        image_of_tile = np.repeat(np.arange(num_images), layout.tiles)
        if self.routing.is_recording:
            ids = sent(image_of_tile, device)[:, None].expand(-1, self.vision_tower.tokens_per_tile)
            self.routing.begin("vision", TokenGroups.from_ids(ids, num_images, counts.get("vision")))
        features = self.vision_tower(pixel_values, num_tile_chunks)
        if self.routing.is_recording:
            per_tile = self.config.num_image_tokens
            image_of_feature = np.full(len(pixel_values) * per_tile, -1)
            image_of_feature[layout.sources] = image_of_tile[layout.sources // per_tile]
            ids = sent(image_of_feature, device)
            self.routing.begin("projector", TokenGroups.from_ids(ids, num_images, counts.get("projector")))
        sources, places = sent(layout.sources, device), sent(layout.places, device)
        return self.multi_modal_projector(features, sources, places, sum(layout.lengths))

    def _naflex_features(self, pixel_values: Tensor, counts: dict[str, Any], layout: NaFlexLayout) -> Tensor:
        """All patches of all images in one call, padded to the longest image; padding is in no statistic."""
        assert isinstance(self.vision_tower, NaFlexTower)
        assert self.multi_modal_projector is not None
        device, num_images, pool = pixel_values.device, len(layout.tiles), self.config.projector.pool
        if self.routing.is_recording:
            ids = sent(self.vision_tower.patch_image_ids(layout), device)
            self.routing.begin("vision", TokenGroups.from_ids(ids, num_images, counts.get("vision")))
        features = self.vision_tower(pixel_values, layout)
        if self.routing.is_recording:
            ids = sent(np.repeat(np.arange(num_images), layout.lengths), device)
            self.routing.begin("projector", TokenGroups.from_ids(ids, num_images, counts.get("projector")))
        # What is pooled stands side by side: each embedding's features are a map of their own.
        return self.multi_modal_projector(features.unflatten(0, (-1, pool**2))).flatten(0, 1)

    @property
    def vision_tower_dtype(self) -> torch.dtype:
        """Precision that the tower's first layer computes in."""
        assert self.vision_tower is not None
        return next(parameter.dtype for parameter in self.vision_tower.parameters() if parameter.is_floating_point())

    def _dummy_image_features(self, device: torch.device, num_tile_chunks: int | None) -> Tensor:
        """The features of one blank image, absent from every statistic, times 0.

        It sends a text-only micro-batch of training through the same modules at the same place, so that all ranks run
        the same collectives and the tower's parameters have (zero) gradients.
        """
        assert self.vision_tower is not None
        assert self.multi_modal_projector is not None
        side = self.config.tower.image_size
        pixels = torch.zeros(1, 3, side, side, device=device, dtype=self.vision_tower_dtype)
        if isinstance(self.vision_tower, NaFlexTower):
            return self._dummy_naflex_features(pixels)
        tiles = sum(scale * scale for scale in self.config.tower.scales)
        self.routing.begin("vision", TokenGroups.empty(tiles * self.vision_tower.tokens_per_tile, device))
        features = self.vision_tower(pixels, num_tile_chunks)
        self.routing.begin("projector", TokenGroups.empty(self.config.num_image_tokens, device))
        if self.tiling is not None:  # one feature and one newline
            first = torch.zeros(1, dtype=torch.int64, device=device)
            return self.multi_modal_projector(features, first, first, 2) * 0
        return self.multi_modal_projector(features) * 0

    def _dummy_naflex_features(self, pixels: Tensor) -> Tensor:
        """The same of one token's patches."""
        assert isinstance(self.vision_tower, NaFlexTower)
        assert self.multi_modal_projector is not None
        pool = self.config.projector.pool
        layout = naflex_layout([(pool, pool)], pool)
        num_tokens = self.vision_tower.patch_image_ids(layout).size
        self.routing.begin("vision", TokenGroups.empty(num_tokens, pixels.device))
        features = self.vision_tower(pixels.expand(pool**2, -1, -1, -1), layout)
        self.routing.begin("projector", TokenGroups.empty(1, pixels.device))
        return self.multi_modal_projector(features[None]) * 0
