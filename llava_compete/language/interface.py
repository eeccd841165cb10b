"""What a language model must offer to be the text part here; anything else is refused before its weights are read.

Images enter as embeddings in the places of their placeholders, packed rows and left padding are told by positions, and
a label is the next token, which the model must not see. A model that breaks one of these would not crash: it would
train on something else.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from llava_compete.errors import UserError

# Parameters that the causal LM's forward must have by name.
NEEDED = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values")


def refuse_unusable(config: PreTrainedConfig, source: str) -> None:
    """Raise a `UserError` that names what the model of a text config lacks; `source` is where the config is from."""
    kind = f"{source}: a {config.model_type!r} model"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{kind}, expected a causal LM")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    missing = [name for name in NEEDED if name not in inspect.signature(model_class.forward).parameters]
    if missing:
        raise UserError(f"{kind} does not take {', '.join(missing)}; expected a causal LM that does")
    if _sees_later_tokens(config, model_class):
        raise UserError(
            f"{kind} in which a token sees later ones; expected a causal LM (is_decoder: true, if it has it)"
        )
    if _reads_token_ids(config, model_class):
        raise UserError(
            f"{kind} whose layers read token ids, which an image has none of; expected one with embeddings alone"
        )


def _sees_later_tokens(config: PreTrainedConfig, model_class: type) -> bool:
    """Encoders have a causal mask only as decoders, and some decoders can be made encoders by their config.

    A config may say `is_decoder: false` and its model not read it (GPT-NeoX); one that does can make the other mask.
    """
    encoder = hasattr(sys.modules[model_class.__module__], "create_bidirectional_mask")
    if encoder and not getattr(config, "is_decoder", True):
        return True
    return getattr(config, "use_bidirectional_attention", None) in (True, "all")


def _reads_token_ids(config: PreTrainedConfig, model_class: type) -> bool:
    """Layers that take token ids (a router that hashes them), or embeddings of their own for them (Gemma 3n, 4)."""
    classes: list[Any] = [item for item in vars(sys.modules[model_class.__module__]).values() if inspect.isclass(item)]
    layers = [item for item in classes if issubclass(item, GradientCheckpointingLayer)]
    names = {name for layer in layers for name in inspect.signature(layer.forward).parameters}
    own_embeddings = "per_layer_input" in names and bool(getattr(config, "hidden_size_per_layer_input", True))
    return own_embeddings or any(name.endswith("input_ids") for name in names)
