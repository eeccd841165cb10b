"""The facts of a checkpoint directory, from config.json and the headers of its weights alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llava_compete.language.loading_report import refuse_wrong_keys
from llava_compete.model.checkpoint import TensorFacts, read_config, read_weight_headers
from llava_compete.model.modeling import LlavaCompeteForConditionalGeneration
from llava_compete.moe.block import moe_blocks
from llava_compete.moe.config import MoeConfig
from llava_compete.plan.plan import count_parameters


def describe(directory: str | Path) -> dict[str, Any]:
    """Stage, parents, parts, parameters and routers; refuses weights that a load would refuse."""
    config = read_config(directory)
    headers = read_weight_headers(directory)
    with torch.device("meta"):
        model = LlavaCompeteForConditionalGeneration(config)
    if getattr(config, "quantization_config", None) is None:  # else stored packed, under more names
        refuse_wrong_keys(str(directory), _compare(model, headers))
    counts = count_parameters(model)
    tower, text = config.tower, config.text_config
    moe = {} if config.moe is None else MoeConfig.model_validate(config.moe).parts()
    layers: dict[str, list[int]] = {part: [] for part in moe}
    for name in moe_blocks(model):
        part, _, index = name.partition(".")
        layers[part].append(int(index))
    return {
        "stage": config.stage,
        "parents": list(config.parents),
        "vision_tower": None
        if tower is None
        else f"{tower.name or 'inline config'} {tower.pretrained or ''}".strip()
        + f", {tower.num_layers} blocks of width {tower.width}, scales {list(tower.scales)}, {tower.image_size} pixels",
        "projector": None if config.projector_config is None else config.projector_config["type"],
        "language_model": f"{text.model_type}, {text.num_hidden_layers} layers of width {text.hidden_size}",
        "image_tokens": config.num_image_tokens,
        "stored_dtypes": sorted({facts.dtype for facts in headers.values()}),
        "shards": len({facts.file for facts in headers.values()}),
        "parameters": {
            "total": sum(part.total for part in counts.values()),
            "active": sum(part.active for part in counts.values()),
            "parts": {name: {"total": part.total, "active": part.active} for name, part in counts.items()},
        },
        "moe": {
            part: {
                "router": layer.router,
                "num_experts": layer.num_experts,
                "num_experts_per_tok": layer.num_experts_per_tok,
                "layers": layers[part],
            }
            for part, layer in moe.items()
        },
    }


def _compare(model: LlavaCompeteForConditionalGeneration, headers: dict[str, TensorFacts]) -> dict[str, Any]:
    """What does not fit, in the form of transformers' loading report."""
    wanted, tied = model.state_dict(), set(model.all_tied_weights_keys)
    return {
        "missing_keys": wanted.keys() - headers.keys() - tied,
        "unexpected_keys": headers.keys() - wanted.keys(),
        "mismatched_keys": {
            (key, headers[key].shape, tuple(tensor.shape))
            for key, tensor in wanted.items()
            if key in headers and headers[key].shape != tuple(tensor.shape)
        },
    }
