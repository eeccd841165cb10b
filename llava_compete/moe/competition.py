"""The contest itself: every expert's affinity to a token, the K winners, and the winners' outputs, from one pass.

Affinity s_i = mean over output coordinates of softplus(y_i) (or another activation, or the L2 norm), in float32
whatever the dtype of y. CompeteSMoE (arXiv 2505.13380, section 3.1). Every operator works on all experts at once.
Suffixes: T tokens, E experts, K winners, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_compete.moe.pairs import is_gpu
from llava_compete.moe.routers import top_experts


class Contest(NamedTuple):
    affinity_TE: Tensor  # float32, before normalisation; NaN throughout where one of a token's outputs is not finite
    winners_TK: Tensor
    weights_TK: Tensor  # float32, sum to 1; without gradient, which the output has taken
    diversity_T: Tensor  # mean over all K x K cells of the cosine of two winners' outputs, the diagonal counted as 0


class Responses(NamedTuple):
    """What a competition finds that only teaches: affinities as in `Contest`, and who would have won."""

    affinity_TE: Tensor
    winners_TK: Tensor


# A shorter output has no direction to speak of: it is divided by this instead of its length.
NORM_EPS = 1e-12


class _Affinity(NamedTuple):
    """Of outputs y [..., O]: the affinity [...] in float32, and, given it as [..., 1], the slope d(affinity)/dy times O
    in y's shape, in a dtype that may be y's: the gradient of y is rounded to that in the end. `is_positive`: always."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    is_positive: bool = False


def _softplus_mean(y: Tensor) -> Tensor:
    # log(exp(y) + exp(0)): the float32 zero makes one operator widen y and evaluate; y.float() would write a copy.
    return torch.logaddexp(y, y.new_zeros(1, dtype=torch.float32)).mean(-1)


def _silu_slope(y: Tensor, _: Tensor) -> Tensor:
    gate = y.float().sigmoid()
    return gate * (1 + y * (1 - gate))


def _sigmoid_slope(y: Tensor, _: Tensor) -> Tensor:
    gate = y.float().sigmoid()
    return gate * (1 - gate)


def _norm(y: Tensor) -> Tensor:
    return torch.linalg.vector_norm(y, dim=-1, dtype=torch.promote_types(y.dtype, torch.float32)).float()


AFFINITIES: dict[str, _Affinity] = {
    "softplus": _Affinity(_softplus_mean, lambda y, _: y.sigmoid(), is_positive=True),
    "relu": _Affinity(lambda y: y.relu().mean(-1, dtype=torch.float32), lambda y, _: (y > 0).to(y.dtype)),
    "silu": _Affinity(lambda y: F.silu(y.float()).mean(-1), _silu_slope),
    "sigmoid": _Affinity(lambda y: y.float().sigmoid().mean(-1), _sigmoid_slope, is_positive=True),
    "l2": _Affinity(_norm, lambda y, s: y * (y.shape[-1] / s.masked_fill(s == 0, 1))),
}


def affinity(name: str, y: Tensor) -> Tensor:
    """Affinity [...] in float32 of outputs y [..., O]."""
    return AFFINITIES[name].value(y)


class Picked(NamedTuple):
    affinity_TE: Tensor
    winners_TK: Tensor
    won_TKO: Tensor  # the winners' outputs


def pick_winners(y_ETO: Tensor, name: str, num_winners: int) -> Picked:
    """Affinities of outputs y, and the K largest of each token; without gradient (`pick_winners_backward`)."""
    affinity_TE, winners_TK = respond(y_ETO, name, num_winners)
    return Picked(affinity_TE, winners_TK, _won(y_ETO, winners_rows(winners_TK)))


def respond(y_ETO: Tensor, name: str, num_winners: int) -> Responses:
    """As `pick_winners`, without the winners' outputs."""
    # softplus(-inf) is 0: without the sum a broken expert would just lose.
    sums_T = y_ETO.sum((0, 2), dtype=torch.float32)
    affinity_TE = torch.add(affinity(name, y_ETO), sums_T, alpha=0).t().float().contiguous()
    return Responses(affinity_TE, top_experts(affinity_TE, num_winners))


def winners_rows(winners_TK: Tensor) -> Tensor:
    """[T, K], the winners' rows of y laid out as [E * T, O]. They never repeat: a token wins once at an expert."""
    tokens_T1 = torch.arange(len(winners_TK), device=winners_TK.device)[:, None]
    return torch.add(tokens_T1, winners_TK, alpha=len(winners_TK))


def _won(y_ETO: Tensor, rows_TK: Tensor) -> Tensor:
    return y_ETO.flatten(0, 1).index_select(0, rows_TK.flatten()).unflatten(0, rows_TK.shape)


def pick_winners_backward(
    y_ETO: Tensor, name: str, affinity_TE: Tensor, rows_TK: Tensor, grad_affinity_TE: Tensor, grad_won_TKO: Tensor
) -> Tensor:
    """dy_e = slope(y_e) / O x d(affinity_e), and where expert e won, the gradient of its output beside it."""
    grad_ETO = AFFINITIES[name].slope(y_ETO, affinity_TE.t()[:, :, None])
    # In the slope's dtype: a product of two dtypes takes a GPU three times as long.
    scale_TE = (grad_affinity_TE / y_ETO.shape[2]).to(grad_ETO.dtype)
    grad_ETO = grad_ETO.mul_(scale_TE.t()[:, :, None]).to(y_ETO.dtype)
    grad_FO, rows_P = grad_ETO.flatten(0, 1), rows_TK.flatten()
    grad_FO.index_copy_(0, rows_P, grad_FO.index_select(0, rows_P).add_(grad_won_TKO.flatten(0, 1)))
    return grad_ETO


class PickWinners(torch.autograd.Function):
    """Outputs y [E, T, O] -> the fields of `Picked`.

    Written by hand for memory, and for a GPU's launches, not for arithmetic: at 64 experts y is by far the largest
    tensor of a layer, and autograd would keep float32 activations of it and add up several gradients of its size.
    Here y alone is kept, in its own dtype, and the winners' gradients are added in place.
    """

    @staticmethod
    def forward(ctx: Any, y_ETO: Tensor, name: str, num_winners: int) -> tuple[Tensor, Tensor, Tensor]:
        affinity_TE, winners_TK = respond(y_ETO, name, num_winners)
        rows_TK = winners_rows(winners_TK)
        ctx.save_for_backward(y_ETO, affinity_TE, rows_TK)
        ctx.name = name
        ctx.mark_non_differentiable(winners_TK)
        ctx.set_materialize_grads(False)
        return affinity_TE, winners_TK, _won(y_ETO, rows_TK)

    @staticmethod
    def backward(
        ctx: Any, grad_affinity_TE: Tensor | None, _: None, grad_won_TKO: Tensor | None
    ) -> tuple[Tensor, None, None]:
        y_ETO, affinity_TE, rows_TK = ctx.saved_tensors
        if grad_affinity_TE is None:
            grad_affinity_TE = torch.zeros_like(affinity_TE)
        if grad_won_TKO is None:
            grad_won_TKO = y_ETO.new_zeros(*rows_TK.shape, y_ETO.shape[2])
        grads = (grad_affinity_TE, grad_won_TKO)
        return pick_winners_backward(y_ETO, ctx.name, affinity_TE, rows_TK, *grads), None, None


class _MixWinners(torch.autograd.Function):
    """Affinities, winners and their outputs y_k [T, K, O] -> their weighted sum [T, O], weights and diversity.

    With s the winners' affinities, S their sum and w = s / S, directions d_k = y_k / |y_k| and D their sum:
    output = sum_k w_k y_k, diversity = (|D|² - sum_k |d_k|²) / K². One node: the outputs are read a few times in their
    own dtype, where autograd would keep and read a dozen float32 tensors of their size.
    """

    @staticmethod
    def forward(
        ctx: Any, affinity_TE: Tensor, winners_TK: Tensor, won_TKO: Tensor, is_positive: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        won_TK = affinity_TE.gather(1, winners_TK)
        if not is_positive:  # only zeros would leave nothing to divide by: equal weights then
            won_TK += won_TK.sum(-1, keepdim=True) == 0
        total_T1 = won_TK.sum(-1, keepdim=True)
        weights_TK = won_TK / total_T1
        lengths_TK = _norm(won_TKO)
        inverse_TK = lengths_TK.clamp(min=NORM_EPS).reciprocal()
        output_TO, direction_TO = _two_sums(weights_TK, inverse_TK, won_TKO)
        own_T = (lengths_TK > NORM_EPS).sum(-1)
        diversity_T = (_norm(direction_TO).square() - own_T) / winners_TK.shape[1] ** 2
        ctx.num_experts = affinity_TE.shape[1]
        ctx.save_for_backward(winners_TK, won_TKO, weights_TK, total_T1, inverse_TK, direction_TO)
        ctx.mark_non_differentiable(weights_TK)
        ctx.set_materialize_grads(False)
        return output_TO, weights_TK, diversity_T

    @staticmethod
    def backward(
        ctx: Any, grad_TO: Tensor | None, _: None, grad_diversity_T: Tensor | None
    ) -> tuple[Tensor, None, Tensor, None]:
        winners_TK, won_TKO, weights_TK, total_T1, inverse_TK, direction_TO = ctx.saved_tensors
        if grad_TO is None:
            grad_TO = torch.zeros_like(direction_TO)
        grad_w_TK, along_TK = _two_products(won_TKO, grad_TO, direction_TO)
        # Through the weights: dL/ds_i = (dL/dw_i - sum_j w_j dL/dw_j) / S, with dL/dw_i = dL/doutput · y_i.
        grad_s_TK = (grad_w_TK - (grad_w_TK * weights_TK).sum(-1, keepdim=True)) / total_T1
        grad_affinity_TE = grad_s_TK.new_zeros(len(grad_s_TK), ctx.num_experts).scatter_(1, winners_TK, grad_s_TK)
        # Of the outputs: w_k dL/doutput, and d|D|²/dy_k = 2 (D - d_k (D · d_k)) / |y_k|; |d_k| is constant.
        grad_won_TKO = grad_TO[:, None] * weights_TK.to(won_TKO.dtype)[:, :, None]
        if grad_diversity_T is not None:
            of_sum_TK = inverse_TK * (grad_diversity_T * (2 / winners_TK.shape[1] ** 2))[:, None]
            of_own_TK = of_sum_TK * along_TK * inverse_TK.square()
            grad_won_TKO.addcmul_(direction_TO[:, None], of_sum_TK.to(won_TKO.dtype)[:, :, None])
            grad_won_TKO.addcmul_(won_TKO, of_own_TK.to(won_TKO.dtype)[:, :, None], value=-1)
        return grad_affinity_TE, None, grad_won_TKO, None


def _two_sums(first_TK: Tensor, second_TK: Tensor, won_TKO: Tensor) -> tuple[Tensor, Tensor]:
    """[T, O] each: the sums over k of weight x y_k, by two sets of weights."""
    if is_gpu(won_TKO):
        # A product with both sets at once takes 0.70 ms, one with a single row 0.11 (H200, 8,192 tokens of width 1152).
        weights = (weights_TK.to(won_TKO.dtype)[:, None] for weights_TK in (first_TK, second_TK))
        first_TO, second_TO = (torch.bmm(weights_T1K, won_TKO)[:, 0] for weights_T1K in weights)
        return first_TO, second_TO
    # Several times faster on a CPU than such small products.
    first_TO = (won_TKO * first_TK.to(won_TKO.dtype)[:, :, None]).sum(1)
    return first_TO, (won_TKO * second_TK.to(won_TKO.dtype)[:, :, None]).sum(1)


def _two_products(won_TKO: Tensor, first_TO: Tensor, second_TO: Tensor) -> tuple[Tensor, Tensor]:
    """[T, K] each, in float32: y_k · a and y_k · b."""
    if is_gpu(won_TKO):
        both_T2O = torch.stack([first_TO, second_TO], 1)
        products_TK2 = torch.bmm(won_TKO, both_T2O.transpose(1, 2)).float()
        return products_TK2[:, :, 0], products_TK2[:, :, 1]
    first_TK = (won_TKO * first_TO[:, None]).sum(-1, dtype=torch.float32)
    return first_TK, (won_TKO * second_TO[:, None]).sum(-1, dtype=torch.float32)


def mix_winners(picked: Picked, name: str) -> tuple[Tensor, Contest]:
    """The winners' sum [T, O], weighted by affinity, and what the losses read of the contest."""
    output_TO, weights_TK, diversity_T = _MixWinners.apply(*picked, AFFINITIES[name].is_positive)
    return output_TO, Contest(picked.affinity_TE, picked.winners_TK, weights_TK, diversity_T)
