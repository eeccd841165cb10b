"""In which dtype a mixture computes: its own or autocast's for experts, float32 for routers.

Suffixes: T tokens, D width, R rows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
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


def float32_linear(x_TD: Tensor, weight_RD: Tensor) -> Tensor:
    """[T, D] through [R, D], in float32 whatever the dtypes; for its backward keeps x as it is, and no copy of it."""
    weight_RD = weight_RD.float()
    if x_TD.dtype.itemsize >= 4 or not torch.is_grad_enabled():
        return F.linear(x_TD.float(), weight_RD)
    return _Float32Linear.apply(x_TD, weight_RD)


class _Float32Linear(torch.autograd.Function):
    """`F.linear(x.float(), weight)` and its gradients to the bit; autograd would keep `x.float()`, twice the bytes.

    The weight comes in float32 already: a copy of it is small, and ZeRO-3 may have taken the weight itself away.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_RD: Tensor) -> Tensor:
        x_wanted, weight_wanted = ctx.needs_input_grad
        ctx.save_for_backward(x_TD if weight_wanted else None, weight_RD if x_wanted else None)
        ctx.dtype = x_TD.dtype
        return F.linear(x_TD.float(), weight_RD)

    @staticmethod
    def backward(ctx: Any, grad_TR: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, weight_RD = ctx.saved_tensors
        grad_x_TD = None if weight_RD is None else (grad_TR @ weight_RD).to(ctx.dtype)
        return grad_x_TD, None if x_TD is None else grad_TR.t() @ x_TD.float()
