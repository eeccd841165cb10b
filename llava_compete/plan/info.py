"""The facts of a checkpoint directory, from config.json and the headers of its weights alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_compete.model.checkpoint import model_on_meta, read_config, read_weight_headers
from llava_compete.moe.block import moe_blocks
from llava_compete.moe.config import MoeConfig
from llava_compete.plan.plan import count_parameters


def describe(directory: str | Path) -> dict[str, Any]:
    """Stage, parents, parts, parameters and routers; refuses weights that a load would refuse."""
    config = read_config(directory)
    headers = read_weight_headers(directory)
    model = model_on_meta(directory, config, headers)
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
        "stored_dtypes": sorted({str(facts.dtype).removeprefix("torch.") for facts in headers.values()}),
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
