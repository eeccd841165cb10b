"""What DeepSpeed's ZeRO must be told of our models: whole while they are built, and sharded by module afterwards.

No module is a ZeRO-3 leaf: a leaf's gradient hook fires before its own backward where no input requires a gradient (the
first trainable block behind a frozen front), and crashes or loses that gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from llava_compete.errors import UserError
from llava_compete.model.checkpoint import read_config
from llava_compete.train.config import TrainConfig
from llava_compete.vision.sources import resolve_tower
from llava_compete.vision.tower_config import TowerConfig
from llava_compete.vision.trunks import build_trunk


def sharding_of(arguments: Any) -> Any:
    """The Trainer's DeepSpeed config, or None without DeepSpeed."""
    return getattr(arguments, "hf_deepspeed_config", None)  # set by TrainingArguments only with DeepSpeed


def zero_stage(arguments: Any) -> int:
    """1 to 3; 0 without DeepSpeed."""
    sharding = sharding_of(arguments)
    return sharding.get_value("zero_optimization.stage", 0) if sharding is not None else 0


@contextmanager
def whole(sharding: Any) -> Iterator[None]:
    """Models are built whole inside, never under zero.Init: DeepSpeed shards afterwards (design rule 6)."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if sharding is not None:
            set_hf_deepspeed_config(sharding)


def gather_attention_whole(model: nn.Module) -> None:
    """Let ZeRO-3 gather torch's attention with its output projection, whose parameters it uses without calling it."""
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            for parameter in module.out_proj.parameters():
                deepspeed.zero.register_external_parameter(module, parameter)


def refuse_what_cannot_be_sharded(config: TrainConfig) -> None:
    """LoRA on torch's attention under ZeRO-3: peft exchanges its parameters in every forward for plain tensors.

    Raises:
        UserError: before the model is loaded; the tower is built without weights to see what it is made of.
    """
    vision = config.trainable.get("vision")
    zero3 = config.deepspeed is not None and config.deepspeed.startswith("zero3")
    tower = _tower(config) if zero3 and vision is not None and vision.mode == "lora" else None
    if tower is None:
        return
    with torch.device("meta"):
        trunk = build_trunk(tower.embed_dim, tower.vision_cfg, tower.quick_gelu)
    if any(isinstance(module, nn.MultiheadAttention) for module in trunk.modules()):
        raise UserError(
            f"trainable.vision: LoRA on this tower cannot be sharded by {config.deepspeed}: its attention is torch's "
            "MultiheadAttention, whose parameters peft exchanges in every forward; use zero2, or train it in full"
        )


def _tower(config: TrainConfig) -> TowerConfig | None:
    if config.model.checkpoint is not None:
        return read_config(config.model.checkpoint, config.model.trust_remote_code).tower
    return None if config.model.vision_tower is None else resolve_tower(config.model.vision_tower)
