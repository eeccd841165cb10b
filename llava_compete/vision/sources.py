"""From what a YAML names to a resolved `TowerConfig`, and pretrained weights of only the visual part.

Sources: open_clip's registry by name and tag, `hf-hub:org/repo`, `local-dir:path`, or a config given inline.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava_compete.config import parse_config
from llava_compete.errors import UserError, and_more, nearest
from llava_compete.files import read_json
from llava_compete.vision.naflex_tower import check_naflex
from llava_compete.vision.siglip2_weights import is_siglip2, timm_weights
from llava_compete.vision.tiles import LLAVA_NEXT_GRIDS
from llava_compete.vision.tower import VisionTower
from llava_compete.vision.tower_config import (
    CLIP_MEAN,
    CLIP_STD,
    LATEST_PIXELS,
    TILE_PIXELS,
    TilesSection,
    TowerConfig,
    VisionTowerSection,
)
from llava_compete.vision.trunks import build_trunk, tower_facts, trunk_of
from llava_compete.weight_files import load_pickled

logger = logging.getLogger(__name__)

# open_clip's words for how an image becomes square, and ours.
_RESIZE_MODES = {"shortest": "crop", "longest": "pad", "squash": "squash"}


class OpenClipModel(NamedTuple):
    """An architecture (open_clip's model config) and the preprocessing its weights were trained with."""

    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]


def resolve_tower(section: VisionTowerSection) -> TowerConfig:
    """Spell out everything that decides the tower's pixels and features. Only `hf-hub:` needs a network."""
    model_cfg, preprocess_cfg = _lookup(section)
    embed_dim, vision_cfg = model_cfg["embed_dim"], model_cfg["vision_cfg"]
    if not isinstance(embed_dim, int) or not isinstance(vision_cfg, dict):
        raise UserError(
            "vision_tower: expected open_clip's model config, with embed_dim a number and vision_cfg a mapping"
        )
    quick_gelu = bool(model_cfg.get("quick_gelu", False))
    facts = tower_facts(embed_dim, vision_cfg, quick_gelu, section.feature_layer, section.select)
    size, max_patches = facts.image_size, None
    if section.naflex is not None:
        size, max_patches = _patch_side(embed_dim, vision_cfg), section.naflex.max_patches
    # LLaVA-NeXT squashes the whole picture, whose proportions its tiles keep.
    resize_mode = "squash" if section.tiles or section.naflex else preprocess_cfg.get("resize_mode") or "shortest"
    preprocess = {
        "size": size,
        "mean": preprocess_cfg.get("mean") or CLIP_MEAN,
        "std": preprocess_cfg.get("std") or CLIP_STD,
        "interpolation": preprocess_cfg.get("interpolation") or "bicubic",
        "resize_mode": _RESIZE_MODES.get(resize_mode, resize_mode),
        "version": TILE_PIXELS if section.tiles or section.naflex else LATEST_PIXELS,
    }
    values = {
        **section.model_dump(include={"name", "pretrained", "feature_layer", "select", "scales", "scales_from"}),
        "tiles": None if section.tiles is None else _grids(section.tiles),
        "max_patches": max_patches,
        "embed_dim": embed_dim,
        "quick_gelu": quick_gelu,
        "vision_cfg": vision_cfg,
        "preprocess": {**preprocess, **section.preprocess.model_dump(exclude_none=True)},
        "width": facts.width,
        "num_tokens": max_patches or facts.num_tokens,
        "num_layers": facts.num_layers,
    }
    tower = parse_config(TowerConfig, values, source="vision_tower")
    if (tower.tiles or tower.max_patches) is not None and tower.preprocess.version != TILE_PIXELS:
        raise UserError(
            f"vision_tower.preprocess.version: found {tower.preprocess.version}, expected {TILE_PIXELS}, the pixels "
            "that tiles and patches are made of"
        )
    return tower


def _patch_side(embed_dim: int, vision_cfg: dict[str, Any]) -> int:
    """Of a NaFlex tower."""
    with torch.device("meta"):
        trunk = trunk_of(build_trunk(embed_dim, vision_cfg, quick_gelu=False), 0)
    return check_naflex(trunk, vision_cfg.get("timm_model_name") or type(trunk.module).__name__).patch


def _grids(section: TilesSection) -> Sequence[tuple[int, int]]:
    """The grids that a picture may be cut into; of equal ones the smaller first."""
    if section.grids is not None:
        return section.grids
    if section.max is None:
        return LLAVA_NEXT_GRIDS
    sides = range(1, section.max + 1)
    grids = [(rows, columns) for rows in sides for columns in sides if rows * columns <= section.max]
    return sorted(grids, key=lambda grid: (grid[0] * grid[1], grid))


def load_pretrained(tower: VisionTower, section: VisionTowerSection) -> bool:
    """Load the visual weights that `section` names into `tower`; False if it names none."""
    path = _weights_path(section)
    if path is None:
        return False
    config = tower.config
    stored, of_transformers = _read_visual(path)
    whole = build_trunk_keys(config)
    prefix = "trunk." if config.vision_cfg.get("timm_model_name") and not of_transformers else ""
    if prefix:  # the rest of a timm tower is its projection head
        stored = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    wanted = tower.trunk.state_dict()
    problems = [f"missing {key}" for key in wanted if key not in stored]
    problems += [f"unexpected {key}" for key in stored if key not in whole]
    problems += [
        f"{key} has shape {list(stored[key].shape)}, expected {list(value.shape)}"
        for key, value in wanted.items()
        if key in stored and stored[key].shape != value.shape
    ]
    if problems:
        raise UserError(f"{path}: not the weights of this tower: {and_more(problems)}")
    tower.trunk.load_state_dict({key: stored[key] for key in wanted})
    return True


def build_trunk_keys(config: TowerConfig) -> set[str]:
    """Names of all tensors of the uncut trunk: what pretrained weights may hold and we may leave aside."""
    with torch.device("meta"):
        return set(build_trunk(config.embed_dim, config.vision_cfg, config.quick_gelu).state_dict())


def _lookup(section: VisionTowerSection) -> OpenClipModel:
    if section.config is not None:
        return _given("vision_tower.config", section.config, section.config)
    name = str(section.name)
    if name.startswith(("hf-hub:", "local-dir:")):
        if section.pretrained is not None:
            raise UserError(f"vision_tower.pretrained: found {section.pretrained!r}, but {name} brings its own weights")
        path = _open_clip_config_path(name)
        content = read_json(path)
        if not isinstance(content, dict) or "model_cfg" not in content:
            raise UserError(f"{path}: missing key 'model_cfg'; not an open_clip config")
        return _given(f"{path}: model_cfg", content["model_cfg"], content)
    return _lookup_registry(name.replace("/", "-"), section.pretrained)


def _given(place: str, model_cfg: Any, beside: dict[str, Any]) -> OpenClipModel:
    """A config that stands at `place`, and the preprocessing that `beside` may hold."""
    if not isinstance(model_cfg, dict):
        raise UserError(f"{place}: found {model_cfg!r}, expected a mapping (open_clip's model config)")
    missing = [key for key in ("embed_dim", "vision_cfg") if key not in model_cfg]
    if missing:
        raise UserError(f"{place}: missing key {missing[0]!r} (open_clip's model config)")
    return OpenClipModel(model_cfg, beside.get("preprocess_cfg") or {})


def _lookup_registry(name: str, pretrained: str | None) -> OpenClipModel:
    from llava_compete.vision.lean_open_clip import get_pretrained_cfg, list_pretrained_tags_by_model, open_clip

    model_cfg = open_clip.get_model_config(name)
    if model_cfg is None:
        models = open_clip.list_models()
        near = nearest(name, models, cutoff=0.5)
        near = near or [model for model in models if name.lower() in model.lower()]
        hint = f"did you mean {', '.join(near[:5])}?" if near else "see open_clip.list_models()"
        raise UserError(f"vision_tower.name: unknown open_clip model {name!r}; {hint}")
    if pretrained is None:
        return OpenClipModel(model_cfg, {})
    if Path(pretrained).is_file():
        return OpenClipModel(model_cfg, _agreed_preprocessing(name))
    preprocess_cfg = get_pretrained_cfg(name, pretrained)
    if not preprocess_cfg:
        tags = list_pretrained_tags_by_model(name)
        raise UserError(f"vision_tower.pretrained: {name} has no weights {pretrained!r}; known: {', '.join(tags)}")
    trained_with = bool(preprocess_cfg.get("quick_gelu", False))
    if "timm_model_name" not in model_cfg["vision_cfg"] and trained_with != bool(model_cfg.get("quick_gelu", False)):
        logger.warning(
            "%s %s: its weights were trained with quick_gelu=%s, so that is used", name, pretrained, trained_with
        )
        model_cfg = {**model_cfg, "quick_gelu": trained_with}
    return OpenClipModel(model_cfg, preprocess_cfg)


def _agreed_preprocessing(name: str) -> dict[str, Any]:
    """What all published weights of an architecture agree in, for those of a file, which say nothing of pixels.

    open_clip takes CLIP's for any file: a SigLIP tower would see pictures cropped, and of other brightness, unnoticed.
    """
    from llava_compete.vision.lean_open_clip import get_pretrained_cfg, list_pretrained_tags_by_model

    published = [get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)]
    found = {key: [one.get(key) for one in published] for key in ("mean", "std", "interpolation", "resize_mode")}
    return {key: values[0] for key, values in found.items() if values and values.count(values[0]) == len(values)}


def _open_clip_config_path(name: str) -> Path:
    scheme, _, place = name.partition(":")
    if scheme == "local-dir":
        if not Path(place).is_dir():
            raise UserError(f"vision_tower.name: {name}: no such directory")
        path = Path(place) / "open_clip_config.json"
        if not path.is_file():
            raise UserError(f"vision_tower.name: {name}: has no open_clip_config.json")
        return path
    from llava_compete.vision.lean_open_clip import download_pretrained_from_hf

    try:
        return Path(download_pretrained_from_hf(place, filename="open_clip_config.json"))
    except FileNotFoundError as error:
        raise UserError(f"vision_tower.name: {name}: {_line(error)}") from error


def _weights_path(section: VisionTowerSection) -> Path | None:
    """The file with the tower's pretrained weights, downloaded where it must be."""
    from llava_compete.vision.lean_open_clip import (
        _find_checkpoint_in_dir,
        download_pretrained,
        download_pretrained_from_hf,
        get_pretrained_cfg,
    )

    name = section.name or ""
    try:
        if name.startswith("hf-hub:"):
            return Path(download_pretrained_from_hf(name.removeprefix("hf-hub:")))
        if name.startswith("local-dir:"):
            found = _find_checkpoint_in_dir(Path(name.removeprefix("local-dir:")))
            if found is None:
                raise UserError(f"vision_tower.name: {name}: has no weights")
            return Path(found)
        if section.pretrained is None:
            return None
        if Path(section.pretrained).is_file():
            return Path(section.pretrained)
        if section.config is not None:
            raise UserError(f"vision_tower.pretrained: {section.pretrained}: no such file")
        return Path(download_pretrained(get_pretrained_cfg(name.replace("/", "-"), section.pretrained)))
    except (FileNotFoundError, RuntimeError, OSError) as error:
        raise UserError(
            f"vision_tower: cannot fetch the weights of {name} {section.pretrained}: {_line(error)}"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _read_visual(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors under `visual.` of a CLIP checkpoint, or of transformers' SigLIP 2 by timm's names (True); pickled
    files only with torch's safe unpickler."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                if is_siglip2(file.keys()):
                    return timm_weights({key: file.get_tensor(key) for key in file.keys()}), True  # noqa: SIM118
                keys = _visual_keys(file.keys(), path)
                return {key.removeprefix("visual."): file.get_tensor(key) for key in keys}, False
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or damaged weights ({_line(error)})") from error
    loaded: Any = load_pickled(path)
    content = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: expected tensors by name; not an open_clip checkpoint")
    content = {key.removeprefix("module."): value for key, value in content.items()}
    return {key.removeprefix("visual."): content[key] for key in _visual_keys(content, path)}, False


def _visual_keys(keys: Any, path: Path) -> list[str]:
    visual = [key for key in keys if key.startswith("visual.")]
    if not visual:
        raise UserError(f"{path}: has no tensors under 'visual.'; not an open_clip checkpoint")
    return visual
