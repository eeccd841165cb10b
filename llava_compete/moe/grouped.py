"""Matrix products with packed expert weights [E, out, in], written so that every expert gets a gradient.

Each product is one autograd node: it saves the packed parameter itself (a saved view would keep ZeRO-3's gathered
weights alive), writes each expert's gradient in place into one packed tensor, and zeros for an expert without rows.
Called by `experts.py`. Suffixes: P rows sorted by expert, T tokens, E experts, M out, H in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


class Pairs(NamedTuple):
    """(token, choice) pairs sorted by expert; equal experts keep the order of tokens."""

    order_P: Tensor  # flat index t * K + k of each sorted pair
    token_P: Tensor
    place_TK: Tensor  # where each pair went: the inverse of `order_P`
    ends_E: Tensor  # expert e's pairs are ends[e - 1]:ends[e]

    @classmethod
    def sort(cls, selected_TK: Tensor, num_experts: int) -> Pairs:
        experts_P, order_P = torch.sort(selected_TK.reshape(-1), stable=True)
        positions_P = torch.arange(order_P.shape[0], device=order_P.device)
        place_P = torch.empty_like(order_P).scatter_(0, order_P, positions_P)
        experts_E = torch.arange(num_experts, device=order_P.device)
        ends_E = torch.searchsorted(experts_P, experts_E, right=True)
        return cls(order_P, order_P // selected_TK.shape[1], place_P.view(selected_TK.shape), ends_E)


@torch.library.custom_op("llava_compete::grouped_linear", mutates_args=())
def grouped_linear(x_PH: Tensor, weight_EMH: Tensor, bias_EM: Tensor | None, ends_E: Tensor) -> Tensor:
    """Rows `ends[e-1]:ends[e]` of x through expert e's linear map; an operator, so that torch.compile sees one node."""
    out_PM = x_PH.new_empty(x_PH.shape[0], weight_EMH.shape[1])
    for expert, rows in expert_slices(ends_E):
        linear_into(x_PH[rows], weight_EMH[expert], None if bias_EM is None else bias_EM[expert], out_PM[rows])
    return out_PM


@grouped_linear.register_fake
def _(x_PH: Tensor, weight_EMH: Tensor, bias_EM: Tensor | None, ends_E: Tensor) -> Tensor:
    return x_PH.new_empty(x_PH.shape[0], weight_EMH.shape[1])


@torch.library.custom_op("llava_compete::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(
    grad_PM: Tensor, x_PH: Tensor, weight_EMH: Tensor, ends_E: Tensor, weight_wanted: bool, bias_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """An operator cannot return None: a gradient that is not wanted (frozen experts) has no elements."""
    grad_x_PH = torch.empty_like(x_PH)
    grad_weight_EMH = weight_EMH.new_empty(weight_EMH.shape if weight_wanted else 0)
    grad_bias_EM = grad_PM.new_empty(weight_EMH.shape[:2] if bias_wanted else 0)
    for expert, rows in expert_slices(ends_E):
        torch.mm(grad_PM[rows], weight_EMH[expert], out=grad_x_PH[rows])
        if weight_wanted:
            torch.mm(grad_PM[rows].t(), x_PH[rows], out=grad_weight_EMH[expert])
        if bias_wanted:
            torch.sum(grad_PM[rows], 0, out=grad_bias_EM[expert])
    return grad_x_PH, grad_weight_EMH, grad_bias_EM


@_grouped_linear_backward.register_fake
def _(
    grad_PM: Tensor, x_PH: Tensor, weight_EMH: Tensor, ends_E: Tensor, weight_wanted: bool, bias_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight_EMH = weight_EMH.new_empty(weight_EMH.shape if weight_wanted else 0)
    return torch.empty_like(x_PH), grad_weight_EMH, grad_PM.new_empty(weight_EMH.shape[:2] if bias_wanted else 0)


def _save_grouped(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor], output: Tensor) -> None:
    x_PH, weight_EMH, _, ends_E = inputs
    ctx.save_for_backward(x_PH, weight_EMH, ends_E)


def _grouped_gradients(ctx: Any, grad_PM: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
    _, weight_wanted, bias_wanted, _ = ctx.needs_input_grad
    grad_x_PH, grad_weight_EMH, grad_bias_EM = _grouped_linear_backward(
        grad_PM, *ctx.saved_tensors, weight_wanted, bias_wanted
    )
    return grad_x_PH, grad_weight_EMH if weight_wanted else None, grad_bias_EM if bias_wanted else None, None


grouped_linear.register_autograd(_grouped_gradients, setup_context=_save_grouped)


# torch's FLOP counter sees an operator, not the products inside: each row meets one expert's matrix.
@register_flop_formula(torch.ops.llava_compete.grouped_linear)
def _grouped_flops(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.llava_compete.grouped_linear_backward)
def _grouped_backward_flops(
    grad_shape: Any, x_shape: Any, weight_shape: Any, ends_shape: Any, weight_wanted: bool, *_: Any, **__: Any
) -> int:
    return (1 + weight_wanted) * _grouped_flops(x_shape, weight_shape)


def expert_slices(ends_E: Tensor) -> list[tuple[int, slice]]:
    """(expert, its rows). The one place that reads values on the host."""
    ends = ends_E.tolist()
    return [(expert, slice(start, end)) for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))]


def linear_into(x_PH: Tensor, weight_MH: Tensor, bias_M: Tensor | None, out_PM: Tensor) -> None:
    if bias_M is None:
        torch.mm(x_PH, weight_MH.t(), out=out_PM)
    else:
        torch.addmm(bias_M, x_PH, weight_MH.t(), out=out_PM)


class AllExpertsUp(torch.autograd.Function):
    """[T, H] through every expert's [M, H] as one large product -> [T, E, M]; its gradient never holds [E, T, H]."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_EMH: Tensor, bias_EM: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TH, weight_EMH)
        bias_F = None if bias_EM is None else bias_EM.flatten()
        return F.linear(x_TH, weight_EMH.flatten(0, 1), bias_F).unflatten(1, weight_EMH.shape[:2])

    @staticmethod
    def backward(ctx: Any, grad_TEM: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x_TH, weight_EMH = ctx.saved_tensors
        _, weight_wanted, bias_wanted = ctx.needs_input_grad
        grad_TF = grad_TEM.reshape(grad_TEM.shape[0], -1)
        grad_weight_EMH = (grad_TF.t() @ x_TH).view_as(weight_EMH) if weight_wanted else None
        return grad_TF @ weight_EMH.flatten(0, 1), grad_weight_EMH, grad_TEM.sum(0) if bias_wanted else None


class Dispatch(torch.autograd.Function):
    """[T, H] -> the row of each (token, choice) pair in `order_P`; the gradient gathers, and so is deterministic."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return x_TH.index_select(0, pairs.token_P)

    @staticmethod
    def backward(ctx: Any, grad_PH: Tensor) -> tuple[Tensor, None]:
        return F.embedding_bag(ctx.pairs.place_TK, grad_PH, mode="sum"), None


class Combine(torch.autograd.Function):
    """Sum over a token's choices of weight x row: one fused gather, where a product would write [T, K, O] first."""

    @staticmethod
    def forward(ctx: Any, y_PO: Tensor, weights_TK: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(y_PO, weights_TK)
        ctx.pairs = pairs
        return F.embedding_bag(pairs.place_TK, y_PO, per_sample_weights=weights_TK, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, Tensor, None]:
        y_PO, weights_TK = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        grad_TO = grad_TO.contiguous()
        grad_y_PO = grad_TO.index_select(0, pairs.token_P)
        grad_y_PO.mul_(weights_TK.reshape(-1, 1).index_select(0, pairs.order_P))
        return grad_y_PO, row_products(grad_TO, y_PO, pairs.place_TK), None


def row_products(left_TO: Tensor, right_PO: Tensor, rows_TK: Tensor) -> Tensor:
    """[T, K]: the inner product of row t of `left` with row `rows[t, k]` of `right`, without gathering those rows."""
    num_tokens, num_chosen = rows_TK.shape
    tokens_T = torch.arange(num_tokens, device=rows_TK.device)
    products_P = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left_TO, right_PO, rows_TK.reshape(-1), tokens_T * num_chosen, tokens_T.repeat_interleave(num_chosen), 0
    )
    return products_P.view(num_tokens, num_chosen)
