"""Arithmetic in the dtypes that tensors have, also where the caller works under autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from llava_compete.errors import UserError


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast off inside. Entering torch's own context costs a GPU's host as much as some launches, so only if on;
    the meta device has none."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def compute_dtype(x_TD: Tensor, parameter: Tensor) -> torch.dtype:
    """In which experts work: autocast's where it is on, else that of tokens and parameters alike."""
    if x_TD.device.type != "meta" and torch.is_autocast_enabled(x_TD.device.type):
        return torch.get_autocast_dtype(x_TD.device.type)
    if x_TD.dtype != parameter.dtype:
        raise UserError(f"dtype: MoE input is {x_TD.dtype}, its experts are {parameter.dtype}; use one or autocast")
    return parameter.dtype
