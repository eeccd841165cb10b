"""From what a YAML names to a resolved `TowerConfig`, and pretrained weights of only the visual part.

Sources: open_clip's registry by name, `hf-hub:org/repo`, `local-dir:path`, or a config given inline.
"""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

from llava_compete.errors import UserError
from llava_compete.model.config import VisionTowerSection
from llava_compete.model.tower import tower_facts
from llava_compete.model.tower_config import CLIP_MEAN, CLIP_STD, PreprocessConfig, TowerConfig

# open_clip's words for how an image becomes square, and ours.
_RESIZE_MODES = {"shortest": "crop", "longest": "pad", "squash": "squash"}


class OpenClipModel(NamedTuple):
    """An architecture (open_clip's model config) and the preprocessing its weights were trained with."""

    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]


def resolve_tower(section: VisionTowerSection) -> TowerConfig:
    """Spell out everything that decides the tower's pixels and features."""
    found = _lookup(section)
    model_cfg = found.model_cfg
    embed_dim, vision_cfg = int(model_cfg["embed_dim"]), dict(model_cfg["vision_cfg"])
    quick_gelu = bool(model_cfg.get("quick_gelu", False))
    facts = tower_facts(embed_dim, vision_cfg, quick_gelu, section.feature_layer, section.select)
    defaults = {
        "mean": found.preprocess_cfg.get("mean") or CLIP_MEAN,
        "std": found.preprocess_cfg.get("std") or CLIP_STD,
        "interpolation": found.preprocess_cfg.get("interpolation") or "bicubic",
        "resize_mode": _RESIZE_MODES[found.preprocess_cfg.get("resize_mode") or "shortest"],
    }
    changes = section.preprocess.model_dump(exclude_none=True)
    return TowerConfig(
        name=section.name,
        pretrained=section.pretrained,
        embed_dim=embed_dim,
        quick_gelu=quick_gelu,
        vision_cfg=vision_cfg,
        feature_layer=section.feature_layer,
        select=section.select,
        scales=section.scales,
        preprocess=PreprocessConfig(size=facts.image_size, **{**defaults, **changes}),
        width=facts.width,
        num_tokens=facts.num_tokens,
        num_layers=facts.num_layers,
    )


def _lookup(section: VisionTowerSection) -> OpenClipModel:
    if section.config is not None:
        missing = [key for key in ("embed_dim", "vision_cfg") if key not in section.config]
        if missing:
            raise UserError(f"vision_tower.config: missing key {missing[0]!r} (open_clip's model config)")
        return OpenClipModel(section.config, section.config.get("preprocess_cfg", {}))
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    name = str(section.name).replace("/", "-")
    model_cfg = open_clip.get_model_config(name)
    if model_cfg is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see open_clip.list_models()"
        raise UserError(f"vision_tower.name: unknown open_clip model {name!r}; {hint}")
    preprocess_cfg: dict[str, Any] = {}
    if section.pretrained is not None:
        preprocess_cfg = get_pretrained_cfg(name, section.pretrained)
        if not preprocess_cfg:
            tags = list_pretrained_tags_by_model(name)
            raise UserError(
                f"vision_tower.pretrained: {name} has no weights {section.pretrained!r}; known: {', '.join(tags)}"
            )
    return OpenClipModel(model_cfg, preprocess_cfg)
