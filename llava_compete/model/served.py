"""What inference servers read off a checkpoint, so that they need no code for this model: vLLM's and SGLang's
"transformers backends", which build `AutoModel` and put layers of their own in the places of ours.

They find the classes by `auto_map`, which points to a stub beside config.json. They take a child named `experts` whose
parameters all have three dimensions for experts to run by their own kernel, which is always a gated SiLU; whether there
are any, and how many, is what `text_config` declares.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from llava_compete.errors import UserError
from llava_compete.files import write_text
from llava_compete.language.families import feed_forward_options
from llava_compete.moe.experts import PackedExperts
from llava_compete.moe.layer_config import MoeLayerConfig
from llava_compete.moe.router_table import ROUTER_CLASSES

if TYPE_CHECKING:
    from llava_compete.model.config import LlavaCompeteConfig

STUB = "modeling_llava_compete"
_STUB_TEXT = '''"""Where transformers' Auto classes find this checkpoint's classes: pip install llava_compete."""

from llava_compete.model import (
    LlavaCompeteConfig,
    LlavaCompeteForConditionalGeneration,
    LlavaCompeteModel,
    LlavaCompeteProcessor,
)

__all__ = [
    "LlavaCompeteConfig",
    "LlavaCompeteForConditionalGeneration",
    "LlavaCompeteModel",
    "LlavaCompeteProcessor",
]
'''
# AutoModel first among the models: vLLM takes the first.
AUTO_MAP = {
    "AutoConfig": f"{STUB}.LlavaCompeteConfig",
    "AutoProcessor": f"{STUB}.LlavaCompeteProcessor",
    "AutoModel": f"{STUB}.LlavaCompeteModel",
    "AutoModelForImageTextToText": f"{STUB}.LlavaCompeteForConditionalGeneration",
}
# What the servers set as attention of the language model while they build it.
_SERVERS = ("vllm", "vllm_mla", "sglang")


def write_stub(directory: str | Path) -> None:
    """The Python file that `AUTO_MAP` names."""
    write_text(Path(directory) / f"{STUB}.py", _STUB_TEXT)


def declare_experts(text_config: Any, moe: MoeLayerConfig) -> None:
    """Say in `text_config` what the language model's mixtures are, where the servers' kernel computes the same.

    Not for other activations, plain or biased MLPs, dropout, or a factorised first projection: undeclared, they run by
    our own code there too.
    """
    if ROUTER_CLASSES[moe.router].factorises:
        return
    shape = feed_forward_options(text_config)
    if shape["gated"] and shape["activation"] in ("silu", "swish") and not shape["bias"]:
        text_config.num_experts = moe.num_experts
        text_config.num_experts_per_tok = moe.num_experts_per_tok
        text_config.moe_intermediate_size = shape["intermediate_size"]


def is_served(config: LlavaCompeteConfig) -> bool:
    """Whether a server builds the model, with attention of its own."""
    return getattr(config.text_config, "_attn_implementation", None) in _SERVERS


def check_served(config: LlavaCompeteConfig, front: dict[str, nn.Module | None]) -> None:
    """Refuse what a server would compute wrongly.

    front: tower and projector, by name.

    Raises:
        UserError: a competition at inference (there the experts run those that are chosen, and no others), or
            mixtures outside the language model that a server would take for the language model's.
    """
    if not is_served(config):
        return
    if config.competition_at_inference:
        raise UserError(
            "competition_at_inference: found true, expected false under a server, which runs the router's choices only"
        )
    if not getattr(config.text_config, "num_experts", None):
        return
    for part, module in front.items():
        packed = [] if module is None else [item for item in module.modules() if isinstance(item, PackedExperts)]
        if any(parameter.ndim == 3 for item in packed for parameter in item.parameters()) and not all(
            item.has_bias for item in packed
        ):
            raise UserError(
                f"{part}: experts without biases, which a server would take for the language model's; set num_experts, "
                "num_experts_per_tok and moe_intermediate_size of text_config to 0 to run all experts by our own code"
            )
