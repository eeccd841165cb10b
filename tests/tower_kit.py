"""Towers for tests: ours, and open_clip's own module of the same random weights."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower

from llava_compete.vision.sources import resolve_tower
from llava_compete.vision.tower import VisionTower
from llava_compete.vision.tower_config import VisionTowerSection

TIMM: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"timm_model_name": "test_vit2", "image_size": 64, "timm_pool": "", "timm_proj": "none"},
}

# Its rotary tables are buffers that no checkpoint stores.
ROTARY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {
        "timm_model_name": "eva02_tiny_patch14_224",
        "image_size": 28,
        "timm_pool": "",
        "timm_proj": "none",
    },
}


def make_tower(config: dict[str, Any], seed: int = 0, **options: Any) -> VisionTower:
    torch.manual_seed(seed)
    return VisionTower(resolve_tower(VisionTowerSection(config=config, **options))).eval()


def open_clip_tower(config: dict[str, Any], seed: int = 0) -> Any:
    """The whole visual module as open_clip makes it, with the same random weights."""
    torch.manual_seed(seed)
    visual = _build_vision_tower(
        config["embed_dim"], CLIPVisionCfg(**config["vision_cfg"]), config.get("quick_gelu", False)
    )
    if hasattr(getattr(visual, "trunk", None), "set_input_size"):
        visual.set_input_size(config["vision_cfg"]["image_size"])
    return visual.eval()
