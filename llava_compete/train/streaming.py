"""A model directory out of weights that no rank holds whole: gathered tensor by tensor, written shard by shard.

Under ZeRO-3 each parameter is put together from all ranks, and experts that are spread over ranks by the first group of
them. All ranks go through the tensors in one order; rank 0 holds one shard of them at a time, the others their parts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus
from torch import Tensor

from llava_compete.model.build import save_checkpoint
from llava_compete.model.checkpoint import MODEL
from llava_compete.model.lora import TRAINED
from llava_compete.model.shards import SHARD_BYTES, PlannedTensor, write_shards
from llava_compete.moe.experts import PackedExperts
from llava_compete.moe.parallel import ExpertRanks


class _Held(NamedTuple):
    """A tensor of the model as this rank has it: `ranks` where it is a part of the experts."""

    tensor: Any
    ranks: ExpertRanks | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        if self.ranks is not None:
            return (self.ranks.num_experts, *self.tensor.shape[1:])
        return tuple(getattr(self.tensor, "ds_shape", self.tensor.shape))

    def whole(self) -> Tensor | None:
        """On rank 0, in memory of its own on the CPU; on other ranks None. All ranks call it."""
        if self.ranks is not None:
            return _on_first(self.tensor.detach().contiguous(), self.ranks)
        if not hasattr(self.tensor, "ds_shape"):
            return self._copied() if _is_first() else None
        if _lies_in_parts(self.tensor):
            return _joined(self.tensor)
        with deepspeed.zero.GatheredParameters([self.tensor]):
            return self._copied() if _is_first() else None

    def _copied(self) -> Tensor:
        return self.tensor.detach().to("cpu", copy=True).contiguous()


@contextmanager
def partitioned(engine: Any, zero_stage: int) -> Iterator[None]:
    """Inside, every parameter is in parts; afterwards those that ZeRO-3 keeps whole are so again."""
    if zero_stage == 3:
        engine.optimizer.checkpoint_event_prologue()
    yield
    if zero_stage == 3:
        engine.optimizer.checkpoint_event_epilogue()


def stream_checkpoint(model: Any, processor: Any, directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """What `save_checkpoint` writes, on rank 0; all ranks call it."""
    held = {name: one for name, one in _held(model) if name not in model.all_tied_weights_keys}
    if _is_first():
        save_checkpoint(model, processor, directory, {})
    _stream(held, directory, shard_bytes, MODEL)


def stream_trained(model: Any, names: Collection[str], directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """All that a stage with adapters trained, on rank 0; all ranks call it.

    peft's own file has no part that trained in full.

    Args:
        names: in peft's `model`, the adapters' too.
    """
    _stream({name: one for name, one in _held(model) if name in names}, directory, shard_bytes, TRAINED)


def _stream(held: dict[str, _Held], directory: Path, shard_bytes: int, stem: str) -> None:
    if not _is_first():
        for one in held.values():
            one.whole()
        return
    directory.mkdir(parents=True, exist_ok=True)
    planned = {name: PlannedTensor(one.shape, one.tensor.dtype, partial(_made, one)) for name, one in held.items()}
    write_shards(directory, planned, shard_bytes, stem=stem)


def _made(held: _Held) -> Tensor:
    whole = held.whole()
    assert whole is not None
    return whole


def _held(model: Any) -> Iterator[tuple[str, _Held]]:
    """By name, in the order of a state dict."""
    for path, module in model.named_modules():
        ranks = module.ranks if isinstance(module, PackedExperts) else None
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{path}.{name}".lstrip("."), _Held(parameter, ranks)
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}".lstrip("."), _Held(buffer, None)


def _lies_in_parts(parameter: Any) -> bool:
    """Whether all ranks have plain parts of it at hand: not read from disks, not quantised, not whole just now."""
    part = parameter.ds_tensor
    return (
        parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE
        and part.status == PartitionedParamStatus.AVAILABLE
        and not hasattr(part, "ds_quant_scale")
        and dist.get_world_size(parameter.ds_process_group) == dist.get_world_size()
    )


def _joined(parameter: Any) -> Tensor | None:
    """The parts of all ranks, on rank 0 alone: DeepSpeed's gathering makes it whole on each, on a CPU twice."""
    part, group = parameter.ds_tensor.detach().contiguous(), parameter.ds_process_group
    flat = part.new_empty(len(part) * dist.get_world_size(group)) if _is_first() else None
    dist.gather(part, None if flat is None else list(flat.split(len(part))), dst=0, group=group)
    return None if flat is None else flat[: parameter.ds_numel].view(parameter.ds_shape).cpu()


def _on_first(here: Tensor, ranks: ExpertRanks) -> Tensor | None:
    if dist.get_global_rank(ranks.group, 0) != 0:  # these ranks hold copies
        return None
    parts = [torch.empty_like(here) for _ in range(ranks.size)] if ranks.rank == 0 else None
    dist.gather(here, parts, dst=0, group=ranks.group)
    return None if parts is None else torch.cat([part.cpu() for part in parts])


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
