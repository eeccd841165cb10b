"""The families of language models: where each keeps the MLP that a MoE block replaces, and which chat template it has.

A new family is one row of `FAMILIES`. A row is needed only for a MoE in the language model, and for a chat template
where the tokenizer brings none; otherwise a model of any family works without one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from llava_compete.errors import UserError


@dataclass(frozen=True)
class LanguageFamily:
    """Where the MLP of a model type lives: gated, down(act(gate(x)) * up(x)), or plain, down(act(up(x))).

    mlp: name of the MLP in a decoder layer; None where the family's layers are mixtures of experts already. Its linear
        layers may have any of the names in `model.upcycle.DENSE_NAMES`; gate and up may be fused, gate's rows first.
    activation: the config key that names the activation.
    bias: whether its linear layers have a bias, or the config key that says so.
    dropout: the config key of the dropout after the down projection, where the MLP itself has one.
    templates: names of `language.templates` that its chat models use; the first whose control tokens a tokenizer has.
    """

    mlp: str | None = "mlp"
    gated: bool = True
    activation: str = "hidden_act"
    bias: bool | str = False
    dropout: str | None = None
    templates: tuple[str, ...] = ()


_MISTRAL = ("mistral_tekken", "mistral_v3", "mistral_v1")
FAMILIES: dict[str, LanguageFamily] = {
    "arcee": LanguageFamily(gated=False, bias="mlp_bias"),
    "cohere": LanguageFamily(),
    "cohere2": LanguageFamily(),
    "ernie4_5": LanguageFamily(bias="use_bias"),
    "exaone4": LanguageFamily(),
    "gemma": LanguageFamily(templates=("gemma",)),
    "gemma2": LanguageFamily(activation="hidden_activation", templates=("gemma",)),
    "gemma3_text": LanguageFamily(activation="hidden_activation", templates=("gemma",)),
    "glm": LanguageFamily(),
    "glm4": LanguageFamily(),
    "gpt_neox": LanguageFamily(gated=False, bias=True),
    "granite": LanguageFamily(bias="mlp_bias"),
    "hunyuan_v1_dense": LanguageFamily(),
    # Llama 2, Vicuna, Llama 3 and models with ChatML are all "llama"; a template without control tokens comes last.
    "llama": LanguageFamily(bias="mlp_bias", templates=("llama3", "chatml", "vicuna_v1")),
    "ministral": LanguageFamily(templates=_MISTRAL),
    "ministral3": LanguageFamily(templates=_MISTRAL),
    "mistral": LanguageFamily(templates=_MISTRAL),
    "mixtral": LanguageFamily(mlp=None, templates=_MISTRAL),
    "nemotron": LanguageFamily(gated=False, bias="mlp_bias"),
    "olmo": LanguageFamily(),
    "olmo2": LanguageFamily(),
    "olmo3": LanguageFamily(templates=("chatml",)),
    "phi3": LanguageFamily(templates=("phi3",)),
    "phimoe": LanguageFamily(mlp=None, templates=("phi3",)),
    "qwen2": LanguageFamily(templates=("qwen2_5",)),
    "qwen2_moe": LanguageFamily(mlp=None, templates=("qwen2_5",)),
    "qwen3": LanguageFamily(templates=("qwen3", "chatml")),
    "qwen3_5_moe_text": LanguageFamily(mlp=None, templates=("qwen3", "chatml")),
    "qwen3_5_text": LanguageFamily(templates=("qwen3", "chatml")),
    "qwen3_moe": LanguageFamily(mlp=None, templates=("qwen3", "chatml")),
    "qwen3_next": LanguageFamily(mlp=None, templates=("qwen3", "chatml")),
    "seed_oss": LanguageFamily(bias="mlp_bias", dropout="residual_dropout"),
    "smollm3": LanguageFamily(bias="mlp_bias", templates=("smollm3",)),
    "stablelm": LanguageFamily(templates=("chatml",)),
    "starcoder2": LanguageFamily(gated=False, bias="use_bias", dropout="residual_dropout"),
}


def family_of(config: PreTrainedConfig) -> LanguageFamily:
    """The table row of a text config whose MLPs can become MoE blocks; else an error that says what to do."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        dense = ", ".join(name for name, row in FAMILIES.items() if row.mlp is not None)
        raise UserError(
            f"moe.language: no row for the language model family {config.model_type!r} (known: {dense}); "
            "add one to FAMILIES in llava_compete/language/families.py that says where its MLP lives"
        )
    if family.mlp is None:
        raise UserError(
            f"moe.language: a {config.model_type!r} model has experts of its own in place of an MLP; "
            "expected a dense model, or no moe.language"
        )
    return family


def decoder_layers(language_model: Any) -> nn.ModuleList:
    """The decoder layers of a causal LM, or of the body below its head."""
    return language_model.base_model.layers


def feed_forward_options(config: PreTrainedConfig) -> dict[str, Any]:
    """Keyword arguments of a MoE block that matches the family's dense MLP."""
    family = family_of(config)
    bias = getattr(config, family.bias) if isinstance(family.bias, str) else family.bias
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "activation": getattr(config, family.activation),
        "gated": family.gated,
        "bias": bool(bias),
        "output_dropout": getattr(config, family.dropout) if family.dropout else 0.0,
    }
