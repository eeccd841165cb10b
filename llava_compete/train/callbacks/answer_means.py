"""Running means of experts' answers follow each optimizer step, summed over micro-batches and ranks.

Outside the forward, which may run twice (checkpointing) and must not count. Means go into training checkpoints and not
into a stage's result.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_compete.moe.answers import AnswerMeans
from llava_compete.moe.block import SparseMoeBlock, moe_blocks
from llava_compete.moe.experts import PackedExperts

FILE = "answer_means.safetensors"


class AnswerMeansCallback(TrainerCallback):
    """Ends the steps of the layers whose experts' means answer; never after a step that was skipped.

    To be added behind the trainer's own callback for bad steps, which says whether a step was one.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._sums: dict[str, Tensor] = {}

    def add_forward(self, answers: Mapping[str, Tensor]) -> None:
        """Add one micro-batch's `RoutingState.answers`."""
        for name, sums_EP in answers.items():
            self._sums[name] = self._sums[name] + sums_EP if name in self._sums else sums_EP

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        sums, self._sums = self._sums, {}
        if not sums or self.trainer.bad_steps.bad:
            return
        flat = torch.cat([sums_EP.flatten() for sums_EP in sums.values()])  # one collective for all layers
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flat)
        blocks = moe_blocks(self.trainer.core_model)
        pieces = flat.split([sums_EP.numel() for sums_EP in sums.values()])
        for (name, sums_EP), piece in zip(sums.items(), pieces, strict=True):
            _means(blocks[name]).end_step(piece.view_as(sums_EP))

    def save(self, directory: Path) -> None:
        """Into a checkpoint; nothing where no means are kept."""
        tensors = {
            f"{name}.{key}": tensor.cpu().contiguous()
            for name, block in moe_blocks(self.trainer.core_model).items()
            for key, tensor in _means(block).state().items()
        }
        if tensors:
            save_file(tensors, directory / FILE)

    def load(self, directory: Path) -> None:
        """From a checkpoint that `save` wrote, on every rank."""
        if not (directory / FILE).is_file():
            return
        tensors = {key: tensor.to(self.trainer.args.device) for key, tensor in load_file(directory / FILE).items()}
        for name, block in moe_blocks(self.trainer.core_model).items():
            state = {key: tensors[f"{name}.{key}"] for key in ("mean", "seen") if f"{name}.{key}" in tensors}
            _means(block).load(state)


def _means(block: SparseMoeBlock) -> AnswerMeans:
    """Those of a block, whose experts an adapter may have wrapped."""
    return next(module.answer_means for module in block.experts.modules() if isinstance(module, PackedExperts))
