"""The `training:` section: Hugging Face `TrainingArguments` by their own names, each with the values that it can have.

Only arguments with an effect on a stage are there; the others are refused with the reason or with the key that owns the
decision. What depends on the machine (fp16, installed packages) is checked in arguments.py, since a recipe may be read
on another one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, ConfigDict, Field, field_validator, model_validator

from llava_compete.config import StrictConfig
from llava_compete.errors import did_you_mean

PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Moment = Literal["no", "steps", "epoch"]

# Schedules that are a function of the step; the Trainer's two others wait for a metric.
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
)  # fmt: skip
# Optimizers of the Trainer that update parameters in the backward pass or need groups of their own.
_OTHER_LOOPS = ("galore", "apollo", "lomo", "adalomo", "adamw_torch_xla", "adamw_torch_npu")

# Arguments that another key owns, that the stage decides, or that would have no effect.
ELSEWHERE = {
    "output_dir": "set the top-level key output_dir",
    "deepspeed": "set the top-level key deepspeed",
    "fsdp": "use the top-level key deepspeed",
    "fsdp_config": "use the top-level key deepspeed",
    "seed": "set the top-level key seed",
    "data_seed": "set the top-level key seed",
    "resume_from_checkpoint": "a stage goes on by itself where it stopped",
    "ignore_data_skip": "a stage goes on by itself where it stopped",
    "restore_callback_states_from_checkpoint": "a stage goes on by itself where it stopped",
    "enable_jit_checkpoint": "a stage saves by itself when it is told to stop",
    "use_cpu": "run with NUM_GPUS=0",
    "local_rank": "the launcher decides",
    "ddp_backend": "the launcher decides",
    "ddp_timeout": "the process group has its own limits",
    "parallelism_config": "ranks share the batch only",
    "accelerator_config": "ranks share the batch only",
    "remove_unused_columns": "the collator decides",
    "label_names": "the collator decides",
    "dataloader_drop_last": "the sampler fills the last batch up",
    "dataloader_multiprocessing_context": "it would have no effect",
    "dataloader_in_order": "batches always come in order",
    "average_tokens_across_devices": "always on: the loss is the mean over the global batch",
    "load_best_model_at_end": "a stage keeps its last state",
    "metric_for_best_model": "a stage keeps its last state",
    "greater_is_better": "a stage keeps its last state",
    "label_smoothing_factor": "the model computes its own loss",
    "use_liger_kernel": "the model computes its own loss",
    "liger_kernel_config": "the model computes its own loss",
    "auto_find_batch_size": "it would change the global batch",
    "logging_nan_inf_filter": "a step that is not finite is skipped and named, see guards",
    "include_num_input_tokens_seen": "tokens are always counted",
    "train_sampling_strategy": "the sampler groups by length and modality",
    "length_column_name": "the sampler groups by length and modality",
    "optim_target_modules": "the top-level key trainable decides what trains",
    "push_to_hub": "upload the finished directory with `hf upload`",
    "save_on_each_node": "output_dir is one directory that all machines see",
    "warmup_ratio": "set training.warmup_steps to the share, such as 0.03",
}


def _both(name: str) -> AliasChoices:
    """Checkpointing has an older name at Hugging Face, which most recipes use."""
    return AliasChoices(name, name.replace("activation", "gradient"))


class TrainingSection(StrictConfig):
    """Values are not converted: `"1e-4"` in quotes is text, `yes` is text, 1 is no truth value."""

    model_config = ConfigDict(strict=True)

    per_device_train_batch_size: PositiveInt = Field(default=8, description="rows of a micro-batch on one rank")
    gradient_accumulation_steps: PositiveInt = Field(default=1, description="micro-batches of one optimizer step")
    num_train_epochs: Positive = Field(default=3.0, description="passes over the rows; a fraction is allowed")
    max_steps: PositiveInt | None = Field(default=None, description="optimizer steps, in place of epochs")

    learning_rate: Positive = Field(default=5e-5, description="of parts that set none of their own")
    lr_scheduler_type: str = Field(default="linear", description="transformers' name of the schedule")
    lr_scheduler_kwargs: dict[str, Any] | None = Field(default=None, description="further arguments of the schedule")
    warmup_steps: NotNegative = Field(
        default=0, description="optimizer steps in which the rate rises from 0; below 1 a share of all steps"
    )
    optim: str = Field(default="adamw_torch", description="transformers' name of the optimizer")
    optim_args: str | None = Field(default=None, description="further arguments of the optimizer, as name=value, ...")
    weight_decay: NotNegative = Field(default=0.0, description="decoupled; not on biases and norms")
    adam_beta1: Share = Field(default=0.9, description="AdamW's decay of the gradient's mean")
    adam_beta2: Share = Field(default=0.999, description="AdamW's decay of its mean square")
    adam_epsilon: Positive = Field(default=1e-8, description="AdamW's denominator is at least this")
    max_grad_norm: NotNegative = Field(default=1.0, description="gradients are scaled down to this norm over all parts")
    neftune_noise_alpha: Positive | None = Field(
        default=None, description="noise on the embeddings (NEFTune, arXiv 2310.05914)"
    )

    bf16: bool = Field(default=False, description="mixed precision in bfloat16; routing stays in float32")
    fp16: bool = Field(default=False, description="mixed precision in float16, on a GPU only")
    tf32: bool | None = Field(default=None, description="float32 products by TF32 on a GPU")
    activation_checkpointing: bool = Field(
        default=False,
        validation_alias=_both("activation_checkpointing"),
        description="recompute each layer in backward: less memory, a third more arithmetic",
    )
    activation_checkpointing_kwargs: dict[str, Any] | None = Field(
        default=None,
        validation_alias=_both("activation_checkpointing_kwargs"),
        description="of torch.utils.checkpoint; use_reentrant must be false",
    )
    torch_compile: bool | Literal["layers"] = Field(
        default=False,
        description="compile the model as a whole (true), or each of its layers by itself (layers; not under ZeRO-3)",
    )
    torch_compile_backend: str | None = Field(default=None, description="of torch.compile")
    torch_compile_mode: str | None = Field(default=None, description="of torch.compile")
    torch_empty_cache_steps: PositiveInt | None = Field(
        default=None, description="free the device's cached memory every so many steps"
    )
    full_determinism: bool = Field(default=False, description="deterministic kernels, slower")

    logging_strategy: Moment = Field(default="steps", description="when a line is logged")
    logging_steps: Positive = Field(default=10, description="optimizer steps between two lines")
    logging_first_step: bool = Field(default=False, description="also log the first step")
    disable_tqdm: bool | None = Field(default=None, description="no progress bar")
    report_to: str | list[str] | None = Field(default="tensorboard", description="tensorboard, wandb, ... or none")
    run_name: str | None = Field(default=None, description="of the run in wandb and others")
    project: str = Field(default="huggingface", description="of the run in wandb and others")

    eval_strategy: Moment = Field(default="no", description="when the held-out loss is measured")
    eval_steps: Positive | None = Field(default=None, description="optimizer steps between two measurements")
    eval_delay: NotNegative = Field(default=0, description="steps or epochs before the first")
    eval_on_start: bool = Field(default=False, description="measure before the first step")
    per_device_eval_batch_size: PositiveInt = Field(default=8, description="rows of a held-out batch on one rank")

    save_strategy: Moment = Field(default="steps", description="when a checkpoint is written")
    save_steps: Positive = Field(default=500, description="optimizer steps between two checkpoints")
    save_total_limit: PositiveInt | None = Field(default=None, description="checkpoints that are kept")
    save_only_model: bool = Field(
        default=False, description="leave optimizer states out; such a checkpoint cannot be resumed"
    )

    dataloader_num_workers: Count = Field(default=0, description="processes that load rows, on each rank")
    dataloader_pin_memory: bool | None = Field(default=None, description="page-locked batches; default on a GPU")
    dataloader_persistent_workers: bool = Field(default=False, description="keep workers over epochs")
    dataloader_prefetch_factor: PositiveInt | None = Field(
        default=None, description="batches that a worker loads ahead"
    )

    ddp_find_unused_parameters: bool = Field(default=False, description="of DistributedDataParallel")
    ddp_bucket_cap_mb: PositiveInt | None = Field(default=None, description="of DistributedDataParallel, MB")
    ddp_broadcast_buffers: bool | None = Field(default=None, description="of DistributedDataParallel")
    ddp_static_graph: bool | None = Field(default=None, description="of DistributedDataParallel")

    @model_validator(mode="before")
    @classmethod
    def _decided_elsewhere(cls, data: Any) -> Any:
        for name in data if isinstance(data, dict) else ():
            if name in ELSEWHERE or str(name).startswith("hub_"):
                raise ValueError(f"training.{name} is not set here: {ELSEWHERE.get(name, ELSEWHERE['push_to_hub'])}")
        return data

    @field_validator("lr_scheduler_type")
    @classmethod
    def _known_schedule(cls, value: str) -> str:
        if value not in SCHEDULES:
            raise ValueError(f"found {value!r}, expected one of {', '.join(SCHEDULES)}{did_you_mean(value, SCHEDULES)}")
        return value

    @field_validator("optim")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        from transformers.training_args import OptimizerNames

        known = [name.value for name in OptimizerNames if not name.value.startswith(_OTHER_LOOPS)]
        if value not in known:
            raise ValueError(f"found {value!r}, expected one of {', '.join(known)}{did_you_mean(value, known)}")
        return value

    @field_validator("report_to")
    @classmethod
    def _known_reports(cls, value: str | list[str] | None) -> str | list[str] | None:
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        for name in [value] if isinstance(value, str) else value or []:
            if name not in INTEGRATION_TO_CALLBACK and value != "none":
                known = sorted(INTEGRATION_TO_CALLBACK)
                raise ValueError(
                    f"found {name!r}, expected none or some of {', '.join(known)}{did_you_mean(name, known)}"
                )
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> TrainingSection:
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            raise ValueError(
                f"training.warmup_steps: found {self.warmup_steps}, expected whole steps or a share below 1"
            )
        if self.bf16 and self.fp16:
            raise ValueError("training.fp16: bf16 is on as well; choose one")
        if self.dataloader_num_workers == 0:
            idle = [
                name for name in ("dataloader_persistent_workers", "dataloader_prefetch_factor") if getattr(self, name)
            ]
            if idle:
                raise ValueError(f"training.{idle[0]}: needs training.dataloader_num_workers above 0")
        if (self.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "training.activation_checkpointing_kwargs.use_reentrant: must be false (aux losses need it)"
            )
        return self
