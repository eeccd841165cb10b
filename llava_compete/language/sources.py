"""What a YAML's `language_model` and `tokenizer` name: config, pretrained weights and tokenizer, or a clear error."""

from __future__ import annotations

import dataclasses
import inspect
import re
import struct
import sys
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
)

from llava_compete.errors import UserError, did_you_mean, nearest
from llava_compete.language.chat_encoding import stop_token_ids
from llava_compete.language.config import LanguageModelSection, TokenizerSection
from llava_compete.language.gguf import gguf_options, set_pre_tokenizer
from llava_compete.language.interface import refuse_unusable
from llava_compete.language.loading_report import refuse_wrong_keys
from llava_compete.language.remote_code import register_remote_code
from llava_compete.language.sentencepiece_merges import order_merges_by_score
from llava_compete.language.templates import TEMPLATES, choose_chat_template, set_chat_template
from llava_compete.language.tokenizer import add_image_token


def text_config_of(
    language: LanguageModelSection, *, offline: bool = False, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The language model's config.

    A named model has its own; inline values beside the name must agree with it, and stand for it when `offline`. Of a
    multimodal model it is that of the text part.
    """
    if language.config is not None and (language.name is None or offline):
        return _inline_config(dict(language.config))
    try:
        gguf = gguf_options(language.name)
        stored, _ = PreTrainedConfig.get_config_dict(language.name, **gguf)
        register_remote_code(str(language.name), stored, trust_remote_code)
        whole = AutoConfig.from_pretrained(language.name, **gguf)
    except struct.error as error:
        raise UserError(f"language_model.name: {language.name}: its GGUF file is cut off or none ({error})") from error
    except (OSError, ValueError) as error:
        raise UserError(f"language_model.name: {language.name}: {str(error).splitlines()[0]}") from error
    config = whole.get_text_config(decoder=True)
    refuse_unusable(config, f"language_model.name: {language.name}")
    if config is not whole:  # the head is the whole model's, and so is the word on its weights
        config.tie_word_embeddings = whole.tie_word_embeddings
    for key, value in (language.config or {}).items():
        if getattr(config, key, None) != value:
            found = getattr(config, key, None)
            raise UserError(f"language_model.config.{key}: found {value!r}, but {language.name} has {found!r}")
    return config


def context_of(text_config: Any) -> int | None:
    """The longest text in tokens that a language model takes; None where its config names no limit."""
    limit: int | None = getattr(text_config, "max_position_embeddings", None)
    return limit


def _inline_config(values: dict[str, Any]) -> PreTrainedConfig:
    """A text config from a YAML's values; transformers would take a misspelt key in silence."""
    model_type = values.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        near = nearest(model_type, CONFIG_MAPPING, cutoff=0.6) or ["llama", "qwen3"]
        raise UserError(f"language_model.config.model_type: unknown {model_type!r}; such as {', '.join(near)}")
    known = _known_keys(model_type)
    for key in values:
        if key not in known:
            hint = did_you_mean(key, known, cutoff=0.6)
            raise UserError(f"unknown key 'language_model.config.{key}' for a {model_type} model{hint}")
    try:
        config = AutoConfig.for_model(model_type, **values)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UserError(f"language_model.config: {' '.join(str(error).split())}") from error
    refuse_unusable(config, "language_model.config")
    return config


def _known_keys(model_type: str) -> set[str]:
    """Keys of an inline config: the config's own fields, and what its model reads without there being a field, such as
    `head_dim` of Mistral's and Granite's."""
    config_class = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(config_class)}
    known |= {*config_class.attribute_map, "rope_theta", "rope_scaling"}
    if config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        module = sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[config_class].__module__]
        known |= set(re.findall(r"getattr\((?:self\.)?config, \"(\w+)\"", inspect.getsource(module)))
    return known


# Where multimodal checkpoints keep the text part, as names of a causal LM alone. transformers' own conversions, which a
# text part's class may have besides, come after these.
_TEXT_PART_NAMES = {
    r"^model\.language_model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}


def load_language_model(
    language: LanguageModelSection,
    *,
    attention: str | None = None,
    trust_remote_code: bool = False,
    on_meta: bool = False,
) -> Any:
    """The named causal LM, or the text part of the named multimodal model, every weight of it read from its files.

    on_meta: checked alike, but nothing is read.
    """
    name, config = str(language.name), text_config_of(language, trust_remote_code=trust_remote_code)
    gguf = gguf_options(name)
    multimodal = PreTrainedConfig.get_config_dict(name, **gguf)[0].get("model_type") != config.model_type
    options: dict[str, Any] = {**gguf}
    if gguf:  # left in GGUF's blocks, the weights could neither be trained nor saved
        options["quantization_config"] = GgufConfig(dequantize=True)
    if on_meta:
        options["device_map"] = {"": "meta"}
    try:
        language_model, info = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            attn_implementation=attention,
            key_mapping=_TEXT_PART_NAMES if multimodal else None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with the other wrong keys
            **options,
        )
    except (OSError, ValueError, NotImplementedError, SafetensorError) as error:
        raise UserError(f"language_model.name: {name}: {str(error).splitlines()[0]}") from error
    if multimodal:  # the other parts' weights are not wanted
        info = {**info, "unexpected_keys": set()}
    refuse_wrong_keys(name, info)
    # Where the files hold a head that differs, transformers keeps it, whatever the config says.
    head, embeddings = language_model.get_output_embeddings(), language_model.get_input_embeddings()
    language_model.config.tie_word_embeddings = head.weight is embeddings.weight
    return language_model


def causal_name(stored_name: str) -> str:
    """What a tensor in the files of a causal LM, or of a multimodal model, is called in the causal LM alone."""
    for pattern, ours in _TEXT_PART_NAMES.items():
        name, found = re.subn(pattern, ours, stored_name)
        if found:
            return name
    return stored_name


def load_tokenizer(
    language: LanguageModelSection,
    section: TokenizerSection | None,
    text_config: PreTrainedConfig,
    *,
    trained: Any = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The language model's own tokenizer, or another by name, or the `trained` one; with placeholder and template."""
    if section is not None and section.train_on is not None:
        if trained is None:
            raise UserError("model.tokenizer.train_on: this command has no data to train a tokenizer on")
        tokenizer = trained
    elif trained is not None:
        tokenizer = trained
    else:
        tokenizer = read_tokenizer(language, section, trust_remote_code)
    add_image_token(tokenizer)
    # What generation needs, also from a tokenizer loaded without the processor; training's collator pads by itself.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    if chat_template is not None:
        set_chat_template(tokenizer, chat_template)
    else:
        choose_chat_template(tokenizer, text_config.model_type)
    if tokenizer.pad_token is None:  # nor an end token, which would stand for it
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)[0])
    return tokenizer


def missing_control_tokens(
    language: LanguageModelSection, section: TokenizerSection | None, chat_template: str, trust_remote_code: bool
) -> list[str]:
    """Control tokens of a template that the tokenizer of a named model lacks: their embeddings will be random."""
    if section is not None and section.name is None:  # trained on the data, with all that the template needs
        return []
    known = read_tokenizer(language, section, trust_remote_code).get_vocab()
    return [token for token in TEMPLATES.get(chat_template, ()) if token not in known]


def read_tokenizer(
    language: LanguageModelSection, section: TokenizerSection | None, trust_remote_code: bool = False
) -> Any:
    """The tokenizer of a named model, or the one that `section` names, as it is in its files."""
    name = section.name if section is not None else language.name
    try:
        gguf = gguf_options(name)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **gguf)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer: {name}: {str(error).splitlines()[0]}") from error
    order_merges_by_score(tokenizer)
    if gguf:
        set_pre_tokenizer(tokenizer, Path(str(name)) / gguf["gguf_file"])
    return tokenizer
