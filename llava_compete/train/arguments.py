"""From the `training:` section to Hugging Face `TrainingArguments`, by their own names.

`check_names` runs when the YAML is read and needs no heavy import until then; `build_arguments` runs on every rank
once the process group is up. A few arguments belong to other keys of the stage config and are refused here.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_compete.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Arguments that another key owns: one owner for each decision.
OWNED = {
    "output_dir": "set the top-level key output_dir",
    "deepspeed": "set the top-level key deepspeed",
    "seed": "set the top-level key seed",
    "data_seed": "set the top-level key seed",
    "resume_from_checkpoint": "a stage goes on by itself where it stopped",
    "use_cpu": "run with NUM_GPUS=0",
    "remove_unused_columns": "the collator decides",
    "average_tokens_across_devices": "always on: the loss is the mean over the global batch",
    "load_best_model_at_end": "a stage keeps its last state",
    "label_smoothing_factor": "the model computes its own loss",
    "auto_find_batch_size": "it would change the global batch",
    "include_num_input_tokens_seen": "tokens are always counted",
    "train_sampling_strategy": "the sampler groups by length and modality",
    "fsdp": "use the top-level key deepspeed",
}


def check_names(training: dict[str, Any]) -> None:
    """Raise ValueError for a key that is no TrainingArguments field, naming the nearest, or that another key owns."""
    from transformers import TrainingArguments

    valid = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    for name in training:
        if name in OWNED:
            raise ValueError(f"training.{name} is not set here: {OWNED[name]}")
        if name not in valid:
            raise ValueError(f"unknown key 'training.{name}' (no TrainingArguments field){did_you_mean(name, valid)}")
    kwargs = training.get("activation_checkpointing_kwargs") or training.get("gradient_checkpointing_kwargs") or {}
    if kwargs.get("use_reentrant"):
        raise ValueError("training.activation_checkpointing_kwargs.use_reentrant: must be false (aux losses need it)")


def build_arguments(
    training: dict[str, Any], *, output_dir: Path, seed: int, deepspeed: Path | None, on_gpu: bool
) -> TrainingArguments:
    """Resolve TrainingArguments; values that Hugging Face rejects become a `UserError`."""
    import torch
    from transformers import TrainingArguments

    values = {
        "logging_steps": 10,
        "report_to": "tensorboard",
        "optim": "adamw_torch",
        "dataloader_pin_memory": on_gpu,
        "ddp_find_unused_parameters": False,
        **training,
    }
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        if old in values:
            values[old.replace("gradient", "activation")] = values.pop(old)
    if values.get("activation_checkpointing"):
        kwargs = dict(values.get("activation_checkpointing_kwargs") or {})
        values["activation_checkpointing_kwargs"] = {**kwargs, "use_reentrant": False}
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(output_dir / "run" / "tensorboard"))
    try:
        return TrainingArguments(
            output_dir=str(output_dir),
            seed=seed,
            deepspeed=str(deepspeed) if deepspeed else None,
            use_cpu=not on_gpu,
            # The filter would ask the device for a number in every micro-batch; guards.py looks once a step.
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            average_tokens_across_devices=True,
            label_names=["labels"],
            **{key: value for key, value in values.items() if key != "logging_nan_inf_filter"},
        )
    except (TypeError, ValueError, ImportError) as error:
        if torch.distributed.is_initialized() and "deepspeed" in str(error).lower() and deepspeed:
            raise UserError(f"{deepspeed}: {' '.join(str(error).split())}") from error
        raise UserError(f"training: {' '.join(str(error).split())}") from error
