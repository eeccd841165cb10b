"""From a checkpoint of ours to one that plain transformers loads: its Llava, of tiles its LlavaNext, and its own MoE
language models inside.

What transformers' classes cannot express is refused, saying why.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    ProcessorMixin,
)

from llava_compete.convert.experts import expert_recipes, export_text_config
from llava_compete.convert.importing import refuse_existing
from llava_compete.convert.llava_hf import PROJECTOR
from llava_compete.convert.pictures import export_preprocessing, pinpoints_of
from llava_compete.convert.recipes import Recipe, plan_tensors
from llava_compete.convert.towers import SIGLIP, export_recipes, export_tower
from llava_compete.errors import UserError
from llava_compete.files import new_directory
from llava_compete.language.loading_report import damage_named, refuse_wrong_keys
from llava_compete.model.checkpoint import model_on_meta, read_config, read_weight_headers
from llava_compete.model.config import LlavaCompeteConfig
from llava_compete.model.processor import LlavaCompeteProcessor
from llava_compete.model.shards import SHARD_BYTES, PlannedTensor, write_shards
from llava_compete.moe.config import MoeConfig
from llava_compete.weight_files import StoredTensor

Whole: TypeAlias = LlavaConfig | LlavaNextConfig


class ExportReport(NamedTuple):
    """What went out: the class that loads it, its parameters, and files of weights."""

    architecture: str
    num_parameters: int
    num_shards: int


def export_checkpoint(checkpoint: str | Path, output_dir: str | Path, shard_bytes: int = SHARD_BYTES) -> ExportReport:
    """Write the `LlavaForConditionalGeneration`, of tiles the `LlavaNextForConditionalGeneration`, that answers as the
    checkpoint does.

    Raises:
        UserError: something that transformers' Llava has no place for.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)
    refuse_existing(output_dir)
    config = read_config(checkpoint)
    headers = read_weight_headers(checkpoint)
    tied = model_on_meta(checkpoint, config, headers).all_tied_weights_keys
    whole = _config(config, str(checkpoint))
    stored = {
        name: StoredTensor(facts.file, facts.stored_name, facts.shape, facts.dtype)
        for name, facts in headers.items()
        if tied.get(name) not in headers
    }
    recipes = _recipes(config, whole, stored)
    planned = plan_tensors(recipes, stored)
    planned |= _unused_norm(whole, next(iter(planned.values())).dtype)
    model = _on_meta(whole, planned, str(checkpoint))
    floats = {tensor.dtype for tensor in planned.values() if tensor.dtype.is_floating_point}
    whole.dtype = floats.pop() if len(floats) == 1 else torch.float32
    whole.architectures = [_class(whole).__name__]
    processor = LlavaCompeteProcessor.from_pretrained(checkpoint)
    with new_directory(output_dir) as partial_dir:
        num_shards = write_shards(partial_dir, planned, shard_bytes, title="export")
        whole.save_pretrained(partial_dir)
        _processor(config, whole, processor).save_pretrained(partial_dir)
        generation = checkpoint / "generation_config.json"
        if generation.is_file():
            (partial_dir / generation.name).write_bytes(generation.read_bytes())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ExportReport(whole.architectures[0], parameters, num_shards)


def _class(whole: Whole) -> type[LlavaForConditionalGeneration | LlavaNextForConditionalGeneration]:
    return LlavaNextForConditionalGeneration if isinstance(whole, LlavaNextConfig) else LlavaForConditionalGeneration


def _config(config: LlavaCompeteConfig, source: str) -> Whole:
    """transformers' config of the whole, or why there is none."""
    tower = config.tower
    if tower is None:
        raise UserError(f"{source}: a text-only model, and llava-hf is for models with a vision tower")
    if tower.max_patches is not None:
        raise UserError(f"{source}: pictures at their own proportions (vision_tower.naflex), which Llava has not")
    mode = tower.preprocess.resize_mode
    if tower.tiles is not None and mode != "squash":
        raise UserError(
            f"{source}: preprocess.resize_mode: found {mode}, and LLaVA-NeXT squashes the picture as a whole"
        )
    moe = MoeConfig() if config.moe is None else MoeConfig.model_validate(config.moe)
    for part in ("vision", "projector"):
        if getattr(moe, part) is not None:
            raise UserError(f"{source}: the {part} has experts (moe.{part}), which transformers' Llava has not")
    if config.competition_at_inference and moe.language is not None:
        raise UserError(f"{source}: competition_at_inference: found true; in transformers a router decides")
    if config.projector.pool > 1:
        raise UserError(f"{source}: projector.pool {config.projector.pool}, and transformers' Llava does not pool")
    if config.projector.norm:
        raise UserError(f"{source}: projector.norm: found true, and transformers' Llava has no norm there")
    kind = config.projector.type
    if kind != "mlp2x_gelu":
        raise UserError(f"{source}: projector type {kind!r}, and transformers' Llava has mlp2x_gelu alone")
    try:
        vision = export_tower(tower)
        text = export_text_config(config.text_config, moe.language)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    values: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": config.image_token_id,
        "image_seq_length": tower.num_tokens,
        # Our tower ends at its feature layer.
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full" if _all_features(config) else "default",
        "tie_word_embeddings": bool(config.tie_word_embeddings),
    }
    if tower.tiles is None:
        return LlavaConfig(**values)
    return LlavaNextConfig(**values, image_grid_pinpoints=pinpoints_of(tower.tiles, tower.preprocess.size))


def _all_features(config: LlavaCompeteConfig) -> bool:
    """Whether nothing of the tower's last hidden state is left out."""
    assert config.tower is not None
    return "timm_model_name" in config.tower.vision_cfg or config.tower.select == "cls_patch"


def _recipes(config: LlavaCompeteConfig, whole: Whole, stored: dict[str, StoredTensor]) -> dict[str, Recipe]:
    """transformers' names, from ours."""
    assert config.tower is not None
    recipes = {}
    for name, recipe in export_recipes(whole.vision_config.model_type, config.tower.num_layers).items():
        ours = tuple(f"model.vision_tower.trunk.{source}" for source in recipe.sources)
        recipes[f"model.vision_tower.{name}"] = recipe._replace(sources=ours)
    for own, theirs in PROJECTOR.items():
        recipes[f"model.multi_modal_projector.{theirs}"] = Recipe((f"model.multi_modal_projector.{own}",))
    if config.tower.tiles is not None:
        recipes["model.image_newline"] = Recipe(("model.multi_modal_projector.image_newline",))
    language = [name for name in stored if name.startswith(("model.language_model.", "lm_head."))]
    return recipes | expert_recipes(language, whole.text_config)


def _unused_norm(whole: Whole, dtype: torch.dtype) -> dict[str, PlannedTensor]:
    """The tower's last norm, which no feature passes: as a new one would be."""
    width = whole.vision_config.hidden_size
    return {
        f"model.vision_tower.post_layernorm.{name}": PlannedTensor(
            (width,), dtype, partial(_filled, width, value, dtype)
        )
        for name, value in (("weight", 1.0), ("bias", 0.0))
    }


def _filled(width: int, value: float, dtype: torch.dtype) -> Tensor:
    return torch.full((width,), value, dtype=dtype)


def _on_meta(whole: Whole, planned: dict[str, PlannedTensor], source: str) -> Any:
    """transformers' model of these tensors, strictly, without memory for them."""
    state = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in planned.items()}
    with damage_named(source):
        model, info = _class(whole).from_pretrained(
            None, config=whole, state_dict=state, device_map={"": "meta"}, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    refuse_wrong_keys(source, info)
    return model


def _processor(config: LlavaCompeteConfig, whole: Whole, ours: LlavaCompeteProcessor) -> ProcessorMixin:
    assert config.tower is not None
    siglip, tiles = whole.vision_config.model_type == SIGLIP, config.tower.tiles
    make = LlavaProcessor if tiles is None else LlavaNextProcessor
    return make(
        export_preprocessing(config.tower.preprocess, siglip, tiles),
        ours.tokenizer,
        patch_size=whole.vision_config.patch_size,
        vision_feature_select_strategy=whole.vision_feature_select_strategy,
        num_additional_image_tokens=0 if siglip else 1,
        chat_template=ours.tokenizer.chat_template,
    )
