"""A tiny NaFlex transformer of timm, SigLIP 2's but for its size, and the same model of transformers."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import is_model, register_model
from timm.models.naflexvit import NaFlexVitCfg, _create_naflexvit
from transformers import Siglip2VisionConfig, Siglip2VisionModel

NAME, PATCH, WIDTH = "naflexvit_tiny_for_tests", 8, 32


def naflexvit_tiny_for_tests(pretrained: bool = False, **options: Any) -> Any:
    cfg = NaFlexVitCfg(
        patch_size=PATCH, embed_dim=WIDTH, depth=3, num_heads=2, mlp_ratio=2.0, act_layer="gelu_tanh",
        global_pool="map", pos_embed_grid_size=(4, 4), pos_embed_interp_mode="bilinear",
    )  # fmt: skip
    return _create_naflexvit(NAME, pretrained=pretrained, cfg=cfg, **options)


if not is_model(NAME):
    register_model(naflexvit_tiny_for_tests)

TOWER: dict[str, Any] = {
    "embed_dim": WIDTH,
    "vision_cfg": {"timm_model_name": NAME, "image_size": 32, "timm_pool": "map", "timm_proj": "none"},
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"},
}


def siglip2() -> Siglip2VisionModel:
    """transformers' model of random weights, positions large enough to be seen."""
    torch.manual_seed(1)
    config = Siglip2VisionConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=3, num_attention_heads=2, patch_size=PATCH,
        num_patches=16,
    )  # fmt: skip
    model = Siglip2VisionModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model
