"""(token, choice) pairs sorted by expert, and the two passages between tokens and sorted rows.

The sort is a permutation, so every sum over a token's rows and every gradient is a gather through it or its inverse. A
scatter that adds to repeated rows would serialise on a GPU: 8 of 11.7 ms of a block on an H200. Suffixes: T tokens, K
choices of a token, P = T K pairs, E experts, H width, O outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pairs(NamedTuple):
    """Pairs sorted by expert; pairs of one expert keep the order of their tokens. All indices stay on the device.

    Pairs that run no expert come last, as those of a number E; `idle_P1` marks them, None where there are none."""

    expert_P: Tensor  # uint8, or int16 for more than 256 experts
    order_P: Tensor  # flat index t * K + k of each sorted pair
    token_P: Tensor
    row_P: Tensor  # 0, 1, ...
    place_TK: Tensor  # where each pair went: the inverse of `order_P`
    ends_E: Tensor  # int32: expert e's rows are ends[e - 1]:ends[e]
    experts_E: Tensor  # 0, 1, ... in the dtype of `expert_P`
    idle_P1: Tensor | None = None  # bool

    @classmethod
    def sort(cls, selected_TK: Tensor, num_experts: int, has_idle: bool = False) -> Pairs:
        """From `selected_TK`, int64 expert numbers, with `has_idle` also E for none."""
        num_tokens, num_choices = selected_TK.shape
        # A GPU sorts by passes over the key's bytes: one for a byte, eight for an int64.
        keys_P = selected_TK.to(torch.uint8 if num_experts + has_idle <= 256 else torch.int16).reshape(-1)
        expert_P, order_P = torch.sort(keys_P, stable=True)
        row_P = torch.arange(len(order_P), device=order_P.device)
        place_TK = torch.empty_like(order_P).scatter_(0, order_P, row_P).view(num_tokens, num_choices)
        experts_E = torch.arange(num_experts, device=order_P.device, dtype=keys_P.dtype)
        # Ends by bisection: counting (bincount, unique) would read the number of experts' rows on the host.
        ends_E = torch.searchsorted(expert_P, experts_E, right=True, out_int32=True)
        idle_P1 = (expert_P == num_experts).unsqueeze(1) if has_idle else None
        return cls(expert_P, order_P, order_P // num_choices, row_P, place_TK, ends_E, experts_E, idle_P1)

    def of_experts(self, rows_PH: Tensor) -> Tensor:
        """Rows, in place, with 0 in those of no expert, which a grouped product leaves as it found them."""
        return rows_PH if self.idle_P1 is None else rows_PH.masked_fill_(self.idle_P1, 0.0)

    def marks(self, dtype: torch.dtype) -> Tensor:
        """[P, E]: 1 at each pair's expert. A product with it adds a row by expert, its transpose sums by expert."""
        shape = len(self.expert_P), len(self.experts_E)
        marks_PE = torch.empty(shape, dtype=dtype, device=self.expert_P.device)
        return torch.eq(self.expert_P[:, None], self.experts_E, out=marks_PE)


def is_gpu(tensor: Tensor) -> bool:
    """Whether few large kernels are fastest, rather than what stays in a CPU's cache."""
    return tensor.device.type == "cuda"


def rows_by_token(rows_PH: Tensor, pairs: Pairs) -> Tensor:
    """[T, K, H]: the rows of each token's choices."""
    return rows_PH.index_select(0, pairs.place_TK.flatten()).unflatten(0, pairs.place_TK.shape)


def sum_rows(rows_PH: Tensor, pairs: Pairs) -> Tensor:
    """[T, H]: for each token the sum of its rows, added in float32."""
    if is_gpu(rows_PH):
        # The bag below reads two bytes a thread: 0.14 ms where a copy of 38 MB and its sum take 0.05 (H200).
        return rows_by_token(rows_PH, pairs).sum(1)
    return F.embedding_bag(pairs.place_TK, rows_PH, mode="sum")


def combine_rows(y_PO: Tensor, pairs: Pairs, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    """[T, O], for each token the weighted sum of its rows, added in float32; and the rows as `row_products` will read
    them: where they have been copied by token, [T, K, O], a backward need not copy them again."""
    if is_gpu(y_PO):
        rows_TKO = rows_by_token(y_PO, pairs)
        return torch.bmm(weights_TK[:, None], rows_TKO).squeeze(1), rows_TKO
    return F.embedding_bag(pairs.place_TK, y_PO, per_sample_weights=weights_TK, mode="sum"), y_PO


def spread_rows(x_TH: Tensor, pairs: Pairs, weights_TK: Tensor) -> Tensor:
    """[P, H]: the row of each pair's token times the pair's weight; what `combine_rows` does backwards."""
    if not is_gpu(x_TH):  # one tensor of this size, not two, for one small gather more
        weights_P1 = weights_TK.reshape(-1, 1).index_select(0, pairs.order_P)
        return x_TH.index_select(0, pairs.token_P).mul_(weights_P1)
    rows_TKH = x_TH[:, None] * weights_TK[:, :, None]
    return rows_TKH.flatten(0, 1).index_select(0, pairs.order_P)


def row_products(left_TO: Tensor, rows: Tensor, pairs: Pairs) -> Tensor:
    """[T, K]: the inner product of each pair's row with its token's row of `left`, summed in float32; `rows` as
    `combine_rows` gave them."""
    if rows.ndim == 2 and left_TO.dtype.itemsize == 2:
        # The kernel below has no bfloat16.
        rows = rows_by_token(rows, pairs)
    if rows.ndim == 3:
        return torch.bmm(rows, left_TO.unsqueeze(2)).squeeze(2)
    # Neither side's rows are gathered. Of the two last tensors, the bags' offsets and each row's bag, the kernel reads
    # the second alone.
    products_P = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left_TO, rows, pairs.row_P, pairs.token_P, pairs.token_P, 0
    )
    return products_P.index_select(0, pairs.place_TK.flatten()).view(pairs.place_TK.shape)


class Dispatch(torch.autograd.Function):
    """[T, H] -> the row of each pair's token, [P, H]."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return x_TH.index_select(0, pairs.token_P)

    @staticmethod
    def backward(ctx: Any, grad_PH: Tensor) -> tuple[Tensor, None]:
        return sum_rows(grad_PH, ctx.pairs), None


class Combine(torch.autograd.Function):
    """[P, O] -> the weighted sum of each token's rows, [T, O], without writing [T, K, O] first."""

    @staticmethod
    def forward(ctx: Any, y_PO: Tensor, weights_TK: Tensor, pairs: Pairs) -> Tensor:
        output_TO, rows = combine_rows(y_PO, pairs, weights_TK)
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weights_TK)
        ctx.pairs = pairs
        return output_TO

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weights_TK = ctx.saved_tensors
        y_wanted, *_ = ctx.needs_input_grad
        grad_TO = grad_TO.contiguous()
        return (
            spread_rows(grad_TO, ctx.pairs, weights_TK) if y_wanted else None,
            None if rows is None else row_products(grad_TO, rows, ctx.pairs),
            None,
        )


class DistinctRows(torch.autograd.Function):
    """Rows by number, none twice: their gradient is copied, and not added up as autograd would."""

    @staticmethod
    def forward(ctx: Any, rows_FH: Tensor, numbers_R: Tensor) -> Tensor:
        ctx.save_for_backward(numbers_R)
        ctx.num_rows = len(rows_FH)
        return rows_FH.index_select(0, numbers_R)

    @staticmethod
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor, None]:
        (numbers_R,) = ctx.saved_tensors
        return grad_RH.new_zeros(ctx.num_rows, grad_RH.shape[1]).index_copy_(0, numbers_R, grad_RH), None
