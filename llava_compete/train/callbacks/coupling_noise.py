"""Draws what moves the proxies of the coupling loss (moe/coupling.py), once an optimizer step and alike on every rank.

Outside the forward, which may run twice (checkpointing) and must see the same both times.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_compete.moe.block import moe_blocks
from llava_compete.moe.config import MoeConfig
from llava_compete.train.trainer import StageTrainer


class CouplingNoiseCallback(TrainerCallback):
    """Fills `model.routing.noise` of the layers that have the loss; from (seed, step, layer) alone, so that a resumed
    run draws what it would have drawn."""

    def __init__(self, trainer: StageTrainer, moe: MoeConfig | None) -> None:
        self.trainer = trainer
        self.seed = 0 if moe is None else moe.seed
        blocks = moe_blocks(trainer.core_model).items()
        self.shapes = {
            name: (block.router.num_proxies, block.hidden_size) for name, block in blocks if block.config.couples
        }

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        noise = self.trainer.core_model.routing.noise
        for name, shape in self.shapes.items():
            key = zlib.crc32(f"{self.seed}/{state.global_step}/{name}".encode())
            generator = torch.Generator(args.device).manual_seed(key)
            noise[name] = 2 * torch.rand(shape, generator=generator, device=args.device) - 1
