"""A thin Hugging Face `Trainer`: global counts for the loss, named loss terms, per-part groups, whole checkpoints.

Losses are normalised by counts of the whole optimizer step (all micro-batches, all ranks), gathered in one small
all-reduce before its first forward. The loss is multiplied by the number of processes, and DDP and DeepSpeed divide
gradients by it, so the language-model loss and the auxiliary losses both come out as global means, whatever the
split into ranks and micro-batches.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils.data import DataLoader
from transformers import Trainer

from llava_compete.errors import UserError
from llava_compete.model.build import save_checkpoint
from llava_compete.model.lora import TRAINED_WEIGHTS, save_trained
from llava_compete.moe.block import moe_blocks
from llava_compete.train import checkpoints, expert_parallel, trainable
from llava_compete.train import resharding as universal
from llava_compete.train import step_counts as counts
from llava_compete.train.adapters import save_merged
from llava_compete.train.callbacks.answer_means import AnswerMeansCallback
from llava_compete.train.callbacks.bad_steps import BadStepsCallback
from llava_compete.train.callbacks.router_gradients import RouterGradientsCallback
from llava_compete.train.config import TrainConfig
from llava_compete.train.distributed import wait_for_all
from llava_compete.train.extension import Plan, Schedule, load_schedule, set_rates
from llava_compete.train.held_out import validation_loss
from llava_compete.train.metrics import StepMetrics, learning_rates, peak_memory_gib, scalars
from llava_compete.train.sharding import zero_stage
from llava_compete.train.stopping import deaf_children
from llava_compete.train.streaming import partitioned, stream_checkpoint

logger = logging.getLogger(__name__)

# Seconds that `deepspeed` and `torchrun` wait for their ranks once they are told to stop; both have no setting for it.
LAUNCHERS_PATIENCE = 30
# With less than this left, a failed write is taken for a full disk.
FULL_DISK_BYTES = 64 * 2**20
# What a checkpoint of a LoRA stage holds beside peft's adapter: parts that train in full.
# Settings of an optimizer's groups that a resume with --allow-changed obeys; the rest is the optimizer's own state.
_OBEYED = ("weight_decay", "betas", "eps")
# torch's kinds of running out of memory that are plain RuntimeErrors.
_NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


class StageLoader(DataLoader):
    """A plain DataLoader over ready micro-batches of row numbers; `set_epoch` reaches its sampler."""

    def __iter__(self) -> Any:
        with deaf_children():
            return super().__iter__()

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of epoch `epoch`."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class StageTrainer(Trainer):
    """One stage's training loop; takes the keyword arguments of `Trainer` and those below.

    Args:
        config: the stage.
        batch_sampler: yields this rank's micro-batches of row numbers, with `set_epoch`.

    Attributes to set before training:
        mark: what a resume compares; saved in each checkpoint.
        plan: the run's length, warm-up and competitions.
        expert_ranks: over how many the experts are spread.
    """

    def __init__(self, *, config: TrainConfig, batch_sampler: Any, **kwargs: Any) -> None:
        self.optimizer: Any = None
        self.control: Any = None
        self._saving = False  # a training checkpoint, and not the stage's result
        super().__init__(**kwargs)
        self.config = config
        self.batch_sampler = batch_sampler
        self.mark: dict[str, Any] = {}
        self.plan = Plan(0, 0, (0,))
        self.expert_ranks = 1
        self.step_metrics = StepMetrics(self.args.device)
        self.step_counts: counts.StepCounts | None = None
        self.stop_requested = False
        self.bad_steps = BadStepsCallback(self)
        self.add_callback(self.bad_steps)
        self.answer_means = AnswerMeansCallback(self)
        self.add_callback(self.answer_means)
        self.router_gradients = RouterGradientsCallback(self)
        self.add_callback(self.router_gradients)
        self.record: dict[str, Any] = {}
        # Throughput and times since its last call; the step callback, which measures them, sets it.
        self.take_window: Callable[[], dict[str, Any]] = dict
        self._micro_batch = "before the first step"
        self._longest_save = 0.0

    # ---- data: the sampler already shares rows out to ranks, so accelerate must not do it again ----

    def get_train_dataloader(self) -> DataLoader:
        """This rank's micro-batches."""
        workers = self.args.dataloader_num_workers
        return StageLoader(
            self.train_dataset,
            batch_sampler=self.batch_sampler,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=workers > 0 and self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """Fetch the step's micro-batches and count tokens and sequences over all ranks."""
        try:
            batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        except UserError as error:
            # From a worker process it arrives wrapped in that process's traceback.
            raise UserError(
                str(error).strip().splitlines()[-1].removeprefix("llava_compete.errors.UserError: ")
            ) from error
        tower = self.core_model.vision_tower
        chunks = {} if tower is None else {"num_chunks": tower.num_chunks}
        self.step_counts = counts.gather(batches, device, stop=self.stop_requested, **chunks)
        self.bad_steps.begin(batches, self._tr_loss)
        return batches, self.step_counts.supervised_tokens

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *rest: Any
    ) -> tuple[int, int]:
        """(epochs trained, micro-batches trained in the next one), as the Trainer's.

        The Trainer would begin the next step even where a run was killed after its last checkpoint; with all epochs
        trained it begins none, and the stage goes straight to saving its model.
        """
        trained = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *rest)
        # How often to log, save and evaluate is what the config says now, and not what the checkpoint was written with.
        self.state.compute_steps(self.args, max_steps)
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else trained

    # ---- loss and optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group for each part and decay setting, from the `trainable:` map."""
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = self._groups(model)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **options)
            self._group_settings = [
                {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
            ]
        return self.optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As transformers', which takes a batch norm's scale for a weight."""
        scales = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, BatchNorm)}
        return [name for name in super().get_decay_parameter_names(model) if name not in scales]

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return trainable.optimizer_groups(
            model,
            self.config.trainable,
            learning_rate=self.args.learning_rate,
            weight_decay=self.args.weight_decay,
            decayed=set(self.get_decay_parameter_names(model)),
        )

    def schedule(self) -> Schedule:
        """The learning rates that the config asks for, before there is an optimizer."""
        return Schedule(self.args, [group["lr"] for group in self._groups(self.model)])

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; running out of memory, wherever, says what did not fit and which settings to change."""
        expert_parallel.spread(self.model, self.expert_ranks)
        try:
            return super().train(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, MemoryError) or any(sign in str(error) for sign in _NO_MEMORY):
                raise UserError(self._out_of_memory()) from error
            raise

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As the Trainer's; notes the micro-batch's shape, should it not fit in memory."""
        rows, length = inputs["input_ids"].shape
        tiles = len(inputs["pixel_values"]) if "pixel_values" in inputs else 0
        images = (
            f"{len(inputs['image_sizes'])} images in {tiles} tiles" if "image_sizes" in inputs else f"{tiles} images"
        )
        competing = (
            ", competition in " + ", ".join(sorted(layers)) if (layers := self.core_model.routing.competing) else ""
        )
        self._micro_batch = (
            f"in step {self.state.global_step + 1}: micro-batch of {rows} rows, padded to {length} tokens, "
            f"{images}{competing}"
        )
        return super().training_step(model, inputs, num_items_in_batch)

    def _out_of_memory(self) -> str:
        return (
            f"out of memory {self._micro_batch}. Halve "
            f"training.per_device_train_batch_size (now {self.args.per_device_train_batch_size}) and double "
            f"training.gradient_accumulation_steps (now {self.args.gradient_accumulation_steps}); then "
            "training.activation_checkpointing=true, moe.<part>.competition_chunk_tokens, a smaller data.max_length, "
            f"deepspeed=zero3 or zero3_offload (now {self.config.deepspeed})"
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss, its terms and routing records put aside for the log."""
        assert self.step_counts is not None
        outputs = model(
            **inputs, num_items_in_batch=num_items_in_batch, num_sequences_in_batch=self.step_counts.sequences
        )
        terms = {"lm_loss": outputs.lm_loss, **outputs.loss_terms}
        terms |= {f"{part}/aux_loss": loss for part, loss in outputs.aux_losses.items()}
        self.step_metrics.add_forward(terms, self.core_model.routing.stacks)
        self.answer_means.add_forward(self.core_model.routing.answers)
        measured = self.core_model.routing.gradients
        loss = outputs.loss if measured is None else measured.loss(outputs.loss)
        loss = loss * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    @property
    def core_model(self) -> Any:
        """The LlavaCompete model inside peft's wrapper."""
        return self.model.get_base_model() if _has_adapters(self.model) else self.model

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self.deepspeed is None:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:  # which has loaded its optimizer's state with the weights
            load_schedule(self.lr_scheduler, Path(checkpoint), len(self._group_settings))
        if self.expert_ranks > 1:
            expert_parallel.refresh(self.deepspeed)
        self.answer_means.load(Path(checkpoint))
        optimizer = self.optimizer if self.deepspeed is None else self.deepspeed.optimizer.optimizer
        rates = set_rates(self.lr_scheduler, [group["lr"] for group in self._group_settings])
        for group, now, rate in zip(optimizer.param_groups, self._group_settings, rates, strict=True):
            group.update({key: now[key] for key in _OBEYED if key in now}, lr=rate)
        if self.deepspeed is not None and self.deepspeed.load_universal_checkpoint():
            universal.mend_loaded_state(optimizer, self._group_settings, rates)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """The step's gradient norm; a non-finite one marks the step as bad and keeps it from the weights."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.item() if isinstance(norm, Tensor) else float(norm if norm is not None else 0.0)
        return self.bad_steps.judge(norm, self.accelerator.optimizer_step_was_skipped, model, self._tr_loss)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Nothing here: counted before training, see mfu.py."""
        return 0

    # ---- log: called on every rank, so the collective inside `collect` is safe ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add loss terms and routing metrics to a training log line; `record` keeps all of it for the writer."""
        if "loss" in logs:
            logs = {**logs, "loss": self.bad_steps.mean_loss(logs["loss"])}
        self.record = dict(logs)
        if "loss" in logs:
            metrics = self.step_metrics.collect(self.train_dataset.counters) | self.router_gradients.collect()
            metrics |= learning_rates(self.optimizer)
            metrics["memory_gib"] = peak_memory_gib(self.args.device)
            metrics |= self.take_window()
            self.record |= metrics
            logs = {**logs, **scalars(metrics)}
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss on the held-out rows, over tokens and ranks."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics = validation_loss(
            self.model_wrapped,
            dataset,
            self.data_collator,
            batch_size=self.args.per_device_eval_batch_size,
            device=self.args.device,
        )
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- checkpoints: written beside, then renamed ----

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
            checkpoints.rotate(output_dir, self.args.save_total_limit)
        wait_for_all()
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
        if not _has_adapters(self.model):
            self.save_model(str(directory))
            return
        engine = self.model_wrapped if self.is_deepspeed_enabled else self.model
        state_dict = self.accelerator.get_state_dict(engine)
        if self.args.should_save:
            trained = self._trained()
            state_dict = {name: tensor for name, tensor in state_dict.items() if name in trained}
            save_merged(base(), self.config.trainable, state_dict, self.processing_class, directory)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; weights that no rank holds whole are written as they are gathered."""
        stage = zero_stage(self.args)
        is_sharded = self.expert_ranks > 1 or stage == 3
        if self.deepspeed is None or _has_adapters(self.model) or not is_sharded:
            super().save_model(output_dir, _internal_call)
            return
        directory = Path(output_dir or self.args.output_dir)
        with partitioned(self.deepspeed, stage):
            stream_checkpoint(self.model, self.processing_class, directory)
        if self.args.should_save and self._saving:
            self.answer_means.save(directory)
        wait_for_all()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The self-contained model directory that the next stage reads; rank 0 writes it, the others wait."""
        if self.args.should_save:
            directory = Path(output_dir or self.args.output_dir)
            self._write(directory, state_dict)
            if self._saving:
                self.answer_means.save(directory)
        wait_for_all()

    def _write(self, directory: Path, state_dict: dict[str, Tensor] | None) -> None:
        if not _has_adapters(self.model):
            save_checkpoint(self.model, self.processing_class, directory, state_dict)
            return
        self.model.save_pretrained(directory, state_dict=state_dict)
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        save_trained(directory, {name: state_dict[name] for name in self._trained()})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The weights of a checkpoint without DeepSpeed: peft's loading would leave out parts that train in full."""
        if not _has_adapters(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        weights = load_file(Path(resume_from_checkpoint) / TRAINED_WEIGHTS)
        result = self.model.load_state_dict(weights, strict=False)
        lost = self._trained() - weights.keys()
        if lost or result.unexpected_keys:
            raise UserError(
                f"{resume_from_checkpoint}/{TRAINED_WEIGHTS}: does not fit the `trainable` map: "
                f"{sorted(lost)[:2] + result.unexpected_keys[:2]}"
            )

    def _trained(self) -> set[str]:
        """Names of what changes: trainable parameters, and buffers of routers, which some of these set each step."""
        routers = {id(buffer) for block in moe_blocks(self.model).values() for buffer in block.router.buffers()}
        buffers = {name for name, buffer in self.model.named_buffers() if id(buffer) in routers}
        return buffers | {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}


def _has_adapters(model: Any) -> bool:
    return isinstance(model, PeftModel)
