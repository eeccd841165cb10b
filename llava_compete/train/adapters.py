"""LoRA in a stage: adapters on the parts that say `lora`, and a plain checkpoint with the adapters merged at the end.

The adapters themselves are model/lora.py's. Merging happens on rank 0 in host memory, on the base model as the stage
began with it, so that it is the same for every ZeRO stage (design rule 6: parameters change on a plain model only); one
adapted layer at a time, out of the files in which base and trained tensors lie, so that a model is never whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from llava_compete.model.build import save_checkpoint
from llava_compete.model.checkpoint import read_weight_headers
from llava_compete.model.lora import TRAINED, LoraSettings, add_adapters
from llava_compete.model.shards import SHARD_BYTES, PlannedTensor, write_shards
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


def save_adapters(wrapped: Any, directory: Path) -> None:
    """peft's own files, of the adapters among what `stream_trained` has written into `directory`."""
    stored = read_weight_headers(directory, TRAINED)
    wrapped.save_pretrained(
        directory, state_dict={name: facts.whole() for name, facts in stored.items() if "lora_" in name}
    )


def save_merged(
    base: Any,
    trainable: Mapping[Part, PartTraining],
    processor: Any,
    directory: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the plain checkpoint of `base` with what a stage trained, and peft's adapters beside it.

    Args:
        base: the model as the stage began with it, on the CPU; its weights may still be in their files (`unread`).
        directory: `stream_trained` has written into its ADAPTER_DIR.
    """
    plain = {
        name: tensor
        for name, tensor in base.state_dict(keep_vars=True).items()
        if name not in base.all_tied_weights_keys
    }
    wrapped = with_adapters(base, trainable)
    _put_in_place(wrapped, directory / ADAPTER_DIR)
    save_adapters(wrapped, directory / ADAPTER_DIR)
    save_checkpoint(base, processor, directory, {})
    names = {id(tensor): name for name, tensor in plain.items()}
    layers = {names[id(p)]: layer for layer in _adapted(wrapped) for p in layer.parameters() if id(p) in names}
    merged: dict[str, Tensor] = {}  # of the layer at hand, until they are written

    def make(name: str) -> Tensor:
        if name not in layers:
            return _value(plain[name]).contiguous()
        if name not in merged:
            merged.update(_merge(layers[name], names))
        return merged.pop(name).contiguous()

    planned = {name: PlannedTensor(tuple(t.shape), t.dtype, partial(make, name)) for name, t in plain.items()}
    write_shards(directory, planned, shard_bytes)


def _put_in_place(wrapped: Any, adapter: Path) -> None:
    """Say of each tensor that trained where it lies."""
    tensors: dict[str, Any] = {**dict(wrapped.named_parameters()), **dict(wrapped.named_buffers())}
    trained = read_weight_headers(adapter, TRAINED)
    wrong = [name for name in tensors if "lora_" in name and name not in trained]
    wrong += [name for name, facts in trained.items() if name not in tensors or tensors[name].shape != facts.shape]
    if wrong:
        raise RuntimeError(f"adapters do not fit the base model: {wrong[:3]}")
    for name, facts in trained.items():
        tensors[name].stored = facts


def _adapted(module: nn.Module) -> Iterator[nn.Module]:
    """The layers with adapters, which may have further ones below them."""
    for child in module.children():
        if isinstance(child, BaseTunerLayer):
            yield child
        else:
            yield from _adapted(child)


@torch.no_grad()
def _merge(layer: nn.Module, names: dict[int, str]) -> dict[str, Tensor]:
    """The base model's tensors below a layer, with the updates of its adapters."""
    before = [(parameter, parameter.data) for parameter in layer.parameters()]
    for parameter, _ in before:
        parameter.data = _value(parameter)
    for adapted in layer.modules():
        if isinstance(adapted, BaseTunerLayer) and not adapted.merged:
            adapted.merge()
    found = {names[id(parameter)]: parameter.data for parameter, _ in before if id(parameter) in names}
    for parameter, data in before:
        parameter.data = data
    return found


def _value(tensor: Any) -> Tensor:
    """What is stored of a tensor, in its own dtype; else itself."""
    return tensor.stored.whole().to(tensor.dtype) if hasattr(tensor, "stored") else tensor.data
