"""Parameter names of checkpoints written before version 0.2.0, which had no backbone below the head.

vision_tower.*, projector.*           -> model.vision_tower.*, model.multi_modal_projector.*
language_model.<layers' name>.*       -> model.language_model.*
language_model.<head's name>.*        -> lm_head.*
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

# Names that causal LMs of transformers give their layers and their head.
_LAYERS, _HEADS = "model|transformer|gpt_neox", "lm_head|embed_out"
OLD_NAMES = {
    r"^vision_tower\.": "model.vision_tower.",
    r"^projector\.": "model.multi_modal_projector.",
    rf"^language_model\.(?:{_LAYERS})\.": "model.language_model.",
    rf"^language_model\.(?:{_HEADS})\.": "lm_head.",
}


def current_name(name: str) -> str:
    """The parameter's name in the model of today; a name of today stays as it is."""
    for pattern, replacement in OLD_NAMES.items():
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name


def are_old(names: Iterable[str]) -> bool:
    """Whether any of the names is one of before 0.2.0."""
    return any(current_name(name) != name for name in names)


def old_names_mapping(directory: str | Path) -> dict[str, str] | None:
    """transformers' `key_mapping` for a checkpoint directory with old names; None for any other source."""
    directory = Path(directory)
    index, weights = directory / "model.safetensors.index.json", directory / "model.safetensors"
    try:
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].keys()
        elif weights.is_file():
            with safe_open(weights, framework="pt") as file:
                names = file.keys()
        else:
            return None
    except (OSError, ValueError, KeyError, SafetensorError):
        return None  # damaged: the load itself says how
    return OLD_NAMES if are_old(names) else None
