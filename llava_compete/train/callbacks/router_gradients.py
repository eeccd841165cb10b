"""In the steps that are logged: which source moves each layer's router, and how much (`moe/gradients.py`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from llava_compete.moe.gradients import RouterGradients


class RouterGradientsCallback(TrainerCallback):
    """Has the steps measured whose line is to be logged. To be added behind the trainer's callback for bad steps."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._measured: RouterGradients | None = None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        step = state.global_step + 1
        logged = args.logging_strategy == IntervalStrategy.EPOCH or (args.logging_first_step and step == 1)
        if args.logging_strategy == IntervalStrategy.STEPS:
            logged = logged or step % state.logging_steps == 0
        self._measured = self.trainer.core_model.routing.gradients = RouterGradients() if logged else None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.core_model.routing.gradients = None
        if self.trainer.bad_steps.bad:
            self._measured = None

    def collect(self) -> dict[str, float]:
        """Of the last step, over all ranks, which must call it together; {} where it was not measured."""
        if self._measured is None or not self._measured.sums:
            return {}
        measured, self._measured = self._measured, None
        keys = sorted(measured.sums)
        sums = torch.stack([measured.sums[key] for key in keys])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        return {name: root.item() for name, root in measured.roots(dict(zip(keys, sums, strict=True))).items()}
