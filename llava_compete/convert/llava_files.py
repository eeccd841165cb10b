"""The files of LLaVA's own layout: a language model with the projector inside, a tower beside it or inside, adapters.

Tensors get plain names: `vision_tower.`, `mm_projector.`, and ours for the language model (`model.language_model.`,
`lm_head.`). What lies in several files is taken from the nearest: the checkpoint's own, then those beside it
(`non_lora_trainables.bin`, `mm_projector.bin`, `clip.bin`), then the base's.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from llava_compete.convert.layout import ImportOptions, Source
from llava_compete.convert.places import directory_of
from llava_compete.convert.recipes import Recipe
from llava_compete.errors import UserError
from llava_compete.files import read_json
from llava_compete.weight_files import StoredTensor, read_headers, weight_files

ADAPTER_CONFIG = "adapter_config.json"
# What lies beside the weights, and what stands in front of its names.
BESIDE = {"non_lora_trainables.bin": "", "mm_projector.bin": "", "clip.bin": "vision_tower."}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

_SPELLINGS = (
    (r"^(?:base_model\.)?(?:model\.)*(?:vision_tower|image_tower)\.(?:image_tower\.|vision_tower\.)?", "vision_tower."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^(?:base_model\.)?(?:model\.)*mm_projector\.", "mm_projector."),
    (r"^(?:base_model\.)?(?:model\.)*image_newline$", "image_newline"),
    (r"^(?:base_model\.model\.)?lm_head\.", "lm_head."),
    (r"^(?:base_model\.model\.)?model\.", "model.language_model."),
)


def plain_name(name: str) -> str:
    """A tensor's name without the wrappers of LLaVA's classes and of peft."""
    for pattern, replacement in _SPELLINGS:
        if re.match(pattern, name):
            name = re.sub(pattern, replacement, name)
            if not name.startswith("vision_tower."):
                return name
    return name


class Tower(NamedTuple):
    """The vision model that a checkpoint names: its config, and where its preprocessor and perhaps its weights are."""

    config: PreTrainedConfig
    directory: Path


@dataclass
class Gathered:
    """All tensors by plain names, adapters merged in recipes, and where the tokenizer is."""

    tensors: dict[str, StoredTensor]
    merged: dict[str, Recipe]
    tokenizer_dir: Path
    tower: Tower
    unused: dict[str, str] = field(default_factory=dict)


def gather(source: Source, options: ImportOptions) -> Gathered:
    """Everything that a checkpoint of this layout is made of.

    Raises:
        UserError: an adapter or a projector without its base; a tower that cannot be found.
    """
    directory = source.directory
    own = source.by_names(plain_name)
    for name, prefix in BESIDE.items():
        if (directory / name).is_file():
            own = _named(directory / name, prefix) | own
    adapter = _read_adapter(directory)
    tokenizer_dir = directory
    if not any(name.startswith("model.language_model.layers.") for name in own):
        base = _base_of(source, options, adapter is not None)
        own = Source.open(base, {}).by_names(plain_name) | own
        if not any((directory / name).is_file() for name in TOKENIZER_FILES):
            tokenizer_dir = base
    merged = {} if adapter is None else _merge(own, *adapter, directory)
    tower = _tower(source, options)
    if not any(name.startswith("vision_tower.") for name in own):
        for file in weight_files(tower.directory):
            stored = {re.sub(r"^vision_model\.", "", name): tensor for name, tensor in read_headers(file).items()}
            parts = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "head.")
            own |= {f"vision_tower.{name}": tensor for name, tensor in stored.items() if name.startswith(parts)}
    unused = {name: "computed anew" for name in own if name.endswith(".rotary_emb.inv_freq")}
    return Gathered(own, merged, tokenizer_dir, tower, unused)


def _named(file: Path, prefix: str) -> dict[str, StoredTensor]:
    """The tensors of one file by plain names."""
    return {plain_name(prefix + name): tensor for name, tensor in read_headers(file).items()}


def _base_of(source: Source, options: ImportOptions, has_adapter: bool) -> Path:
    """The language model that an adapter or a projector alone belongs to."""
    directory = source.directory
    named = options.base
    if named is None and has_adapter:
        named = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    if named is None:
        named = source.config.get("_name_or_path")
    if not named:
        raise UserError(f"{directory}: holds no language model, and names no base; give one with --base")
    try:
        base = directory_of(named, "--base" if options.base else f"{directory}: base")
    except UserError as error:
        raise UserError(f"{error}; give the language model that these weights belong to with --base") from error
    if not weight_files(base):
        raise UserError(f"{base}: the base has no weights")
    return base


def _read_adapter(directory: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]] | None:
    """peft's config and tensors, or None where there is no adapter."""
    if not (directory / ADAPTER_CONFIG).is_file():
        return None
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (directory / name).is_file():
            return read_json(directory / ADAPTER_CONFIG), read_headers(directory / name)
    raise UserError(f"{directory}: {ADAPTER_CONFIG} without adapter_model.safetensors or adapter_model.bin")


def _merge(
    tensors: dict[str, StoredTensor], config: dict[str, Any], adapters: dict[str, StoredTensor], directory: Path
) -> dict[str, Recipe]:
    """Recipes W + scale B A of the adapted weights; the adapters' tensors join `tensors`."""
    path = directory / ADAPTER_CONFIG
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type: found {config.get('peft_type')!r}, expected 'LORA'")
    for key in ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise UserError(f"{path}: {key}: found {config[key]!r}, which is not supported")
    merged = {}
    for name, tensor in adapters.items():
        match = re.fullmatch(r"(.*)\.lora_([AB])(?:\.default)?\.weight", name)
        if match is None:
            tensors[plain_name(name)] = tensor
            continue
        weight = f"{plain_name(match[1])}.weight"
        if weight not in tensors:
            raise UserError(f"{directory}: {name} adapts {weight}, which the base does not have")
        tensors[f"{weight}.lora_{match[2]}"] = tensor
        merged[weight] = tensor
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    return {
        weight: Recipe((weight, f"{weight}.lora_A", f"{weight}.lora_B"), partial(adapted, scale)) for weight in merged
    }


def adapted(scale: float, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """W + scale B A, added in float32."""
    return (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)


def _tower(source: Source, options: ImportOptions) -> Tower:
    keys = ("mm_vision_tower", "mm_image_tower")
    found = next((source.config[key] for key in keys if source.config.get(key)), None)
    named = options.vision_tower or found
    if not named:
        raise UserError(f"{source.directory}: config.json names no vision tower; give one with --vision-tower")
    try:
        directory = directory_of(named, "--vision-tower" if options.vision_tower else "mm_vision_tower")
    except UserError as error:
        raise UserError(f"{error}; give the directory of transformers' model with --vision-tower") from error
    try:
        config = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: vision tower: {str(error).splitlines()[0]}") from error
    return Tower(getattr(config, "vision_config", config), directory)
