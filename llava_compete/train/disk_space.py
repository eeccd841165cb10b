"""What a stage writes to its disk, counted before it trains: a full disk would end it hours later."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import NamedTuple

from torch import nn
from transformers import TrainingArguments

from llava_compete.errors import UserError
from llava_compete.train.saving import has_adapters
from llava_compete.train.sharding import zero_stage

logger = logging.getLogger(__name__)

GIB = 2**30
# Optimizers with two moments of every number that trains. Others (factored, 8 bits, none) are counted as without.
_TWO_MOMENTS = ("adamw_torch", "adamw_apex", "adamw_anyprecision")


class Written(NamedTuple):
    """Bytes of one training checkpoint, and of the stage's result."""

    checkpoint: int
    result: int


def written(model: nn.Module, arguments: TrainingArguments) -> Written:
    """What a stage will write of `model`, on the CPU or the meta device and not yet DeepSpeed's.

    Of adapters a checkpoint holds what trains, and peft's own files; else all weights. DeepSpeed adds the same once
    more, as its engine has it (ZeRO-3: what of it does not train), and float32 copies of what trains. Adapters lie
    beside the result that they are merged into.
    """
    stage = zero_stage(arguments)
    narrow = stage > 0 and (arguments.bf16 or arguments.fp16)  # then its engine casts the model

    def size(parameter: nn.Parameter) -> int:
        return parameter.numel() * (2 if narrow and parameter.is_floating_point() else parameter.element_size())

    weights = sum(map(size, model.parameters()))
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained = sum(map(size, free))
    adapters = sum(size(parameter) for name, parameter in model.named_parameters() if "lora_" in name)
    held = trained if has_adapters(model) else weights
    saved = held + adapters
    result = weights - adapters + saved if has_adapters(model) else weights
    if arguments.save_only_model:
        return Written(saved, result)
    moments = 2 if arguments.optim.value.startswith(_TWO_MOMENTS) else 0
    if stage == 0:
        return Written(saved + moments * trained, result)
    engine = held - trained if stage == 3 else held
    return Written(saved + engine + 4 * (1 + moments) * sum(parameter.numel() for parameter in free), result)


def check_space(output_dir: Path, found: Written, arguments: TrainingArguments, total_steps: int) -> None:
    """Refuse to start where the disk cannot hold what is there at one time even if a single checkpoint is kept.

    A warning where it cannot hold all that are to be kept.

    Raises:
        UserError: with the free and the needed space.
    """
    saves = _saves(arguments, total_steps)
    present = len(list(output_dir.glob("checkpoint-*")))
    free = shutil.disk_usage(output_dir).free
    needed = _needed(found, saves, 1, present)
    all_kept = _needed(found, saves, arguments.save_total_limit or saves, present)
    sizes = f"a checkpoint of about {found.checkpoint / GIB:.2f} GiB, the result of {found.result / GIB:.2f} GiB"
    if free < needed:
        raise UserError(
            f"{output_dir}: {free / GIB:.2f} GiB free, training needs about {needed / GIB:.2f} GiB ({sizes}; the last "
            "checkpoint goes once the next is whole); make room or set another output_dir"
        )
    if free < all_kept:
        logger.warning(
            "%s: %.2f GiB free, and all checkpoints that are to be kept need about %.2f GiB (%s): the run will stop at "
            "a full disk; make room, or set training.save_total_limit lower",
            *(output_dir, free / GIB, all_kept / GIB, sizes),
        )


def _saves(arguments: TrainingArguments, total_steps: int) -> int:
    """How many checkpoints a run writes that is not stopped; the last step has one, as the Trainer decides."""
    if arguments.save_strategy == "no":
        return 0
    if arguments.save_strategy == "epoch":
        return math.ceil(arguments.num_train_epochs)
    steps = arguments.save_steps if arguments.save_steps >= 1 else math.ceil(total_steps * arguments.save_steps)
    return math.ceil(total_steps / steps)


def _needed(found: Written, saves: int, limit: int, present: int) -> int:
    """Bytes beside `present` checkpoints: a new one is whole before the oldest goes, the result comes beside all."""
    at_a_save = min(saves, limit + 1) * found.checkpoint
    at_the_end = min(saves, limit) * found.checkpoint + found.result
    least = max(found.checkpoint if saves else 0, found.result)
    return max(at_a_save - present * found.checkpoint, at_the_end - present * found.checkpoint, least)
