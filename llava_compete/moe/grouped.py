"""Matrix products with packed expert weights [E, out, in], written so that every expert gets a gradient.

Each product is one autograd node: it saves the packed parameter itself (a saved view would keep ZeRO-3's gathered
weights alive), writes each expert's gradient in place into one packed tensor, and zeros for an expert without rows.
Called by `experts.py`. Suffixes: P rows sorted by expert, T tokens, E experts, M out, H in.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("llava_compete::grouped_linear", mutates_args=())
def grouped_linear(x_PH: Tensor, weight_EMH: Tensor, bias_EM: Tensor | None, ends_E: Tensor) -> Tensor:
    """Rows `ends[e-1]:ends[e]` of x through expert e's linear map; an operator, so that torch.compile sees one node."""
    out_PM = x_PH.new_empty(x_PH.shape[0], weight_EMH.shape[1])
    for expert, rows in _slices(ends_E):
        _linear(x_PH[rows], weight_EMH[expert], None if bias_EM is None else bias_EM[expert], out_PM[rows])
    return out_PM


@grouped_linear.register_fake
def _(x_PH: Tensor, weight_EMH: Tensor, bias_EM: Tensor | None, ends_E: Tensor) -> Tensor:
    return x_PH.new_empty(x_PH.shape[0], weight_EMH.shape[1])


@torch.library.custom_op("llava_compete::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(
    grad_PM: Tensor, x_PH: Tensor, weight_EMH: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x_PH, grad_weight_EMH = torch.empty_like(x_PH), torch.empty_like(weight_EMH)
    grad_bias_EM = grad_PM.new_empty(weight_EMH.shape[:2])
    for expert, rows in _slices(ends_E):
        torch.mm(grad_PM[rows], weight_EMH[expert], out=grad_x_PH[rows])
        torch.mm(grad_PM[rows].t(), x_PH[rows], out=grad_weight_EMH[expert])
        torch.sum(grad_PM[rows], 0, out=grad_bias_EM[expert])
    return grad_x_PH, grad_weight_EMH, grad_bias_EM


@_grouped_linear_backward.register_fake
def _(grad_PM: Tensor, x_PH: Tensor, weight_EMH: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x_PH), torch.empty_like(weight_EMH), grad_PM.new_empty(weight_EMH.shape[:2])


def _save_grouped(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor], output: Tensor) -> None:
    x_PH, weight_EMH, bias_EM, ends_E = inputs
    ctx.has_bias = bias_EM is not None
    ctx.save_for_backward(x_PH, weight_EMH, ends_E)


def _grouped_gradients(ctx: Any, grad_PM: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
    grad_x_PH, grad_weight_EMH, grad_bias_EM = _grouped_linear_backward(grad_PM, *ctx.saved_tensors)
    return grad_x_PH, grad_weight_EMH, grad_bias_EM if ctx.has_bias else None, None


grouped_linear.register_autograd(_grouped_gradients, setup_context=_save_grouped)


def _slices(ends_E: Tensor) -> list[tuple[int, slice]]:
    """(expert, its rows). The one place that reads values on the host: this path is the CPU's."""
    ends = ends_E.tolist()
    return [(expert, slice(start, end)) for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))]


def _linear(x_PH: Tensor, weight_MH: Tensor, bias_M: Tensor | None, out_PM: Tensor) -> None:
    if bias_M is None:
        torch.mm(x_PH, weight_MH.t(), out=out_PM)
    else:
        torch.addmm(bias_M, x_PH, weight_MH.t(), out=out_PM)


class AllExpertsUp(torch.autograd.Function):
    """[T, H] through every expert's [M, H] as one large product -> [T, E, M]; its gradient never holds [E, T, H]."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_EMH: Tensor, bias_EM: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TH, weight_EMH)
        ctx.has_bias = bias_EM is not None
        bias_F = None if bias_EM is None else bias_EM.flatten()
        return F.linear(x_TH, weight_EMH.flatten(0, 1), bias_F).unflatten(1, weight_EMH.shape[:2])

    @staticmethod
    def backward(ctx: Any, grad_TEM: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x_TH, weight_EMH = ctx.saved_tensors
        grad_TF = grad_TEM.reshape(grad_TEM.shape[0], -1)
        grad_bias_EM = grad_TEM.sum(0) if ctx.has_bias else None
        return grad_TF @ weight_EMH.flatten(0, 1), (grad_TF.t() @ x_TH).view_as(weight_EMH), grad_bias_EM


class AllExpertsDown(torch.autograd.Function):
    """[T, E, H] through each expert's own [M, H] -> [E, T, M], without a transposed copy."""

    @staticmethod
    def forward(ctx: Any, h_TEH: Tensor, weight_EMH: Tensor, bias_EM: Tensor | None) -> Tensor:
        ctx.save_for_backward(h_TEH, weight_EMH)
        ctx.has_bias = bias_EM is not None
        out_ETM = h_TEH.new_empty(weight_EMH.shape[0], h_TEH.shape[0], weight_EMH.shape[1])
        for expert in range(weight_EMH.shape[0]):
            _linear(h_TEH[:, expert], weight_EMH[expert], None if bias_EM is None else bias_EM[expert], out_ETM[expert])
        return out_ETM

    @staticmethod
    def backward(ctx: Any, grad_ETM: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        h_TEH, weight_EMH = ctx.saved_tensors
        grad_h_TEH, grad_weight_EMH = torch.empty_like(h_TEH), torch.empty_like(weight_EMH)
        for expert in range(weight_EMH.shape[0]):
            torch.mm(grad_ETM[expert], weight_EMH[expert], out=grad_h_TEH[:, expert])
            torch.mm(grad_ETM[expert].t(), h_TEH[:, expert], out=grad_weight_EMH[expert])
        return grad_h_TEH, grad_weight_EMH, grad_ETM.sum(1) if ctx.has_bias else None


class Dispatch(torch.autograd.Function):
    """[T, H] -> the rows of each (token, choice) pair in `order_P`; the gradient gathers, and so is deterministic."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, order_P: Tensor, place_P: Tensor, num_chosen: int) -> Tensor:
        ctx.save_for_backward(place_P)
        ctx.num_chosen = num_chosen
        return x_TH[order_P // num_chosen]

    @staticmethod
    def backward(ctx: Any, grad_PH: Tensor) -> tuple[Tensor, None, None, None]:
        (place_P,) = ctx.saved_tensors
        return grad_PH[place_P].unflatten(0, (-1, ctx.num_chosen)).sum(1), None, None, None


class Permute(torch.autograd.Function):
    """Rows in the order `index_P`, of which `inverse_P` is the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, x_PH: Tensor, index_P: Tensor, inverse_P: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_P)
        return x_PH[index_P]

    @staticmethod
    def backward(ctx: Any, grad_PH: Tensor) -> tuple[Tensor, None, None]:
        (inverse_P,) = ctx.saved_tensors
        return grad_PH[inverse_P], None, None
