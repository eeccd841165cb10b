"""The chosen experts by grouped products: one kernel multiplies each expert's rows by that expert's matrix.

`DispatchUp` and `DownCombine` are the two linear maps of the MLP with the passages around them, and the activation
stands between them. Nothing waits for the device and the number of operators does not depend on E. Each is one
autograd node for two reasons: it saves the packed parameter itself (a saved view would keep ZeRO-3's gathered weights
alive), and biases need no row of their own for each pair. Suffixes: P pairs sorted by expert, T tokens, K choices, E
experts, D in, M = I or 2 I hidden rows, I hidden, O out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from llava_compete.moe.pairs import Pairs, row_products, spread_rows, sum_rows

ALIGNMENT_BYTES = 16


def fits_grouped_mm(dtype: torch.dtype, *widths: int) -> bool:
    """Whether rows of these widths begin at multiples of 16 bytes, as grouped_mm demands on every device."""
    return dtype.itemsize in (2, 4) and all(width * dtype.itemsize % ALIGNMENT_BYTES == 0 for width in widths)


def aligned(weight: Tensor) -> Tensor:
    """The weight, or a copy where it begins between multiples of 16 bytes: DeepSpeed lays parameters end to end in flat
    buffers, and a cosine router of E = 2 mod 4 experts has an odd number of them."""
    return weight if weight.storage_offset() * weight.element_size() % ALIGNMENT_BYTES == 0 else weight.clone()


class DispatchUp(torch.autograd.Function):
    """Tokens x [T, D] -> pre-activations of each pair, [P, M].

    A bias rides as more input columns, as many as fill 16 bytes. Each has the value 1 over their number, a power of
    two, so that their products add up to the bias, and exactly: in the float32 accumulator. The bias's gradient, a sum
    over an expert's rows, then is a column of the weight's gradient, times their number.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_EMD: Tensor, bias_EM: Tensor | None, pairs: Pairs) -> Tensor:
        ctx.width, ctx.extra = x_TD.shape[1], ALIGNMENT_BYTES // x_TD.element_size()
        weight_EMH = weight_EMD
        if bias_EM is not None:
            ones_TX = x_TD.new_full((1, 1), 1 / ctx.extra).expand(len(x_TD), ctx.extra)
            x_TD = torch.cat([x_TD, ones_TX], 1)
            weight_EMH = torch.cat([weight_EMD, bias_EM[:, :, None].expand(*bias_EM.shape, ctx.extra)], 2)
        x_PH = x_TD.index_select(0, pairs.token_P)
        ctx.save_for_backward(x_PH, weight_EMD)
        ctx.pairs = pairs
        return F.grouped_mm(x_PH, weight_EMH.transpose(1, 2), offs=pairs.ends_E)

    @staticmethod
    def backward(ctx: Any, grad_PM: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x_PH, weight_EMD = ctx.saved_tensors
        x_wanted, weight_wanted, bias_wanted, _ = ctx.needs_input_grad
        grad_PM, ends_E = grad_PM.contiguous(), ctx.pairs.ends_E
        grad_x_TD = grad_weight_EMD = grad_bias_EM = None
        if x_wanted:
            grad_x_TD = sum_rows(F.grouped_mm(grad_PM, weight_EMD, offs=ends_E), ctx.pairs)
        if weight_wanted or bias_wanted:
            grad_EMH = F.grouped_mm(grad_PM.t(), x_PH, offs=ends_E)
            grad_weight_EMD = grad_EMH[:, :, : ctx.width].contiguous() if weight_wanted else None
            grad_bias_EM = grad_EMH[:, :, ctx.width] * ctx.extra if bias_wanted else None
        return grad_x_TD, grad_weight_EMD, grad_bias_EM, None


def dispatch_up(x_TD: Tensor, weight_EMD: Tensor, bias_EM: Tensor | None, pairs: Pairs) -> Tensor:
    """`DispatchUp`, or at inference the same without its copy of the weights: few tokens are decoded at a time."""
    if torch.is_grad_enabled():
        return DispatchUp.apply(x_TD, weight_EMD, bias_EM, pairs)
    up_PM = F.grouped_mm(x_TD.index_select(0, pairs.token_P), weight_EMD.transpose(1, 2), offs=pairs.ends_E)
    return up_PM if bias_EM is None else up_PM.add_(bias_EM.index_select(0, pairs.expert_P.int()))


class DownCombine(torch.autograd.Function):
    """Hidden states of each pair, [P, I] -> weighted sums over each token's choices, [T, O].

    sum_k w_k (h_k V_e + b_e) = sum_k w_k h_k V_e + (gates b), where gates [T, E] hold a token's weights at its chosen
    experts: biases cost a product of [T, E] with [E, O], never a row for each pair.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_PI: Tensor,
        weight_EOI: Tensor,
        bias_EO: Tensor | None,
        weights_TK: Tensor,
        selected_TK: Tensor,
        pairs: Pairs,
    ) -> Tensor:
        y_PO = F.grouped_mm(h_PI, weight_EOI.transpose(1, 2), offs=pairs.ends_E)
        output_TO = sum_rows(y_PO, pairs, weights_TK)
        gates_TE = None
        if bias_EO is not None:
            gates_TE = weights_TK.new_zeros(weights_TK.shape[0], bias_EO.shape[0]).scatter_(1, selected_TK, weights_TK)
            output_TO = torch.addmm(output_TO, gates_TE, bias_EO)
        ctx.save_for_backward(h_PI, weight_EOI, bias_EO, weights_TK, selected_TK, y_PO, gates_TE)
        ctx.pairs = pairs
        return output_TO

    @staticmethod
    def backward(
        ctx: Any, grad_TO: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None, None]:
        h_PI, weight_EOI, bias_EO, weights_TK, selected_TK, y_PO, gates_TE = ctx.saved_tensors
        h_wanted, weight_wanted, bias_wanted, weights_wanted, *_ = ctx.needs_input_grad
        pairs: Pairs = ctx.pairs
        grad_TO = grad_TO.contiguous()
        grad_h_PI = grad_weight_EOI = grad_bias_EO = grad_weights_TK = None
        grad_y_PO = spread_rows(grad_TO, pairs, weights_TK)
        if h_wanted:
            grad_h_PI = F.grouped_mm(grad_y_PO, weight_EOI, offs=pairs.ends_E)
        if weight_wanted:
            grad_weight_EOI = F.grouped_mm(grad_y_PO.t(), h_PI, offs=pairs.ends_E)
        if bias_wanted:
            grad_bias_EO = gates_TE.t() @ grad_TO
        if weights_wanted:
            grad_weights_TK = row_products(grad_TO, y_PO, pairs)
            if bias_EO is not None:
                grad_weights_TK = grad_weights_TK + (grad_TO @ bias_EO.t()).gather(1, selected_TK)
        return grad_h_PI, grad_weight_EOI, grad_bias_EO, grad_weights_TK, None, None


# torch's FLOP counter passes its own grouped product over.
if torch.ops.aten._grouped_mm not in flop_registry:

    @register_flop_formula(torch.ops.aten._grouped_mm)
    def _grouped_mm_flops(left_shape: Any, right_shape: Any, *_: Any, **__: Any) -> int:
        """Each row of the left meets one group's matrix; in a weight's gradient each of its columns meets one row."""
        rows, inner = left_shape
        return 2 * rows * inner * right_shape[-1]
