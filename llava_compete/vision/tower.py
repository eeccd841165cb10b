"""The vision tower: the visual half of an open_clip model, cut after its feature layer, with optional S² scales.

Two kinds of trunk, both with `forward_intermediates`: open_clip's own `VisionTransformer` and timm's.
What lies behind the feature layer (later blocks, pooling, projection) is dropped, since it could never get a gradient.
S² (arXiv 2403.13043): a scale s is the image at s times the base size, cut in s x s tiles; tiles' features are put
back in place, pooled to the base grid and concatenated over scales. All tiles of all scales pass in one batch.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llava_compete.errors import UserError
from llava_compete.vision.tower_config import PreprocessConfig, TowerConfig


class FeedForward(NamedTuple):
    """Shape of a block's dense MLP, which is what a MoE block must match."""

    hidden_size: int
    intermediate_size: int
    activation: str
    bias: bool


class TowerFacts(NamedTuple):
    """What an architecture and a feature choice come to."""

    width: int
    num_tokens: int
    num_layers: int
    image_size: int


class VisionTower(nn.Module):
    """pixel_values [n, 3, H, W] at the largest scale -> features [n, num_tokens, feature_width].

    uint8 pixels (version 2) are normalised here, on their device; floating-point ones have been.
    """

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = build_trunk(config.embed_dim, config.vision_cfg, config.quick_gelu)
        kept = feature_block(len(trunk_blocks(self.trunk)), config.feature_layer) + 1
        cut_trunk(self.trunk, kept)
        self.grid = _grid(self.trunk)

    @property
    def blocks(self) -> Any:
        """The transformer blocks, in order; each has an `mlp`."""
        return trunk_blocks(self.trunk)

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
        return self.grid[0] * self.grid[1] + _num_prefix_tokens(self.trunk)

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

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features of each image; the checks' message says both sizes."""
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
        patches, prefix = self._features(tiles)
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

    def _features(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Patch features [tiles, patches, D] and prefix (class) features [tiles, p, D] of the last kept block."""
        output = self.trunk(tiles)
        if isinstance(output, dict):
            return output["image_intermediates"][0], output["image_intermediates_prefix"][0]
        (only,) = output
        return only if isinstance(only, tuple) else (only, only[:, :0])

    def _tiles(self, pixel_values: Tensor, scale: int) -> Tensor:
        """The images at this scale, cut: [n * scale², 3, size, size], image-major, tiles in reading order."""
        size = self.config.preprocess.size
        side = size * scale
        if pixel_values.shape[-1] != side:
            # Antialiased, as Pillow's resize is: what the tower saw in its own training.
            pixel_values = F.interpolate(
                pixel_values.float(), size=(side, side), mode="bicubic", antialias=True, align_corners=False
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


def build_trunk(embed_dim: int, vision_cfg: dict[str, Any], quick_gelu: bool) -> Any:
    """Only the visual part of an open_clip architecture (the text tower is never made), without pretrained weights."""
    from llava_compete.vision.lean_open_clip import CLIPVisionCfg, TimmModel, VisionTransformer, _build_vision_tower

    try:
        parsed = CLIPVisionCfg(**{**vision_cfg, "timm_model_pretrained": False})
    except TypeError as error:
        raise UserError(f"vision_tower.config.vision_cfg: {error}") from error
    size = parsed.image_size
    if not isinstance(size, int):
        raise UserError(f"vision tower: image_size {size}: expected one number, the side of a square")
    if parsed.timm_model_name is None and isinstance(parsed.patch_size, int):
        _check_grid(size, parsed.patch_size)
    with _quiet():
        try:
            visual = _build_vision_tower(embed_dim, parsed, quick_gelu)
        except (RuntimeError, AssertionError, TypeError, ValueError) as error:
            raise UserError(f"vision tower {parsed.timm_model_name or vision_cfg}: {error}") from error
        trunk = visual.trunk if isinstance(visual, TimmModel) else visual
        is_timm_transformer = hasattr(trunk, "blocks") and hasattr(trunk, "patch_embed")
        if not isinstance(trunk, VisionTransformer) and not is_timm_transformer:
            raise UserError(
                f"vision tower {parsed.timm_model_name or type(trunk).__name__}: not a vision transformer, so it has "
                "no blocks to choose a layer from. Choose a ViT, such as ViT-L-14-336-quickgelu or ViT-SO400M-14-SigLIP"
            )
        # A timm trunk's own size stays as its weights were trained, also 384 on patches of 14, where the patches leave
        # a margin out; any other size must divide.
        if isinstance(visual, TimmModel) and size != trunk.patch_embed.img_size[0]:
            _check_grid(size, trunk.patch_embed.feat_ratio())
            trunk.set_input_size(img_size=size)
    return trunk


def _check_grid(size: int, patch: int) -> None:
    if size % patch:
        raise UserError(f"vision tower: image size {size} is not a multiple of its patch size {patch}")


def trunk_blocks(trunk: Any) -> Any:
    """The sequence of transformer blocks of either kind of trunk."""
    return trunk.transformer.resblocks if hasattr(trunk, "transformer") else trunk.blocks


def feature_block(num_blocks: int, feature_layer: int) -> int:
    """Index of the block whose output is the feature: -1 the last, -2 the second last."""
    if not -num_blocks <= feature_layer < num_blocks:
        raise UserError(f"vision_tower.feature_layer: found {feature_layer}, but the tower has {num_blocks} blocks")
    return feature_layer % num_blocks


def cut_trunk(trunk: Any, num_blocks: int) -> None:
    """Keep the first blocks only, and make `trunk(x)` return the last kept block's output.

    The call goes through the trunk's own `__call__`, since ZeRO-3 gathers a module's parameters in its hooks.
    """
    trunk.prune_intermediate_layers([num_blocks - 1], prune_norm=True, prune_head=True)
    native = hasattr(trunk, "transformer")
    if native:
        trunk.attn_pool = None
    # timm fails where prefix tokens are asked of a trunk without any.
    prefix = {"output_extra_tokens": True} if native else {"return_prefix_tokens": _num_prefix_tokens(trunk) > 0}
    trunk.forward = partial(
        trunk.forward_intermediates,
        indices=[num_blocks - 1],
        stop_early=True,
        output_fmt="NLC",
        intermediates_only=True,
        **prefix,
    )


def block_feed_forward(block: Any) -> FeedForward:
    """Shape of the dense MLP of a block of either kind of trunk."""
    mlp = block.mlp
    up = mlp.c_fc if hasattr(mlp, "c_fc") else mlp.fc1 if hasattr(mlp, "fc1") else None
    activation = getattr(mlp, "gelu", None) or getattr(mlp, "act", None)
    norm = mlp.ln if hasattr(mlp, "ln") else getattr(mlp, "norm", nn.Identity())
    if up is None or activation is None or not isinstance(norm, nn.Identity):
        raise UserError(f"moe.vision: the tower's MLP {type(mlp).__name__} is not linear, activation, linear")
    return FeedForward(up.in_features, up.out_features, _activation_name(activation), up.bias is not None)


def tower_facts(
    embed_dim: int, vision_cfg: dict[str, Any], quick_gelu: bool, feature_layer: int, select: str
) -> TowerFacts:
    """Width, tokens and kept layers of an architecture, from a build on the meta device."""
    with torch.device("meta"):
        trunk = build_trunk(embed_dim, vision_cfg, quick_gelu)
    blocks = trunk_blocks(trunk)
    rows, columns = _grid(trunk)
    native = hasattr(trunk, "transformer")
    if select == "cls_patch" and not native and trunk.cls_token is None:
        raise UserError("vision_tower.select: found 'cls_patch', but this tower has no class token; use 'patch'")
    tokens = rows * columns + (select == "cls_patch")
    width = trunk.class_embedding.shape[0] if native else trunk.embed_dim
    size = trunk.image_size if native else trunk.patch_embed.img_size
    return TowerFacts(width, tokens, feature_block(len(blocks), feature_layer) + 1, int(size[0]))


def _grid(trunk: Any) -> tuple[int, int]:
    grid = trunk.grid_size if hasattr(trunk, "transformer") else trunk.patch_embed.grid_size
    return int(grid[0]), int(grid[1])


def _num_prefix_tokens(trunk: Any) -> int:
    return 1 if hasattr(trunk, "transformer") else int(trunk.num_prefix_tokens)


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """open_clip and timm log and warn about every build; nothing in it concerns a user of a resolved config."""
    root = logging.getLogger()
    level = root.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root.setLevel(logging.ERROR)
        try:
            yield
        finally:
            root.setLevel(level)


def _checkpointed(block: nn.Module, forward: Any, function: Any, *inputs: Any, **keywords: Any) -> Any:
    if not block.training:
        return forward(block, *inputs, **keywords)
    return function(forward, block, *inputs, **keywords)
