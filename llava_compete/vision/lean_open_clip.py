"""What the tower needs of open_clip, without Weights & Biases, which timm imports where it is installed (a second)."""

from __future__ import annotations

from llava_compete.optional_packages import not_installed

with not_installed("wandb"):
    import timm.utils.summary  # noqa: F401

import open_clip
from open_clip.factory import _find_checkpoint_in_dir
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from open_clip.pretrained import (
    download_pretrained,
    download_pretrained_from_hf,
    get_pretrained_cfg,
    list_pretrained_tags_by_model,
)
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.naflexvit import NaFlexVit

__all__ = [
    "CLIPVisionCfg",
    "NaFlexVit",
    "TimmModel",
    "VisionTransformer",
    "_build_vision_tower",
    "_find_checkpoint_in_dir",
    "download_pretrained",
    "download_pretrained_from_hf",
    "get_pretrained_cfg",
    "list_pretrained_tags_by_model",
    "open_clip",
]
