"""Language models of transformers with experts (Mixtral, Qwen3-MoE), as text-only checkpoints with our experts."""

from __future__ import annotations

from transformers import AutoConfig

from llava_compete.convert.chat import adopt_template
from llava_compete.convert.experts import FAMILIES, import_expert_recipes, import_text_config
from llava_compete.convert.layout import Import, ImportOptions, Layout, Source
from llava_compete.convert.vocabulary import grow_vocabulary
from llava_compete.language.config import LanguageModelSection
from llava_compete.language.sources import read_tokenizer
from llava_compete.language.tokenizer import add_image_token
from llava_compete.model.config import LlavaCompeteConfig
from llava_compete.moe.config import MoeConfig


def _fits(source: Source) -> bool:
    return source.config.get("model_type") in FAMILIES and bool(source.tensors)


def _read(source: Source, options: ImportOptions) -> Import:
    directory = source.directory
    config = AutoConfig.from_pretrained(directory)
    text, moe = import_text_config(config, str(directory))
    tensors = source.by_names(lambda name: f"model.language_model.{name[6:]}" if name.startswith("model.") else name)
    recipes = import_expert_recipes(tensors, config)
    tokenizer = read_tokenizer(LanguageModelSection(name=str(directory)), None)
    image_id = add_image_token(tokenizer)
    grow_vocabulary(recipes, tensors, image_id, text)
    template = adopt_template(tokenizer, directory, config.model_type, options.chat_template)
    for key in ("pad_token_id", "eos_token_id", "bos_token_id"):
        setattr(text, key, getattr(tokenizer, key))
    whole = LlavaCompeteConfig(
        text_config=text,
        moe=MoeConfig(language=moe).of_model(),
        image_token_id=image_id,
        tie_word_embeddings=bool(text.tie_word_embeddings),
        stage="import",
    )
    return Import(whole, tokenizer, recipes, tensors, {}, [f"chat template: {template}"])


MOE_LANGUAGE = Layout("language model with experts", f"model_type {' or '.join(FAMILIES)} in config.json", _fits, _read)
