"""All experts on all tokens: one large product for the up projections, one batched product for the down projections.

The number of operators does not depend on E. Each is one autograd node that saves the packed parameter itself, since a
saved view would keep ZeRO-3's gathered weights alive; tokens and hidden states are kept for weights that train alone.
Suffixes: T tokens, E experts, D in, M = I or 2 I hidden rows, I hidden, O out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def all_experts_up(x_TD: Tensor, weight_EMD: Tensor, bias_EM: Tensor | None) -> Tensor:
    """[T, D] through every expert's [M, D] -> [T, E, M]."""
    bias_F = None if bias_EM is None else bias_EM.flatten()
    return F.linear(x_TD, weight_EMD.flatten(0, 1), bias_F).unflatten(1, weight_EMD.shape[:2])


def all_experts_down(h_TEI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
    """Hidden states [T, E, I] through their own expert's [O, I] -> outputs [E, T, O]."""
    h_ETI, weight_EIO = h_TEI.transpose(0, 1), weight_EOI.transpose(1, 2)
    return h_ETI @ weight_EIO if bias_EO is None else torch.baddbmm(bias_EO[:, None], h_ETI, weight_EIO)


def down_input_gradient(grad_ETO: Tensor, weight_EOI: Tensor) -> Tensor:
    """[T, E, I], the layout that the activation and the up projection read: [E, T, I] would be copied to it."""
    if torch.compiler.is_compiling():  # which has no `out=` of such strides, and chooses layouts itself
        return torch.bmm(grad_ETO, weight_EOI).transpose(0, 1)
    num_experts, num_tokens, _ = grad_ETO.shape
    grad_h_TEI = grad_ETO.new_empty(num_tokens, num_experts, weight_EOI.shape[2])
    torch.bmm(grad_ETO, weight_EOI, out=grad_h_TEI.transpose(0, 1))
    return grad_h_TEI


class AllExpertsUp(torch.autograd.Function):
    """`all_experts_up`. Its gradient sums over experts inside the product, where a batched product would write
    [E, T, D] first."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_EMD: Tensor, bias_EM: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TD if ctx.needs_input_grad[1] else None, weight_EMD)
        return all_experts_up(x_TD, weight_EMD, bias_EM)

    @staticmethod
    def backward(ctx: Any, grad_TEM: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_TD, weight_EMD = ctx.saved_tensors
        x_wanted, weight_wanted, bias_wanted = ctx.needs_input_grad
        grad_TF = grad_TEM.flatten(1)
        grad_x_TD = grad_TF @ weight_EMD.flatten(0, 1) if x_wanted else None
        grad_weight_EMD = (grad_TF.t() @ x_TD).view_as(weight_EMD) if weight_wanted else None
        return grad_x_TD, grad_weight_EMD, grad_TEM.sum(0) if bias_wanted else None


class AllExpertsDown(torch.autograd.Function):
    """`all_experts_down`."""

    @staticmethod
    def forward(ctx: Any, h_TEI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
        ctx.save_for_backward(h_TEI if ctx.needs_input_grad[1] else None, weight_EOI)
        return all_experts_down(h_TEI, weight_EOI, bias_EO)

    @staticmethod
    def backward(ctx: Any, grad_ETO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        h_TEI, weight_EOI = ctx.saved_tensors
        h_wanted, weight_wanted, bias_wanted = ctx.needs_input_grad
        grad_h_TEI = down_input_gradient(grad_ETO, weight_EOI) if h_wanted else None
        grad_weight_EOI = grad_ETO.transpose(1, 2) @ h_TEI.transpose(0, 1) if weight_wanted else None
        return grad_h_TEI, grad_weight_EOI, grad_ETO.sum(1) if bias_wanted else None
