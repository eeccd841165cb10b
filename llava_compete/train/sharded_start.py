"""A start under ZeRO-3 where each rank reads its own part of every tensor from the checkpoint, and no rank all of one.

DeepSpeed would have every rank build the whole model, and then broadcast rank 0's tensor by tensor. Here a model whose
weights are still in their files (`model.unread`) is partitioned by DeepSpeed's own code with each part filled from the
file; what is in no file, such as new adapters, is broadcast as ever.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
from torch import nn


def is_unread(model: nn.Module) -> bool:
    """Whether any of its weights are still in files."""
    return any(hasattr(parameter, "stored") for parameter in model.parameters())


def partition(model: nn.Module, config: dict[str, Any]) -> None:
    """Give each rank its part of every parameter of `model`, as ZeRO-3 wants them; all ranks call it.

    config: DeepSpeed's; what is still "auto" in it does not matter here.
    """
    deepspeed.init_distributed()  # takes the group that there is
    _FromFiles(module=model, config_dict_or_path=copy.deepcopy(config))


class _FromFiles(deepspeed.zero.Init):
    """DeepSpeed's partitioning of a module, but for where a part comes from."""

    def _convert_to_zero_parameters(self, param_list: Iterable[Any]) -> None:
        # With neither precision in its config the engine would leave parameters as they are, and `dtype` is float32.
        half = self.dtype if self.dtype in (torch.float16, torch.bfloat16) else None
        for parameter in param_list:
            if hasattr(parameter, "ds_id"):
                continue
            dtype = half if half is not None and parameter.is_floating_point() else parameter.dtype
            if not hasattr(parameter, "stored"):
                parameter.data = parameter.data.to(self.local_device, dtype)
                self._zero_init_param(parameter)
                continue
            # Of memory that is not written to a CPU sets none aside.
            parameter.data = torch.empty(parameter.shape, dtype=dtype, device=self.local_device)
            self._convert_to_deepspeed_param(parameter)
            start, stop = self._own_part(parameter)
            parameter.stored.copy_flat(parameter.data.view(-1)[start:stop], start)
            parameter.partition()
            del parameter.stored
        if self.module is not None:
            for buffer in self.module.buffers():
                buffer.data = buffer.data.to(self.local_device)

    def _own_part(self, parameter: Any) -> tuple[int, int]:
        """From where to where of the flat parameter this rank keeps it."""
        numel = parameter.ds_numel
        if self.zero_param_process_group is not None:  # hpZ keeps a second part, cut otherwise
            return 0, numel
        size = self._aligned_size(parameter) // self._partition_world_size(parameter)
        start = min(size * self._partition_rank(parameter), numel)
        return start, min(start + size, numel)
