"""Tiny random models for tests: a 2-block tower on 28-pixel images and a language model of a few layers."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from llava_compete.language.templates import set_chat_template
from llava_compete.language.tokenizer import train_byte_level_bpe
from llava_compete.model.build import build_model
from llava_compete.model.modeling import LlavaCompeteForConditionalGeneration
from llava_compete.model.processor import LlavaCompeteProcessor
from llava_compete.model.section import ModelSection
from llava_compete.moe.config import MoeConfig

TOWER: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "patch_size": 7, "width": 32, "head_width": 16, "layers": 3, "mlp_ratio": 2.0},
}
LANGUAGE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
TEXTS = ["what colour is the circle ? the circle is red .", "how many shapes are there ? two shapes ."] * 4


@cache
def _tokenizer_json() -> Any:
    return train_byte_level_bpe(TEXTS, vocab_size=320)


def tiny_tokenizer() -> Any:
    """A byte-level BPE of about 320 tokens with the chatml template."""
    tokenizer = copy.deepcopy(_tokenizer_json())
    set_chat_template(tokenizer, "chatml")
    return tokenizer


def tiny_section(
    language: dict[str, Any] | None = None,
    tower: dict[str, Any] | None = TOWER,
    projector: str = "mlp2x_gelu",
    pool: int = 1,
    norm: bool = False,
    **tower_options: Any,
) -> ModelSection:
    """The `model:` section of a tiny model; `tower=None` makes it text-only, None in `language` takes a key away."""
    values = {key: value for key, value in {**LANGUAGE, **(language or {})}.items() if value is not None}
    return ModelSection.model_validate(
        {
            "vision_tower": None if tower is None else {"config": tower, **tower_options},
            "projector": {"type": projector, "pool": pool, "norm": norm},
            "language_model": {"config": values},
            "tokenizer": {"train_on": "data"},
            "chat_template": "chatml",
        }
    )


def tiny_model(
    moe: dict[str, Any] | None = None, seed: int = 0, **section: Any
) -> tuple[LlavaCompeteForConditionalGeneration, LlavaCompeteProcessor]:
    """A tiny model (training mode, float32) and its processor; `moe` as in YAML, for experts from scratch."""
    config = None if moe is None else MoeConfig.model_validate(moe)
    return build_model(tiny_section(**section), config, seed, tokenizer=tiny_tokenizer())
