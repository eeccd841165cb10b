"""The vision tower: the visual half of an open_clip model, cut after its feature layer, with optional S² scales.

The feature layer is a transformer's block or, of a convolutional or hierarchical network, a stage (`trunks`).
What lies behind it (later blocks, pooling, projection) is dropped, since it could never get a gradient.
S² (arXiv 2403.13043): a scale s is the image at s times the base size, cut in s x s tiles; tiles' features are put
back in place, pooled to the base grid and concatenated over scales. All tiles of all scales pass in one batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils.checkpoint import checkpoint

from llava_compete.errors import UserError
from llava_compete.vision.tower_config import PreprocessConfig, TowerConfig
from llava_compete.vision.trunks import Features, build_trunk, feature_block, trunk_of


class VisionTower(nn.Module):
    """pixel_values [n, 3, H, W] at the largest scale, or the base -> features [n, num_tokens, feature_width].

    uint8 pixels (version 2) are normalised here, on their device; floating-point ones have been.
    `tile_batch`: at most so many tiles pass through the trunk at once; None: all of a call.
    """

    tile_batch: int | None = None

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk: Any = build_trunk(config.embed_dim, config.vision_cfg, config.quick_gelu)
        self.kind = trunk_of(self.trunk, config.preprocess.size)
        self.kind.keep(feature_block(self.kind, config.feature_layer) + 1)
        self.grid = self.kind.grid

    @property
    def blocks(self) -> Any:
        """The blocks, in order; each of a transformer has an `mlp`."""
        return self.kind.blocks

    def train(self, mode: bool = True) -> Self:
        """As any module's, but batch norm keeps to its stored statistics, trained or not.

        Those of a micro-batch differ by rank and by how a batch is cut, the blank picture of a text-only one would
        count, and a recomputation in backward would count twice. Its scale and shift train like any parameter.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.train(False)
        return self

    def restore_buffers(self) -> None:
        """Compute again what the architecture defines and no checkpoint stores (rotary tables of EVA towers)."""
        stored = self.trunk.state_dict()
        buffers = {name: buffer for name, buffer in self.trunk.named_buffers() if name not in stored}
        if not buffers or any(buffer.is_meta for buffer in buffers.values()):
            return
        fresh = dict(build_trunk(self.config.embed_dim, self.config.vision_cfg, self.config.quick_gelu).named_buffers())
        for name, buffer in buffers.items():
            buffer.copy_(fresh[name])

    @property
    def tokens_per_tile(self) -> int:
        """Tokens that a block sees for one tile, class token included."""
        return self.grid[0] * self.grid[1] + self.kind.num_prefix_tokens

    def tile_image_ids(self, num_images: int, device: torch.device) -> Tensor:
        """Image of each token of the batch of tiles, [tiles, tokens_per_tile]: a sequence of this part is an image."""
        images = torch.arange(num_images, device=device)
        ids = torch.cat([images.repeat_interleave(scale * scale) for scale in self.config.scales])
        return ids[:, None].expand(-1, self.tokens_per_tile)

    def set_grad_checkpointing(self, enable: bool, function: Any = None) -> None:
        """Recompute each block's activations in backward, by `function` (default: torch's `checkpoint`).

        Not by the trunk's own switch, which takes no function. `forward` and not the block is wrapped, as transformers
        does: hooks on the block (those of ZeRO-3 and FSDP) must not run again in the recomputation.
        """
        function = function or partial(checkpoint, use_reentrant=False)
        for block in self.blocks:
            block.__dict__.pop("forward", None)
            if enable:
                block.forward = partial(_checkpointed, block, type(block).forward, function)

    def num_chunks(self, num_pictures: int) -> int | None:
        """In how many goes the trunk takes pixel values [num_pictures, ...]; None without a limit."""
        tiles = num_pictures * sum(scale * scale for scale in self.config.scales)
        return None if self.tile_batch is None else -(-tiles // self.tile_batch)

    def _in_chunks(self, tiles: Tensor, num_chunks: int | None) -> Features:
        """The trunk's features. Under ZeRO-3 ranks must call it equally often, so there only `num_chunks` cuts."""
        is_sharded = hasattr(next(self.parameters()), "ds_id")
        if self.tile_batch is None or (num_chunks is None and is_sharded):
            return self.kind.features(self.trunk(tiles))
        chunks = list(tiles.split(self.tile_batch))
        fill = max((num_chunks or 0) - len(chunks), 0)
        found = [self.kind.features(self.trunk(chunk)) for chunk in [*chunks, *[torch.zeros_like(tiles[:1])] * fill]]
        patches = torch.cat([features.patches for features in found[: len(chunks)]])
        for features in found[len(chunks) :]:  # in the graph, so that backward too calls the trunk as often
            patches = patches + features.patches.sum() * 0
        return Features(patches, torch.cat([features.prefix for features in found[: len(chunks)]]))

    def forward(self, pixel_values: Tensor, num_chunks: int | None = None) -> Tensor:
        """Features of each image; the checks' message says both sizes.

        num_chunks: how often the trunk is called at least, as all ranks do in this micro-batch; see `tile_batch`.
        """
        expected = self.config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, expected, expected):
            raise UserError(
                f"pixel_values: found shape {tuple(pixel_values.shape)}, expected [images, 3, {expected}, {expected}]"
            )
        dtype = next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalise(pixel_values, self.config.preprocess)
        pixel_values = pixel_values.to(dtype)
        tiles = torch.cat([self._tiles(pixel_values, scale) for scale in self.config.scales])
        patches, prefix = self._in_chunks(tiles, num_chunks)
        maps, classes, start = [], [], 0
        for scale in self.config.scales:
            stop = start + len(pixel_values) * scale * scale
            maps.append(self._merge(patches[start:stop], scale))
            classes.append(prefix[start:stop, :1].unflatten(0, (-1, scale * scale)).mean(1))
            start = stop
        features = torch.cat(maps, dim=-1)
        if self.config.select == "cls_patch":
            features = torch.cat([torch.cat(classes, dim=-1), features], dim=1)
        return features

    def _tiles(self, pixel_values: Tensor, scale: int) -> Tensor:
        """The images at this scale, cut: [n * scale², 3, size, size], image-major, tiles in reading order."""
        size = self.config.preprocess.size
        side = size * scale
        if pixel_values.shape[-1] != side:
            # Shrunk antialiased, as Pillow's resize is: what the tower saw in its own training. Enlarged without, as
            # S²'s own code does: torch's antialiased bicubic is another curve also where nothing is shrunk.
            shrinks = self.config.scales_from == "image"
            pixel_values = F.interpolate(
                pixel_values.float(), size=(side, side), mode="bicubic", antialias=shrinks, align_corners=False
            ).to(pixel_values.dtype)
        tiles = pixel_values.unflatten(3, (scale, size)).unflatten(2, (scale, size))  # n 3 row h column w
        return tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)

    def _merge(self, patches: Tensor, scale: int) -> Tensor:
        """Features of tiles [n * scale², h*w, D] back in place and mean-pooled to the base grid: [n, h*w, D]."""
        if scale == 1:
            return patches
        rows, columns = self.grid
        whole = patches.unflatten(0, (-1, scale, scale)).unflatten(3, (rows, columns))  # n R C h w D
        whole = whole.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # n D R*h C*w
        return F.avg_pool2d(whole, scale).flatten(2).transpose(1, 2)


def normalise(pixels: Tensor, preprocess: PreprocessConfig) -> Tensor:
    """uint8 [n, 3, H, W] -> float32. Mean and std are arguments of kernels: a tensor of them would have to be sent."""
    channels = zip(pixels.unbind(1), preprocess.mean, preprocess.std, strict=True)
    return torch.stack([(channel.float() / 255 - mean) / std for channel, mean, std in channels], dim=1)


def _checkpointed(block: nn.Module, forward: Any, function: Any, *inputs: Any, **keywords: Any) -> Any:
    if not block.training:
        return forward(block, *inputs, **keywords)
    return function(forward, block, *inputs, **keywords)
