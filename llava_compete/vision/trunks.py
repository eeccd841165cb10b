"""Two kinds of trunk behind one face: open_clip's own `VisionTransformer`, and timm's transformers.

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
from llava_compete.vision.lean_open_clip import CLIPVisionCfg, TimmModel, VisionTransformer, _build_vision_tower


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


class Features(NamedTuple):
    """Of the last kept block: patches [n, P, D] and prefix tokens (class, registers) [n, p, D]."""

    patches: Tensor
    prefix: Tensor


class Trunk(ABC):
    """What the tower asks of a trunk's module. A plain object: the module itself is the tower's child."""

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    @abstractmethod
    def blocks(self) -> Any:
        """The transformer blocks, in order; each has an `mlp`."""

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
        """Of a block's output."""

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of its square input in pixels."""

    @abstractmethod
    def keep(self, num_blocks: int) -> None:
        """Drop what lies behind the first blocks, and make `module(x)` return the last kept block's output.

        The call goes through the module's own `__call__`, since ZeRO-3 gathers a module's parameters in its hooks.
        """

    @abstractmethod
    def features(self, output: Any) -> Features:
        """What `module(x)` returned."""

    def _return_block(self, index: int, **prefix: Any) -> None:
        self.module.forward = partial(
            self.module.forward_intermediates,
            indices=[index],
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
            **prefix,
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

    @property
    def image_size(self) -> int:
        return int(self.module.image_size[0])

    def keep(self, num_blocks: int) -> None:
        self.module.prune_intermediate_layers([num_blocks - 1], prune_norm=True, prune_head=True)
        self.module.attn_pool = None
        self._return_block(num_blocks - 1, output_extra_tokens=True)

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

    @property
    def image_size(self) -> int:
        return int(self.module.patch_embed.img_size[0])

    def keep(self, num_blocks: int) -> None:
        self.module.prune_intermediate_layers([num_blocks - 1], prune_norm=True, prune_head=True)
        # timm fails where prefix tokens are asked of a trunk without any.
        self._return_block(num_blocks - 1, return_prefix_tokens=self.num_prefix_tokens > 0)

    def features(self, output: Any) -> Features:
        (only,) = output
        return Features(*only) if isinstance(only, tuple) else Features(only, only[:, :0])


def trunk_of(module: nn.Module) -> Trunk:
    """The face of a module that `build_trunk` made."""
    return OpenClipTrunk(module) if isinstance(module, VisionTransformer) else TimmTrunk(module)


def build_trunk(embed_dim: int, vision_cfg: dict[str, Any], quick_gelu: bool) -> nn.Module:
    """Only the visual part of an open_clip architecture (the text tower is never made), without pretrained weights."""
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
        if not isinstance(trunk, VisionTransformer) and not (
            hasattr(trunk, "blocks") and hasattr(trunk, "patch_embed")
        ):
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


def feature_block(num_blocks: int, feature_layer: int) -> int:
    """Index of the block whose output is the feature: -1 the last, -2 the second last."""
    if not -num_blocks <= feature_layer < num_blocks:
        raise UserError(f"vision_tower.feature_layer: found {feature_layer}, but the tower has {num_blocks} blocks")
    return feature_layer % num_blocks


def tower_facts(
    embed_dim: int, vision_cfg: dict[str, Any], quick_gelu: bool, feature_layer: int, select: str
) -> TowerFacts:
    """Width, tokens and kept layers of an architecture, from a build on the meta device."""
    with torch.device("meta"):
        trunk = trunk_of(build_trunk(embed_dim, vision_cfg, quick_gelu))
    if select == "cls_patch" and not trunk.has_class_token:
        raise UserError("vision_tower.select: found 'cls_patch', but this tower has no class token; use 'patch'")
    rows, columns = trunk.grid
    tokens = rows * columns + (select == "cls_patch")
    return TowerFacts(trunk.width, tokens, feature_block(len(trunk.blocks), feature_layer) + 1, trunk.image_size)


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
