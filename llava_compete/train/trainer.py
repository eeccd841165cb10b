"""A thin Hugging Face `Trainer`: global counts for the loss, named loss terms, groups by part.

Losses are normalised by counts of the whole optimizer step (all micro-batches, all ranks), gathered in one small
all-reduce before its first forward. The loss is multiplied by the number of processes, and DDP and DeepSpeed divide
gradients by it, so the language-model loss and the auxiliary losses both come out as global means, whatever the
split into ranks and micro-batches.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from llava_compete.errors import UserError
from llava_compete.train import expert_parallel, trainable
from llava_compete.train import resharding as universal
from llava_compete.train import step_counts as counts
from llava_compete.train.callbacks.answer_means import AnswerMeansCallback
from llava_compete.train.callbacks.bad_steps import BadStepsCallback
from llava_compete.train.callbacks.router_gradients import RouterGradientsCallback
from llava_compete.train.config import TrainConfig
from llava_compete.train.extension import Plan, Schedule, load_schedule, set_rates
from llava_compete.train.held_out import validation_loss
from llava_compete.train.metrics import StepMetrics, learning_rates, peak_memory_gib, scalars
from llava_compete.train.saving import SavingTrainer, has_adapters
from llava_compete.train.sharded_start import is_unread, partition
from llava_compete.train.starting_point import HANDOVER
from llava_compete.train.stopping import DeafContext
from llava_compete.train.waiting import wait_for_all

# Settings of an optimizer's groups that a resume with --allow-changed obeys; the rest is the optimizer's own state.
_OBEYED = ("weight_decay", "betas", "eps")
# torch's kinds of running out of memory that are plain RuntimeErrors.
_NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


class StageLoader(DataLoader):
    """A plain DataLoader over ready micro-batches of row numbers; `set_epoch` reaches its sampler.

    Its workers hear no request to stop, nor do those of the plain loader that takes its place in an epoch that a run
    goes on in (accelerate's `skip_first_batches`): the context by which they start is handed on.
    """

    def __init__(self, dataset: Any, *, num_workers: int = 0, **kwargs: Any) -> None:
        context = DeafContext() if num_workers else None
        super().__init__(dataset, num_workers=num_workers, multiprocessing_context=context, **kwargs)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of epoch `epoch`."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class StageTrainer(SavingTrainer):
    """One stage's training loop; takes the keyword arguments of `Trainer` and those below.

    Args:
        config: the stage.
        batch_sampler: yields this rank's micro-batches of row numbers, with `set_epoch`.

    Attributes to set before training, beside those of `SavingTrainer`:
        plan: the run's length, warm-up and competitions.
    """

    def __init__(self, *, config: TrainConfig, batch_sampler: Any, **kwargs: Any) -> None:
        self.optimizer: Any = None
        self.control: Any = None
        super().__init__(**kwargs)
        self.config = config
        self.batch_sampler = batch_sampler
        self.plan = Plan(0, 0, (0,))
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
        """As transformers', which takes the scale of a norm for a weight unless it is a layer norm, or named as one:
        batch norms, and timm's RMS norms."""
        scales = {f"{name}.weight" for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
        return [name for name in super().get_decay_parameter_names(model) if name not in scales]

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return trainable.optimizer_groups(
            model,
            self.config.trainable,
            learning_rate=self.args.learning_rate,
            weight_decay=self.args.weight_decay,
            decayed=set(self.get_decay_parameter_names(model)),
        )

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As the Trainer's; schedules with a lowest rate look for the `defaults` that DeepSpeed's optimizers lack."""
        wrapped: Any = getattr(self.optimizer, "optimizer", None)
        if self.is_deepspeed_enabled and not hasattr(wrapped, "defaults"):
            wrapped.defaults = wrapped.optimizer.defaults
        return super().create_scheduler(num_training_steps, optimizer)

    def schedule(self) -> Schedule:
        """The learning rates that the config asks for, before there is an optimizer."""
        return Schedule(self.args, [group["lr"] for group in self._groups(self.model)])

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; running out of memory, wherever, says what did not fit and which settings to change."""
        expert_parallel.spread(self.model, self.expert_ranks)
        if is_unread(self.model):
            partition(self.model, self.args.hf_deepspeed_config.config)
            wait_for_all()
            if self.args.should_save:
                shutil.rmtree(Path(self.args.output_dir) / HANDOVER, ignore_errors=True)
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
        return self.model.get_base_model() if has_adapters(self.model) else self.model

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
            universal.load_buffers(self.deepspeed.module, Path(checkpoint))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """The step's gradient norm; a non-finite one marks the step as bad and keeps it from the weights."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.item() if isinstance(norm, Tensor) else float(norm if norm is not None else 0.0)
        # DeepSpeed has done this step; elsewhere it is still to come, and what a loss scale skipped is the one before.
        skipped = self.deepspeed is not None and self.accelerator.optimizer_step_was_skipped
        return self.bad_steps.judge(norm, skipped, model, self._tr_loss)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Nothing here: counted before training, see mfu.py."""
        return 0

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's; a run that was told to stop saves once and leaves, whatever else is due, now or at the end
        that breaking off an epoch is for the Trainer: who told it may not wait for an evaluation."""
        if self.step_counts is not None and self.step_counts.stop:
            self.control.should_evaluate = False
            self.control.should_save &= self.state.global_step != self.saved_step
        super()._maybe_log_save_evaluate(*args, **kwargs)

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
