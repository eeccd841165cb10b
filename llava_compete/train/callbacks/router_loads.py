"""Routers that follow their experts' loads get them after each optimizer step, summed over micro-batches and ranks.

Outside the forward, which may run twice (checkpointing) and must not count.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_compete.moe.block import moe_blocks
from llava_compete.train.trainer import StageTrainer


class RouterLoadsCallback(TrainerCallback):
    """Calls `Router.end_step` of the layers whose router asks for it and trains; never after a step that was skipped.

    To be added behind the trainer's own callback for bad steps, which closes the step's sums.
    """

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer
        blocks = moe_blocks(trainer.core_model)
        self.routers = {
            name: block.router
            for name, block in blocks.items()
            if block.router.needs_loads and any(parameter.requires_grad for parameter in block.router.parameters())
        }

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        loads = self.trainer.step_metrics.last_loads
        if not self.routers or not loads:
            return
        flat = torch.cat([loads[name].to(args.device) for name in self.routers])  # one collective for all layers
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flat)
        sizes = [len(loads[name]) for name in self.routers]
        for router, load_E in zip(self.routers.values(), flat.split(sizes), strict=True):
            router.end_step(load_E)
