"""The language model: any Hugging Face causal LM, and where each family keeps the MLP that a MoE block replaces.

A new family is one row of `FAMILIES`. A row is needed only for a MoE in the language model; a dense model of any
family works without one.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from llava_compete.errors import UserError


@dataclass(frozen=True)
class LanguageFamily:
    """Where the MLP of a model type lives: gated, down(act(gate(x)) * up(x)), or plain, down(act(up(x))).

    layers: path of the decoder layers below the causal LM.
    mlp: name of the MLP in a layer, with linear layers `gate_proj` (only if `gated`) and `up_proj`, or with
        `gate_up_proj` holding the gate's rows and then the up projection's where `fused`, and `down_proj`.
    activation: the config key that names the activation.
    bias: the config key that says whether its linear layers have a bias, where the family has a choice.
    """

    layers: str = "model.layers"
    mlp: str = "mlp"
    gated: bool = True
    fused: bool = False
    activation: str = "hidden_act"
    bias: str | None = None


FAMILIES: dict[str, LanguageFamily] = {
    "llama": LanguageFamily(bias="mlp_bias"),
    "mistral": LanguageFamily(),
    "arcee": LanguageFamily(gated=False, bias="mlp_bias"),
    "qwen2": LanguageFamily(),
    "qwen3": LanguageFamily(),
    "phi3": LanguageFamily(fused=True),
    "gemma2": LanguageFamily(activation="hidden_activation"),
    "gemma3_text": LanguageFamily(activation="hidden_activation"),
    "smollm3": LanguageFamily(bias="mlp_bias"),
}


def family_of(config: PreTrainedConfig) -> LanguageFamily:
    """The table row of a text config; an unknown family is an error that says what to add."""
    if config.model_type not in FAMILIES:
        raise UserError(
            f"moe.language: no row for the language model family {config.model_type!r} (known: {', '.join(FAMILIES)}); "
            "add one to FAMILIES in llava_compete/language/families.py that says where its MLP lives"
        )
    return FAMILIES[config.model_type]


def decoder_layers(language_model: nn.Module, config: PreTrainedConfig) -> nn.ModuleList:
    """The decoder layers of a causal LM."""
    return attrgetter(family_of(config).layers)(language_model)


def feed_forward_options(config: PreTrainedConfig) -> dict[str, Any]:
    """Keyword arguments of a MoE block that matches the family's dense MLP."""
    family = family_of(config)
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "activation": getattr(config, family.activation),
        "gated": family.gated,
        "bias": bool(family.bias and getattr(config, family.bias)),
    }
