"""The chosen experts by one matrix product an expert (`experts_implementation: eager`), which is fastest on CPUs.

It reads how many rows each expert has on the host. Two operators, so that torch.compile sees one node each: they write
each expert's gradient in place into one packed tensor, and zeros for an expert without rows. Suffixes: P pairs sorted
by expert, E experts, M out, H in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("llava_compete::grouped_linear", mutates_args=())
def grouped_linear(x_PH: Tensor, weight_EMH: Tensor, bias_EM: Tensor | None, ends_E: Tensor) -> Tensor:
    """Rows `ends[e-1]:ends[e]` of x through expert e's linear map, 0 for the rows after the last expert's; an operator,
    so that torch.compile sees one node."""
    out_PM = x_PH.new_empty(x_PH.shape[0], weight_EMH.shape[1])
    for expert, rows in expert_slices(ends_E):
        if rows.start == rows.stop:
            continue
        if bias_EM is None:
            torch.mm(x_PH[rows], weight_EMH[expert].t(), out=out_PM[rows])
        else:
            torch.addmm(bias_EM[expert], x_PH[rows], weight_EMH[expert].t(), out=out_PM[rows])
    out_PM[rows.stop :] = 0
    return out_PM


@grouped_linear.register_fake
def _(x_PH: Tensor, weight_EMH: Tensor, bias_EM: Tensor | None, ends_E: Tensor) -> Tensor:
    return x_PH.new_empty(x_PH.shape[0], weight_EMH.shape[1])


@torch.library.custom_op("llava_compete::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(
    grad_PM: Tensor, x_PH: Tensor | None, weight_EMH: Tensor, ends_E: Tensor, bias_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Without x, of which nothing is kept where the weight is frozen, only that of x and perhaps the bias. An operator
    cannot return None: a gradient that is not wanted has no elements."""
    grad_x_PH = grad_PM.new_empty(grad_PM.shape[0], weight_EMH.shape[2])
    grad_weight_EMH = weight_EMH.new_empty(0 if x_PH is None else weight_EMH.shape)
    grad_bias_EM = grad_PM.new_empty(weight_EMH.shape[:2] if bias_wanted else 0)
    for expert, rows in expert_slices(ends_E):
        torch.mm(grad_PM[rows], weight_EMH[expert], out=grad_x_PH[rows])
        if x_PH is not None:
            torch.mm(grad_PM[rows].t(), x_PH[rows], out=grad_weight_EMH[expert])
        if bias_wanted:
            torch.sum(grad_PM[rows], 0, out=grad_bias_EM[expert])
    grad_x_PH[rows.stop :] = 0
    return grad_x_PH, grad_weight_EMH, grad_bias_EM


@_grouped_linear_backward.register_fake
def _(
    grad_PM: Tensor, x_PH: Tensor | None, weight_EMH: Tensor, ends_E: Tensor, bias_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x_PH = grad_PM.new_empty(grad_PM.shape[0], weight_EMH.shape[2])
    grad_weight_EMH = weight_EMH.new_empty(0 if x_PH is None else weight_EMH.shape)
    return grad_x_PH, grad_weight_EMH, grad_PM.new_empty(weight_EMH.shape[:2] if bias_wanted else 0)


def _save_grouped(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor], output: Tensor) -> None:
    x_PH, weight_EMH, _, ends_E = inputs
    ctx.save_for_backward(x_PH if ctx.needs_input_grad[1] else None, weight_EMH, ends_E)


def _grouped_gradients(ctx: Any, grad_PM: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
    _, weight_wanted, bias_wanted, _ = ctx.needs_input_grad
    grad_x_PH, grad_weight_EMH, grad_bias_EM = _grouped_linear_backward(grad_PM, *ctx.saved_tensors, bias_wanted)
    return grad_x_PH, grad_weight_EMH if weight_wanted else None, grad_bias_EM if bias_wanted else None, None


grouped_linear.register_autograd(_grouped_gradients, setup_context=_save_grouped)


# torch's FLOP counter sees an operator, not the products inside: each row meets one expert's matrix.
@register_flop_formula(torch.ops.llava_compete.grouped_linear)
def _grouped_flops(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.llava_compete.grouped_linear_backward)
def _grouped_backward_flops(grad_shape: Any, x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    return (1 if x_shape is None else 2) * _grouped_flops(grad_shape, weight_shape)


def expert_slices(ends_E: Tensor) -> list[tuple[int, slice]]:
    """(expert, its rows). The one place that reads values on the host."""
    ends = ends_E.tolist()
    return [(expert, slice(start, end)) for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))]
