"""LoRA in a stage: adapters on the parts that say `lora`, and a plain checkpoint with the adapters merged at the end.

The adapters themselves are model/lora.py's. Merging happens on rank 0 in host memory, on a fresh copy of the base
model, so that it is the same for every ZeRO stage (design rule 6: parameters change on a plain model only).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llava_compete.model.build import save_checkpoint
from llava_compete.model.lora import LoraSettings, add_adapters, save_trained
from llava_compete.parts import Part
from llava_compete.train.config import PartTraining

ADAPTER_DIR = "adapter"


def with_adapters(model: Any, trainable: Mapping[Part, PartTraining]) -> Any:
    """`model`, or peft's wrapper of it when a part trains by LoRA."""
    parts: dict[Part, LoraSettings] = {
        part: LoraSettings(setting.lora_rank, setting.lora_alpha, setting.lora_dropout)
        for part, setting in trainable.items()
        if setting.mode == "lora"
    }
    return add_adapters(model, parts) if parts else model


def save_merged(
    base: Any, trainable: Mapping[Part, PartTraining], state_dict: dict[str, Tensor], processor: Any, directory: Path
) -> None:
    """Write the plain checkpoint of `base` with the trained tensors of `state_dict`, and the adapters beside it.

    Args:
        base: the model as the stage began with it, on the CPU.
        state_dict: what the stage trained, named as in peft's model.
    """
    wrapped = with_adapters(base, trainable)
    result = wrapped.load_state_dict(state_dict, strict=False)
    lost = [name for name in result.missing_keys if "lora_" in name]
    if lost or result.unexpected_keys:
        raise RuntimeError(f"adapters do not fit the base model: {(lost + result.unexpected_keys)[:3]}")
    wrapped.save_pretrained(directory / ADAPTER_DIR)
    save_trained(directory / ADAPTER_DIR, state_dict)
    save_checkpoint(wrapped.merge_and_unload(), processor, directory)
