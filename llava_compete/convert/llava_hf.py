"""transformers' own LLaVA (`LlavaForConditionalGeneration`, and LLaVA-NeXT with its tiles): the layout of llava-hf.

Its files have one of two spellings, of before and after transformers 4.52; both are read.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from llava_compete.convert.chat import adopt_template, image_token_of
from llava_compete.convert.layout import Import, ImportOptions, Layout, Source
from llava_compete.convert.pictures import grids_of, import_preprocessing
from llava_compete.convert.recipes import Recipe
from llava_compete.convert.towers import import_recipes, import_tower, is_unused
from llava_compete.errors import UserError
from llava_compete.language.config import LanguageModelSection
from llava_compete.language.interface import refuse_unusable
from llava_compete.language.sources import read_tokenizer
from llava_compete.language.tokenizer import add_image_token
from llava_compete.model.config import LlavaCompeteConfig
from llava_compete.vision.tower_config import TowerConfig

PROJECTOR = {
    f"mlp.{ours}.{suffix}": f"{theirs}.{suffix}"
    for ours, theirs in (("up_proj", "linear_1"), ("down_proj", "linear_2"))
    for suffix in ("weight", "bias")
}
_SPELLINGS = (
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision_tower."),
    (r"^(?:model\.)?multi_modal_projector\.", "multi_modal_projector."),
    (r"^(?:language_model\.)?lm_head\.", "lm_head."),
    (r"^(?:model\.language_model|language_model\.model)\.", "model.language_model."),
    (r"^(?:model\.)?image_newline$", "image_newline"),
)


def _plain(name: str) -> str:
    """A tensor's name whatever the spelling: `vision_tower.`, `multi_modal_projector.`, and ours for the language."""
    for pattern, replacement in _SPELLINGS:
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name


def _fits(source: Source) -> bool:
    return {"vision_config", "text_config"} <= source.config.keys() and any(
        _plain(name).startswith("multi_modal_projector.linear_1.") for name in source.tensors
    )


def _read(source: Source, options: ImportOptions) -> Import:
    directory, model_type = source.directory, source.config.get("model_type")
    if model_type not in ("llava", "llava_next"):
        raise UserError(f"{directory}: model_type: found {model_type!r}, expected 'llava' or 'llava_next'")
    whole = CONFIG_MAPPING[model_type].from_pretrained(directory)
    tensors = source.by_names(_plain)
    tower = _tower(whole, source)
    recipes = {name: Recipe((name,)) for name in tensors if name.startswith(("model.language_model.", "lm_head."))}
    kind = whole.vision_config.model_type
    for ours, recipe in import_recipes(kind, tower.num_layers).items():
        theirs = tuple(f"vision_tower.{name}" for name in recipe.sources)
        recipes[f"model.vision_tower.trunk.{ours}"] = recipe._replace(sources=theirs)
    for ours, name in PROJECTOR.items():
        recipes[f"model.multi_modal_projector.{ours}"] = Recipe((f"multi_modal_projector.{name}",))
    unused = {
        name: "behind the feature layer"
        for name in tensors
        if name.startswith("vision_tower.") and is_unused(kind, name.removeprefix("vision_tower."), tower.num_layers)
    }
    if tower.tiles is not None:
        recipes["model.multi_modal_projector.image_newline"] = Recipe(("image_newline",))
    tokenizer = read_tokenizer(LanguageModelSection(name=str(directory)), None)
    add_image_token(tokenizer)
    image_token_of(tokenizer, whole.image_token_index, str(directory))
    template = adopt_template(tokenizer, directory, whole.text_config.model_type, options.chat_template)
    notes = [f"chat template: {template}"]
    return Import(_config(whole, tower, tokenizer), tokenizer, recipes, tensors, unused, notes)


def _tower(whole: PreTrainedConfig, source: Source) -> TowerConfig:
    name, layer = str(source.directory), whole.vision_feature_layer
    if not isinstance(layer, int):
        raise UserError(f"{name}: vision_feature_layer: found {layer}, expected one layer")
    if whole.projector_hidden_act != "gelu":
        raise UserError(f"{name}: projector_hidden_act: found {whole.projector_hidden_act!r}, expected 'gelu'")
    if not getattr(whole, "multimodal_projector_bias", True):
        raise UserError(f"{name}: multimodal_projector_bias: found false, expected true")
    size = whole.vision_config.image_size
    preprocess, grids = import_preprocessing(source.directory, size)
    drops_first = whole.vision_feature_select_strategy == "default"
    tower = import_tower(whole.vision_config, layer, drops_first, preprocess, name)
    if whole.model_type != "llava_next":
        return tower
    if tower.select != "patch":
        raise UserError(
            f"{name}: vision_feature_select_strategy: found 'full', expected 'default', for tiles of CLIP's"
        )
    own = grids_of(whole.image_grid_pinpoints, size, f"{name}: config.json")
    if grids is not None and set(grids) != set(own):
        raise UserError(f"{name}: image_grid_pinpoints: the preprocessor's are not those of config.json")
    return tower.model_copy(update={"tiles": own})


def _config(whole: PreTrainedConfig, tower: TowerConfig, tokenizer: Any) -> LlavaCompeteConfig:
    text = whole.text_config
    refuse_unusable(text, "text_config")
    for key in ("pad_token_id", "eos_token_id", "bos_token_id"):
        setattr(text, key, getattr(tokenizer, key))
    return LlavaCompeteConfig(
        vision_config=tower.model_dump(mode="json"),
        projector_config={"type": "mlp2x_gelu"},
        text_config=text,
        image_token_id=whole.image_token_index,
        tie_word_embeddings=bool(whole.tie_word_embeddings),
        stage="import",
    )


LLAVA_HF = Layout(
    "llava-hf",
    "vision_config and text_config in config.json, and tensors named multi_modal_projector.linear_1",
    _fits,
    _read,
)
