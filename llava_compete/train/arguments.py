"""From the `training:` section to Hugging Face `TrainingArguments`, and what the machine must have for them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from llava_compete.errors import UserError
from llava_compete.train.training_section import TrainingSection

if TYPE_CHECKING:
    from transformers import TrainingArguments


def build_arguments(
    training: TrainingSection, *, output_dir: Path, seed: int, deepspeed: Path | None, on_gpu: bool
) -> TrainingArguments:
    """Resolve TrainingArguments, before anything is loaded.

    Raises:
        UserError: what this machine lacks for a value, or what Hugging Face says against it.
    """
    import torch
    from transformers import TrainingArguments

    _check_machine(training, on_gpu)
    values = {"dataloader_pin_memory": on_gpu, **training.model_dump(exclude_none=True)}
    if training.torch_compile == "layers":  # done by `compile_layers`
        values = {name: value for name, value in values.items() if not name.startswith("torch_compile")}
    if training.activation_checkpointing:
        kwargs = training.activation_checkpointing_kwargs or {}
        values["activation_checkpointing_kwargs"] = {**kwargs, "use_reentrant": False}
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(output_dir / "run" / "tensorboard"))
    try:
        arguments = TrainingArguments(
            output_dir=str(output_dir),
            seed=seed,
            deepspeed=str(deepspeed) if deepspeed else None,
            use_cpu=not on_gpu,
            # The filter would ask the device for a number in every micro-batch; bad steps are looked for once a step.
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            average_tokens_across_devices=True,
            label_names=["labels"],
            **values,
        )
    except (TypeError, ValueError, ImportError) as error:
        if torch.distributed.is_initialized() and "deepspeed" in str(error).lower() and deepspeed:
            raise UserError(f"{deepspeed}: {' '.join(str(error).split())}") from error
        raise UserError(f"training: {' '.join(str(error).split())}") from error
    _try_optimizer_and_schedule(arguments)
    return arguments


def check_reports(arguments: TrainingArguments) -> None:
    """Refuse a logger that is not installed, or Weights & Biases without a login; on the rank that writes.

    Raises:
        UserError: naming the logger.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in arguments.report_to:
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            raise UserError(f"training.report_to: {name}: {' '.join(str(error).split())}") from error
    if "wandb" in arguments.report_to and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if wandb.api.api_key is None:
            raise UserError("training.report_to: wandb has no login here; run `wandb login`, or set WANDB_MODE=offline")


def _check_machine(training: TrainingSection, on_gpu: bool) -> None:
    import torch._dynamo
    from accelerate.utils import DynamoBackend

    if training.fp16 and not on_gpu:
        raise UserError("training.fp16: needs a GPU; use bf16 or neither")
    backend = training.torch_compile_backend
    if backend is not None:
        known = {item.value.lower() for item in DynamoBackend} & set(torch._dynamo.list_backends(exclude_tags=()))
        if backend not in known:
            raise UserError(
                f"training.torch_compile_backend: found {backend!r}, expected one of {', '.join(sorted(known))}"
            )


def _try_optimizer_and_schedule(arguments: TrainingArguments) -> None:
    """Both on one number, so that a missing package or a wrong option shows before the model is loaded."""
    import torch
    from transformers import Trainer, get_scheduler

    number = torch.nn.Parameter(torch.zeros(1))
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = kind([number], **options)
    except (ImportError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"training.optim: {arguments.optim.value}: {' '.join(str(error).split())}") from error
    if callable(getattr(optimizer, "eval", None)):
        raise UserError(
            f"training.optim: {arguments.optim.value} has other weights for evaluation than for training (it has no "
            "schedule); checkpoints, results and the held-out loss would be of those for training. Expected another"
        )
    steps = max(arguments.max_steps, 1)
    rate = arguments.learning_rate  # which some schedules compare with their lowest one
    try:
        get_scheduler(
            arguments.lr_scheduler_type,
            torch.optim.SGD([number], lr=rate),
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
        )
    except (TypeError, ValueError) as error:
        name = arguments.lr_scheduler_type.value
        raise UserError(f"training.lr_scheduler_kwargs: {name}: {' '.join(str(error).split())}") from error
