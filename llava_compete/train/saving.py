"""Checkpoints and results of a stage as its trainer writes them: whole or not there, streamed where they are spread."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer

from llava_compete.errors import UserError
from llava_compete.model.build import save_checkpoint
from llava_compete.model.lora import TRAINED, load_trained
from llava_compete.moe.block import moe_blocks
from llava_compete.train import checkpoints
from llava_compete.train.adapters import ADAPTER_DIR, save_adapters, save_merged
from llava_compete.train.callbacks.answer_means import AnswerMeansCallback
from llava_compete.train.config import TrainConfig
from llava_compete.train.distributed import wait_for_all
from llava_compete.train.sharding import zero_stage
from llava_compete.train.streaming import partitioned, stream_checkpoint, stream_trained

logger = logging.getLogger(__name__)

# Seconds that `deepspeed` and `torchrun` wait for their ranks once they are told to stop; both have no setting for it.
LAUNCHERS_PATIENCE = 30
# With less than this left, a failed write is taken for a full disk.
FULL_DISK_BYTES = 64 * 2**20


class SavingTrainer(Trainer):
    """What of a stage's trainer saves: training checkpoints beside the folder and then renamed, and the result.

    Attributes to set before training:
        mark: what a resume compares; saved in each checkpoint.
        expert_ranks: over how many the experts are spread.
    """

    config: TrainConfig
    answer_means: AnswerMeansCallback

    def __init__(self, **kwargs: Any) -> None:
        self._saving = False  # a training checkpoint, and not the stage's result
        self._longest_save = 0.0
        self.saved_step = 0  # of the last training checkpoint
        self.mark: dict[str, Any] = {}
        self.expert_ranks = 1
        super().__init__(**kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(self.args.output_dir) / checkpoints.STAGING) if self._saving else self.args.output_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        began = time.perf_counter()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            # torch and safetensors hide the system's error in their own kinds.
            free = shutil.disk_usage(self.args.output_dir).free
            if free > FULL_DISK_BYTES:
                raise
            raise UserError(
                f"{self.args.output_dir}: the disk is full ({free / 2**20:.0f} MiB free), checkpoint-"
                f"{self.state.global_step} was not written; make room and run the same command again, it goes on from "
                "the last complete checkpoint"
            ) from error
        finally:
            self._saving = False
        wait_for_all()
        if self.args.should_save:
            output_dir = Path(self.args.output_dir)
            checkpoints.publish(output_dir, f"checkpoint-{self.state.global_step}", self.mark)
            checkpoints.rotate(output_dir, self.args.save_total_limit, self.state.global_step)
        wait_for_all()
        self.saved_step = self.state.global_step
        self._tell_save_time(time.perf_counter() - began)

    def _tell_save_time(self, seconds: float) -> None:
        """Once, and again where a save grows too long for a run that is told to stop."""
        if seconds > max(self._longest_save, LAUNCHERS_PATIENCE) or not self._longest_save:
            too_long = seconds > LAUNCHERS_PATIENCE
            logger.log(
                logging.WARNING if too_long else logging.INFO,
                "checkpoint-%d: saved in %.1f s%s; deepspeed and torchrun by themselves kill their ranks %d s after "
                "they are told to stop, the stage scripts wait",
                *(self.state.global_step, seconds, ", too long for some launchers" if too_long else ""),
                LAUNCHERS_PATIENCE,
            )
        self._longest_save = max(self._longest_save, seconds)

    def save_merged(self, directory: Path, base: Any) -> None:
        """The stage's result: the trained model, or `base()` with the trained adapters merged into it."""
        if not has_adapters(self.model):
            self.save_model(str(directory))
            return
        with partitioned(self.deepspeed, zero_stage(self.args)):
            stream_trained(self.model, self._trained(), directory / ADAPTER_DIR)
        if self.args.should_save:
            save_merged(base(), self.config.trainable, self.processing_class, directory)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; weights that no rank holds whole are written as they are gathered."""
        stage, directory = zero_stage(self.args), Path(output_dir or self.args.output_dir)
        if has_adapters(self.model):
            with partitioned(self.deepspeed, stage):
                stream_trained(self.model, self._trained(), directory)
            if self.args.should_save:
                save_adapters(self.model, directory)
        elif self.deepspeed is not None and (self.expert_ranks > 1 or stage == 3):
            with partitioned(self.deepspeed, stage):
                stream_checkpoint(self.model, self.processing_class, directory)
        else:
            super().save_model(output_dir, _internal_call)
            return
        self._save_means(directory)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The self-contained model directory that the next stage reads; rank 0 writes it, the others wait."""
        directory = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            save_checkpoint(self.model, self.processing_class, directory, state_dict)
        self._save_means(directory)

    def _save_means(self, directory: Path) -> None:
        if self.args.should_save and self._saving:
            self.answer_means.save(directory)
        wait_for_all()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The weights of a checkpoint without DeepSpeed: peft's loading would leave out parts that train in full."""
        if not has_adapters(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        stored, unknown = load_trained(self.model, Path(resume_from_checkpoint))
        if lost := sorted(self._trained() - stored)[:2] + unknown[:2]:
            raise UserError(f"{resume_from_checkpoint}/{TRAINED}.safetensors: does not fit the `trainable` map: {lost}")

    def _trained(self) -> set[str]:
        """Names of what changes: trainable parameters, and buffers of routers, which some of these set each step."""
        routers = {id(buffer) for block in moe_blocks(self.model).values() for buffer in block.router.buffers()}
        buffers = {name for name, buffer in self.model.named_buffers() if id(buffer) in routers}
        return buffers | {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}


def has_adapters(model: Any) -> bool:
    """Whether `model` is in peft's wrapper."""
    return isinstance(model, PeftModel)
