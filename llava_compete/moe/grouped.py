"""The chosen experts by grouped products: one kernel multiplies each expert's rows by that expert's matrix.

`DispatchUp` and `DownCombine` are the two linear maps of the MLP with the passages around them, and the activation
stands between them. Nothing waits for the device and the number of operators does not depend on E. Each is one
autograd node for two reasons: it saves the packed parameter itself (a saved view would keep ZeRO-3's gathered weights
alive), and both ways through it, by choice and shared, write one gradient. A shared expert, the last, is a dense
product over all tokens beside the grouped one, in which its group is empty. Suffixes: P pairs sorted by expert, T
tokens, C choices, E experts, D in, M = I or 2 I hidden rows, I hidden, O out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from llava_compete.moe.pairs import Pairs, combine_rows, row_products, spread_rows, sum_rows

ALIGNMENT_BYTES = 16


def fits_grouped_mm(dtype: torch.dtype, *widths: int) -> bool:
    """Whether rows of these widths begin at multiples of 16 bytes, as grouped_mm demands on every device."""
    return dtype.itemsize in (2, 4) and all(width * dtype.itemsize % ALIGNMENT_BYTES == 0 for width in widths)


def aligned(weight: Tensor) -> Tensor:
    """The weight, or a copy where it begins between multiples of 16 bytes: DeepSpeed lays parameters end to end in flat
    buffers, and a cosine router of E = 2 mod 4 experts has an odd number of them."""
    return weight if weight.storage_offset() * weight.element_size() % ALIGNMENT_BYTES == 0 else weight.clone()


class DispatchUp(torch.autograd.Function):
    """Tokens x [T, D] -> pre-activations of each pair, [P, M], and of a shared expert [T, M] (else None)."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_EMD: Tensor,
        bias_EM: Tensor | None,
        pairs: Pairs,
        marks_PE: Tensor | None,
        has_shared: bool,
    ) -> tuple[Tensor, Tensor | None]:
        x_PD = x_TD.index_select(0, pairs.token_P)
        up_PM = _add_biases(_grouped(x_PD, weight_EMD.transpose(1, 2), pairs), marks_PE, bias_EM)
        up_TM = _last_expert(x_TD, weight_EMD, bias_EM) if has_shared else None
        weight_wanted = ctx.needs_input_grad[1]  # tokens are read for that gradient alone
        ctx.save_for_backward(
            x_PD if weight_wanted else None, x_TD if weight_wanted and has_shared else None, weight_EMD, marks_PE
        )
        ctx.pairs, ctx.has_shared = pairs, has_shared
        return up_PM, up_TM

    @staticmethod
    def backward(
        ctx: Any, grad_PM: Tensor, grad_TM: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        x_PD, x_TD, weight_EMD, marks_PE = ctx.saved_tensors
        x_wanted, weight_wanted, bias_wanted, *_ = ctx.needs_input_grad
        grad_PM, ends_E = grad_PM.contiguous(), ctx.pairs.ends_E
        grad_x_TD: Any = None
        grad_weight_EMD: Any = None
        grad_bias_EM: Any = None
        if x_wanted:
            grad_x_TD = sum_rows(_grouped(grad_PM, weight_EMD, ctx.pairs), ctx.pairs)
            if ctx.has_shared:
                grad_x_TD.addmm_(grad_TM, weight_EMD[-1])
        if weight_wanted:
            grad_weight_EMD = F.grouped_mm(grad_PM.t(), x_PD, offs=ends_E)
            if ctx.has_shared:
                torch.mm(grad_TM.t(), x_TD, out=grad_weight_EMD[-1])
        if bias_wanted:
            grad_bias_EM = marks_PE.t() @ grad_PM
            if ctx.has_shared:
                torch.sum(grad_TM, 0, out=grad_bias_EM[-1])
        return grad_x_TD, grad_weight_EMD, grad_bias_EM, None, None, None


class DownCombine(torch.autograd.Function):
    """Hidden states of each pair, [P, I], and a shared expert's, [T, I] -> weighted sums by token, [T, O]."""

    @staticmethod
    def forward(
        ctx: Any,
        h_PI: Tensor,
        h_TI: Tensor | None,
        weight_EOI: Tensor,
        bias_EO: Tensor | None,
        weights_TC: Tensor,
        pairs: Pairs,
        marks_PE: Tensor | None,
        shared_weight: float,
    ) -> Tensor:
        y_PO = _add_biases(_grouped(h_PI, weight_EOI.transpose(1, 2), pairs), marks_PE, bias_EO)
        output_TO, rows = combine_rows(y_PO, pairs, weights_TC)
        if h_TI is not None:
            output_TO = torch.lerp(output_TO, _last_expert(h_TI, weight_EOI, bias_EO), shared_weight)
        _, _, weight_wanted, _, weights_wanted, *_ = ctx.needs_input_grad
        hidden = (h_PI, h_TI) if weight_wanted else (None, None)  # read for that gradient alone
        ctx.save_for_backward(*hidden, weight_EOI, marks_PE, weights_TC, rows if weights_wanted else None)
        ctx.pairs, ctx.shared_weight, ctx.has_shared = pairs, shared_weight, h_TI is not None
        return output_TO

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        h_PI, h_TI, weight_EOI, marks_PE, weights_TC, rows = ctx.saved_tensors
        h_wanted, shared_wanted, weight_wanted, bias_wanted, weights_wanted, *_ = ctx.needs_input_grad
        pairs: Pairs = ctx.pairs
        grad_shared_TO: Any = grad_TO * ctx.shared_weight if ctx.has_shared else None
        grad_TO = grad_TO * (1 - ctx.shared_weight) if ctx.has_shared else grad_TO.contiguous()
        grad_h_PI = grad_h_TI = grad_weight_EOI = grad_bias_EO = grad_weights_TC = None
        grad_y_PO = spread_rows(grad_TO, pairs, weights_TC)
        if h_wanted:
            grad_h_PI = _grouped(grad_y_PO, weight_EOI, pairs)
        if shared_wanted:
            grad_h_TI = grad_shared_TO @ weight_EOI[-1]
        if weight_wanted:
            grad_weight_EOI = F.grouped_mm(grad_y_PO.t(), h_PI, offs=pairs.ends_E)
            if ctx.has_shared:
                torch.mm(grad_shared_TO.t(), h_TI, out=grad_weight_EOI[-1])
        if bias_wanted:
            grad_bias_EO = marks_PE.t() @ grad_y_PO
            if ctx.has_shared:
                torch.sum(grad_shared_TO, 0, out=grad_bias_EO[-1])
        if weights_wanted:
            grad_weights_TC = row_products(grad_TO, rows, pairs)
        return grad_h_PI, grad_h_TI, grad_weight_EOI, grad_bias_EO, grad_weights_TC, None, None, None


def _grouped(rows_PH: Tensor, weight_EHM: Tensor, pairs: Pairs) -> Tensor:
    return pairs.of_experts(F.grouped_mm(rows_PH, weight_EHM, offs=pairs.ends_E))


def _add_biases(rows_PH: Tensor, marks_PE: Tensor | None, bias_EH: Tensor | None) -> Tensor:
    """In place, by a product: `bias[expert]` would write a row for each pair first."""
    if bias_EH is None:
        return rows_PH
    assert marks_PE is not None
    return rows_PH.addmm_(marks_PE, bias_EH)


def _last_expert(x_TH: Tensor, weight_EMH: Tensor, bias_EM: Tensor | None) -> Tensor:
    return F.linear(x_TH, weight_EMH[-1], None if bias_EM is None else bias_EM[-1])


# torch's FLOP counter passes its own grouped product over.
if torch.ops.aten._grouped_mm not in flop_registry:

    @register_flop_formula(torch.ops.aten._grouped_mm)
    def _grouped_mm_flops(left_shape: Any, right_shape: Any, *_: Any, **__: Any) -> int:
        """Each row of the left meets one group's matrix; in a weight's gradient each of its columns meets one row."""
        rows, inner = left_shape
        return 2 * rows * inner * right_shape[-1]
