"""Four kinds of trunk behind one face: open_clip's own `VisionTransformer`, timm's transformers, timm's NaFlex
transformer, and timm's networks of feature maps (ConvNeXt, EfficientNet, FastViT, Swin, ...).

A trunk's module keeps its own parameter names; what differs in how it is read, cut and called is in the class of its
kind here. A new kind is one more class and one line of `trunk_of`.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava_compete.errors import UserError
from llava_compete.vision.lean_open_clip import (
    CLIPVisionCfg,
    NaFlexVit,
    TimmModel,
    VisionTransformer,
    _build_vision_tower,
)


class TowerFacts(NamedTuple):
    """What an architecture and a feature choice come to."""

    width: int
    num_tokens: int
    num_layers: int
    image_size: int


class Features(NamedTuple):
    """Of the last kept block or stage: patches [n, P, D] and prefix tokens (class, registers) [n, p, D]."""

    patches: Tensor
    prefix: Tensor


class Trunk(ABC):
    """What the tower asks of a trunk's module. A plain object: the module itself is the tower's child."""

    def __init__(self, module: Any) -> None:
        self.module = module

    # What feature_layer counts, and whether each has an `mlp` that sees the tokens of `grid`.
    layers_are, has_mlps = "blocks", True

    @property
    @abstractmethod
    def blocks(self) -> Any:
        """The blocks, in order; what gradient checkpointing recomputes."""

    @property
    def num_layers(self) -> int:
        """How many layers feature_layer chooses from."""
        return len(self.blocks)

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""

    @property
    @abstractmethod
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches."""

    @property
    @abstractmethod
    def has_class_token(self) -> bool:
        """Whether the first of them is a class token."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Of a feature of the last kept layer."""

    @abstractmethod
    def keep(self, num_layers: int) -> None:
        """Drop what lies behind the first layers, and make `module(x)` return the last kept layer's output.

        The call goes through the module's own `__call__`, since ZeRO-3 gathers a module's parameters in its hooks.
        """

    @abstractmethod
    def features(self, output: Any) -> Features:
        """What `module(x)` returned."""

    def _return_layer(self, index: int, output_fmt: str = "NLC", **options: Any) -> None:
        self.module.forward = partial(
            self.module.forward_intermediates,
            indices=[index],
            stop_early=True,
            output_fmt=output_fmt,
            intermediates_only=True,
            **options,
        )


class OpenClipTrunk(Trunk):
    """open_clip's own vision transformer; always with a class token."""

    num_prefix_tokens, has_class_token = 1, True

    @property
    def blocks(self) -> Any:
        return self.module.transformer.resblocks

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = self.module.grid_size
        return int(rows), int(columns)

    @property
    def width(self) -> int:
        return int(self.module.class_embedding.shape[0])

    def keep(self, num_layers: int) -> None:
        self.module.prune_intermediate_layers([num_layers - 1], prune_norm=True, prune_head=True)
        self.module.attn_pool = None
        self._return_layer(num_layers - 1, output_extra_tokens=True)

    def features(self, output: Any) -> Features:
        return Features(output["image_intermediates"][0], output["image_intermediates_prefix"][0])


class TimmTrunk(Trunk):
    """A transformer of timm, such as SigLIP's or EVA's."""

    @property
    def blocks(self) -> Any:
        return self.module.blocks

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = self.module.patch_embed.grid_size
        return int(rows), int(columns)

    @property
    def num_prefix_tokens(self) -> int:
        return int(self.module.num_prefix_tokens)

    @property
    def has_class_token(self) -> bool:
        return self.module.cls_token is not None

    @property
    def width(self) -> int:
        return int(self.module.embed_dim)

    def keep(self, num_layers: int) -> None:
        self.module.prune_intermediate_layers([num_layers - 1], prune_norm=True, prune_head=True)
        # timm fails where prefix tokens are asked of a trunk without any.
        self._return_layer(num_layers - 1, return_prefix_tokens=self.num_prefix_tokens > 0)

    def features(self, output: Any) -> Features:
        (only,) = output
        return Features(*only) if isinstance(only, tuple) else Features(only, only[:, :0])


class NaFlexTrunk(TimmTrunk):
    """timm's NaFlex transformer (SigLIP 2's), on squares of one size or on pictures of any (`naflex_tower`)."""

    def __init__(self, module: Any, image_size: int) -> None:
        super().__init__(module)
        self._image_size = image_size

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return int(self.module.embeds.patch_size[0])

    @property
    def grid(self) -> tuple[int, int]:
        side = self._image_size // self.patch
        return side, side

    @property
    def has_class_token(self) -> bool:
        return bool(self.module.has_class_token)


class FeatureMapTrunk(Trunk):
    """A convolutional or hierarchical network of timm: a layer is a stage, of which `feature_info` gives width and
    stride, and the tokens are the chosen stage's map, flattened.

    Blocks of earlier stages see other tokens, on a finer map, than the tower gives: no experts here.
    """

    num_prefix_tokens, has_class_token = 0, False
    layers_are, has_mlps = "stages", False

    def __init__(self, module: Any, image_size: int) -> None:
        super().__init__(module)
        self._image_size = image_size
        self._stages = list(module.feature_info)

    @property
    def blocks(self) -> Any:
        stages = next(
            (getattr(self.module, name) for name in ("stages", "blocks", "layers") if _has(self.module, name)), None
        )
        if stages is None:  # as in ResNet, whose stages are its own children
            stages = [child for name, child in self.module.named_children() if name.startswith("layer")]
        return [block for stage in stages for block in _blocks_of(stage)]

    @property
    def num_layers(self) -> int:
        return len(self._stages)

    @property
    def grid(self) -> tuple[int, int]:
        _check_grid(self._image_size, self._stages[-1]["reduction"], "the stride of the chosen stage")
        side = self._image_size // self._stages[-1]["reduction"]
        return side, side

    @property
    def width(self) -> int:
        return int(self._stages[-1]["num_chs"])

    def keep(self, num_layers: int) -> None:
        self.module.prune_intermediate_layers([num_layers - 1], prune_norm=True, prune_head=True)
        self._return_layer(num_layers - 1, output_fmt="NCHW")
        self._stages = self._stages[:num_layers]

    def features(self, output: Any) -> Features:
        (map_nDhw,) = output
        tokens = map_nDhw.flatten(2).transpose(1, 2)
        return Features(tokens, tokens[:, :0])


def _has(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Sequential | nn.ModuleList)


def _blocks_of(stage: nn.Module) -> Any:
    blocks = getattr(stage, "blocks", stage)
    return blocks if isinstance(blocks, nn.Sequential | nn.ModuleList) else [stage]


def trunk_of(module: nn.Module, image_size: int) -> Trunk:
    """The face of a module that `build_trunk` made for pictures of this side in pixels."""
    if isinstance(module, VisionTransformer):
        return OpenClipTrunk(module)
    if isinstance(module, NaFlexVit):
        return NaFlexTrunk(module, image_size)
    return TimmTrunk(module) if _is_transformer(module) else FeatureMapTrunk(module, image_size)


def _is_transformer(module: Any) -> bool:
    """Whether a timm module has blocks of one width and one number of tokens."""
    grid = getattr(getattr(module, "patch_embed", None), "grid_size", None)
    return hasattr(module, "blocks") and hasattr(module, "num_prefix_tokens") and grid is not None


def build_trunk(embed_dim: int, vision_cfg: dict[str, Any], quick_gelu: bool) -> nn.Module:
    """Only the visual part of an open_clip architecture (the text tower is never made), without pretrained weights."""
    parsed = _parse(vision_cfg)
    size = parsed.image_size
    if parsed.timm_model_name is None and isinstance(parsed.patch_size, int):
        _check_grid(size, parsed.patch_size)
    name = parsed.timm_model_name or vision_cfg
    with _quiet():
        try:
            visual = _build_vision_tower(embed_dim, parsed, quick_gelu)
        except (RuntimeError, AssertionError, TypeError, ValueError) as error:
            raise UserError(f"vision tower {name}: {error}") from error
        trunk: Any = visual.trunk if isinstance(visual, TimmModel) else visual
        if isinstance(trunk, VisionTransformer):
            return trunk
        if _is_transformer(trunk):
            if parsed.act_kwargs:
                _set_gelu(trunk, parsed.act_kwargs)
            # A timm trunk's own size stays as its weights were trained, also 384 on patches of 14, where the patches
            # leave a margin out; any other size must divide.
            if size != trunk.patch_embed.img_size[0]:
                _check_grid(size, trunk.patch_embed.feat_ratio())
                trunk.set_input_size(img_size=size)
            return trunk
        if isinstance(trunk, NaFlexVit):
            _check_grid(size, trunk.embeds.feat_ratio())
            return trunk
        if not all(
            hasattr(trunk, part) for part in ("forward_intermediates", "prune_intermediate_layers", "feature_info")
        ):
            raise UserError(
                f"vision tower {parsed.timm_model_name or type(trunk).__name__}: neither a vision transformer nor a "
                "network of timm whose feature maps can be taken, so it has no layers to choose from. Choose one such "
                "as ViT-L-14-336-quickgelu, ViT-SO400M-14-SigLIP, convnext_large_d_320 or MobileCLIP-S2"
            )
        if hasattr(trunk, "set_input_size"):  # of windows that must fit the map
            try:
                trunk.set_input_size(img_size=(size, size))
            except (RuntimeError, AssertionError, TypeError, ValueError) as error:
                raise UserError(f"vision tower {name}: image size {size}: {error}") from error
    return trunk


def _parse(vision_cfg: dict[str, Any]) -> CLIPVisionCfg:
    try:
        parsed = CLIPVisionCfg(**{**vision_cfg, "timm_model_pretrained": False})
    except TypeError as error:
        raise UserError(f"vision_tower.config.vision_cfg: {error}") from error
    if not isinstance(parsed.image_size, int):
        raise UserError(f"vision tower: image_size {parsed.image_size}: expected one number, the side of a square")
    return parsed


def _set_gelu(trunk: Any, options: dict[str, Any]) -> None:
    """Give the MLPs of a timm trunk the GELU of `vision_cfg.act_kwargs`, which open_clip reads for its own trunks only.

    timm builds some SigLIP towers with the exact GELU whose weights were trained with the tanh approximation.
    """
    for block in trunk.blocks:
        block.mlp.act = nn.GELU(**options)


def _check_grid(size: int, patch: int, what: str = "its patch size") -> None:
    if size % patch:
        raise UserError(f"vision tower: image size {size} is not a multiple of {what} {patch}")


def feature_block(trunk: Trunk, feature_layer: int) -> int:
    """Index of the block or stage whose output is the feature: -1 the last, -2 the second last."""
    count = trunk.num_layers
    if not -count <= feature_layer < count:
        raise UserError(
            f"vision_tower.feature_layer: found {feature_layer}, but the tower has {count} {trunk.layers_are}"
        )
    return feature_layer % count


def tower_facts(
    embed_dim: int, vision_cfg: dict[str, Any], quick_gelu: bool, feature_layer: int, select: str
) -> TowerFacts:
    """Width, tokens and kept layers of an architecture, from a build on the meta device."""
    size = _parse(vision_cfg).image_size
    with torch.device("meta"):
        module = build_trunk(embed_dim, vision_cfg, quick_gelu)
        trunk = trunk_of(module, size)
        if select == "cls_patch" and not trunk.has_class_token:
            raise UserError("vision_tower.select: found 'cls_patch', but this tower has no class token; use 'patch'")
        num_layers = feature_block(trunk, feature_layer) + 1
        trunk.keep(num_layers)
        rows, columns = trunk.grid
        if isinstance(trunk, FeatureMapTrunk):
            _check_map(trunk, size)
    return TowerFacts(trunk.width, rows * columns + (select == "cls_patch"), num_layers, size)


def _check_map(trunk: FeatureMapTrunk, size: int) -> None:
    """That a picture of this size gives the map that timm's table promises."""
    try:
        (found,) = trunk.module(torch.empty(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"vision tower {type(trunk.module).__name__}: image size {size}: {error}") from error
    expected = (1, trunk.width, *trunk.grid)
    if tuple(found.shape) != expected:
        raise UserError(
            f"vision tower {type(trunk.module).__name__}: image size {size} gives a map {tuple(found.shape)}, "
            f"expected {expected}"
        )


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
