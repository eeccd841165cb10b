"""Put MoE blocks in the places of dense feed-forward blocks while a model is built (also on the meta device).

The weights come from a checkpoint, or stay random.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from llava_compete.errors import UserError
from llava_compete.language.families import decoder_layers, family_of, feed_forward_options
from llava_compete.model.config import LlavaCompeteConfig
from llava_compete.moe.block import SparseMoeBlock
from llava_compete.moe.layer_config import MoeLayerConfig
from llava_compete.moe.state import RoutingState
from llava_compete.vision.feed_forward import block_feed_forward
from llava_compete.vision.naflex_tower import NaFlexTower
from llava_compete.vision.projector import Projector
from llava_compete.vision.tower import VisionTower
from llava_compete.vision.tower_config import TowerConfig


def make_tower(config: TowerConfig) -> VisionTower:
    """The tower, dense."""
    return VisionTower(config) if config.max_patches is None else NaFlexTower(config)


def install_vision_experts(tower: VisionTower, moe: MoeLayerConfig, state: RoutingState) -> None:
    """Replace the MLPs of the tower's chosen blocks."""
    if not tower.kind.has_mlps:
        raise UserError(
            f"moe.vision: found a tower of feature maps ({type(tower.trunk).__name__}), whose stages see maps of "
            "different sizes; expected a vision transformer. Experts can go into the projector and the language model"
        )
    blocks = tower.blocks
    for index in _select(moe, len(blocks), "vision"):
        shape = block_feed_forward(blocks[index])
        blocks[index].mlp = _moe_block(moe, state, f"vision.{index}", **shape._asdict(), gated=False)


def make_projector(config: LlavaCompeteConfig, moe: MoeLayerConfig | None, state: RoutingState) -> Projector:
    """The projector, whose feed-forward block is a mixture where `moe` says so."""
    assert config.tower is not None
    section, width, hidden = config.projector, config.tower.feature_width, config.text_config.hidden_size
    has_newline = config.tower.tiles is not None
    if moe is None:
        return Projector(section, width, hidden, has_newline=has_newline)
    _select(moe, 1, "projector")

    def make_block(hidden_size: int, intermediate_size: int, output_size: int) -> nn.Module:
        return _moe_block(
            moe,
            state,
            "projector.0",
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            output_size=output_size,
            activation="gelu",
            gated=False,
            bias=True,
        )

    return Projector(section, width, hidden, make_block, has_newline)


def install_language_experts(
    language_model: nn.Module, text_config: PreTrainedConfig, moe: MoeLayerConfig, state: RoutingState
) -> None:
    """Replace the MLPs of the language model's chosen layers."""
    layers, family = decoder_layers(language_model), family_of(text_config)
    for index in _select(moe, len(layers), "language"):
        block = _moe_block(moe, state, f"language.{index}", **feed_forward_options(text_config))
        setattr(layers[index], str(family.mlp), block)


def _moe_block(moe: MoeLayerConfig, state: RoutingState, name: str, **shape: Any) -> SparseMoeBlock:
    block = SparseMoeBlock(moe, name=name, state=state, **shape)
    # The block initialises itself; the language model's own rule must not run over its parameters.
    for module in block.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]
    return block


def _select(moe: MoeLayerConfig, num_layers: int, part: str) -> list[int]:
    try:
        return moe.select_layers(num_layers)
    except ValueError as error:
        raise UserError(f"moe.{part}.{error}") from error
