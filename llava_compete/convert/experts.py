"""Experts of language models: transformers' families with a softmax router over all, renormalised, and ours.

Such a family is a dense one whose MLPs are experts: Mixtral is Mistral, Qwen3-MoE is Qwen3. Their p = softmax(W x), of
which the K largest are made to sum to 1, is our router `softmax`, and `competition` at inference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from llava_compete.convert.recipes import Recipe, stacked
from llava_compete.errors import UserError
from llava_compete.moe.layer_config import MoeLayerConfig

# Routers that, at inference, are a softmax over all experts and the K largest renormalised.
_SOFTMAX = ("softmax", "competition")


class ExpertFamily(NamedTuple):
    """How a family's files name a layer's experts, and what its config says of them.

    block, gate, up, down: of a layer `block`.`experts`.<number>.<name>.weight, and its router `block`.gate.weight.
    dense: the families whose attention and norms it shares, the first the one that an import becomes.
    experts, width: config keys of the number of experts and of their intermediate size.
    """

    block: str
    gate: str
    up: str
    down: str
    dense: tuple[str, ...]
    experts: str
    width: str


FAMILIES = {
    "mixtral": ExpertFamily(
        "block_sparse_moe", "w1", "w3", "w2", ("mistral", "llama"), "num_local_experts", "intermediate_size"
    ),
    "qwen3_moe": ExpertFamily(
        "mlp", "gate_proj", "up_proj", "down_proj", ("qwen3",), "num_experts", "moe_intermediate_size"
    ),
}
# Keys that only one of two configs of a pair has, and that change nothing of the arithmetic.
_OF_TRAINING = {"output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "initializer_range"}


def one_of(number: int, half: int | None, packed: Tensor) -> Tensor:
    """An expert's matrix out of the packed ones; half 0 the gate and 1 the other of `gate_up_proj`."""
    return packed[number] if half is None else packed[number].chunk(2)[half]


def gates_and_ups(*matrices: Tensor) -> Tensor:
    """`gate_up_proj` [E, 2I, D] of gate, up, gate, up, ..."""
    return torch.stack([torch.cat(pair) for pair in zip(matrices[::2], matrices[1::2], strict=True)])


def export_text_config(text: PreTrainedConfig, moe: MoeLayerConfig | None) -> PreTrainedConfig:
    """transformers' config of a language model of ours: its own, or that of the family with experts.

    Raises:
        UserError: experts that no family of transformers has.
    """
    if moe is None:
        return text
    if moe.router not in _SOFTMAX:
        raise UserError(
            f"moe.language.router: {moe.router!r} has no equal in transformers' language models; a router of "
            f"{' or '.join(_SOFTMAX)} has"
        )
    name = next((name for name, family in FAMILIES.items() if text.model_type in family.dense), None)
    if name is None:
        known = ", ".join(dense for family in FAMILIES.values() for dense in family.dense)
        raise UserError(
            f"moe.language: transformers has no family that is {text.model_type!r} with experts and a renormalised "
            f"softmax router; known for {known}"
        )
    family, layers = FAMILIES[name], moe.select_layers(text.num_hidden_layers)
    others = [layer for layer in range(text.num_hidden_layers) if layer not in layers]
    if others and name != "qwen3_moe":
        raise UserError(f"moe.language.layers: layer {others[0]} is dense, and all layers of {name} have experts")
    for key in ("attention_bias", "mlp_bias"):
        if name == "mixtral" and getattr(text, key, False):
            raise UserError(f"language model: {key}: found true, and {name} has no such bias")
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise UserError(f"language model: layer_types: {name} has no sliding attention in some layers")
    values = {key: value for key, value in text.to_dict().items() if key not in ("model_type", "layer_types")}
    values |= {family.experts: moe.num_experts, "num_experts_per_tok": moe.num_experts_per_tok}
    values |= {family.width: text.intermediate_size}
    if name == "qwen3_moe":
        values |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": others}
    if text.model_type == "llama":
        values |= {"sliding_window": None}
    return _of_type(name, values)


def expert_recipes(names: Iterable[str], text: PreTrainedConfig) -> dict[str, Recipe]:
    """Names in transformers' files, each from one of `names`, ours of the language model and its head."""
    family = FAMILIES.get(text.model_type)
    recipes = {}
    for name in names:
        match = re.fullmatch(r"(.*\.layers\.\d+)\.mlp\.(router\.weight|experts\.(gate_up_proj|down_proj))", name)
        if match is None or family is None:
            recipes[name] = Recipe((name,))
            continue
        block = f"{match[1]}.{family.block}"
        if match[2] == "router.weight":
            recipes[f"{block}.gate.weight"] = Recipe((name,))
            continue
        parts = {family.down: None} if match[3] == "down_proj" else {family.gate: 0, family.up: 1}
        for number in range(getattr(text, family.experts)):
            for part, half in parts.items():
                target = f"{block}.experts.{number}.{part}.weight"
                recipes[target] = Recipe((name,), partial(one_of, number, half))
    return recipes


def import_text_config(text: PreTrainedConfig, source: str) -> tuple[PreTrainedConfig, MoeLayerConfig]:
    """The dense config and our experts of a family of transformers.

    Raises:
        UserError: weights of the chosen experts that are not renormalised; dense layers of another width.
    """
    family = FAMILIES[text.model_type]
    if not getattr(text, "norm_topk_prob", True):
        raise UserError(
            f"{source}: norm_topk_prob: found false, expected true, since the weights of our routers sum to 1"
        )
    num_layers = text.num_hidden_layers
    step, dense = getattr(text, "decoder_sparse_step", 1), set(getattr(text, "mlp_only_layers", None) or ())
    sparse = [layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0]
    width = getattr(text, family.width)
    if len(sparse) < num_layers and width != text.intermediate_size:
        raise UserError(
            f"{source}: dense layers of width {text.intermediate_size} beside experts of {width}, expected one width"
        )
    values = {key: value for key, value in text.to_dict().items() if key != "model_type"}
    values["intermediate_size"] = width
    layers: Literal["all"] | list[int] = "all" if len(sparse) == num_layers else sparse
    moe = MoeLayerConfig(
        num_experts=getattr(text, family.experts),
        num_experts_per_tok=text.num_experts_per_tok,
        router="softmax",
        layers=layers,
    )
    return _of_type(family.dense[0], values), moe


def import_expert_recipes(names: Iterable[str], text: PreTrainedConfig) -> dict[str, Recipe]:
    """Our names, from those of a family's files, spelt with `model.language_model.`; experts of a layer packed."""
    family = FAMILIES[text.model_type]
    recipes, blocks = {}, set()
    inside = re.compile(rf"(.*\.layers\.\d+)\.{family.block}\.(gate\.weight|experts\.\d+\.(\w+)\.weight)")
    for name in names:
        match = inside.fullmatch(name)
        if match is None:
            recipes[name] = Recipe((name,))
        else:
            blocks.add(match[1])
    for layer in sorted(blocks):
        theirs, ours = f"{layer}.{family.block}", f"{layer}.mlp"
        numbers = range(getattr(text, family.experts))
        fused = [f"{theirs}.experts.{n}.{part}.weight" for n in numbers for part in (family.gate, family.up)]
        down = [f"{theirs}.experts.{number}.{family.down}.weight" for number in numbers]
        recipes[f"{ours}.router.weight"] = Recipe((f"{theirs}.gate.weight",))
        recipes[f"{ours}.experts.gate_up_proj"] = Recipe(tuple(fused), gates_and_ups)
        recipes[f"{ours}.experts.down_proj"] = Recipe(tuple(down), stacked)
    return recipes


def _of_type(model_type: str, values: dict[str, object]) -> PreTrainedConfig:
    """A config with the values that its class knows."""
    config_class = CONFIG_MAPPING[model_type]
    known = {*config_class().to_dict(), *config_class.attribute_map} - {"model_type", "architectures"}
    return config_class(**{key: value for key, value in values.items() if key in known and key not in _OF_TRAINING})
