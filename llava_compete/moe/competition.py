"""The contest itself: every expert's affinity to a token, the K winners, and the winners' outputs, from one pass.

Affinity s_i = mean over output coordinates of softplus(y_i) (or another activation, or the L2 norm), in float32
whatever the dtype of y, without a float32 copy of y. CompeteSMoE (arXiv 2505.13380, section 3.1); for `experts.py`.
Suffixes: T tokens, E experts, K winners, I hidden, O outputs, P winning (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_compete.moe.grouped import Pairs, expert_slices, linear_into
from llava_compete.moe.losses import token_diversity
from llava_compete.moe.routers import spread_non_finite, top_experts


class CompetitionResult(NamedTuple):
    output_TO: Tensor
    affinity_TE: Tensor  # float32, before normalisation
    winners_TK: Tensor
    weights_TK: Tensor  # float32, sum to 1
    diversity_T: Tensor  # `losses.token_diversity` of the winners' outputs


class _Affinity(NamedTuple):
    """Of float32 outputs y [T, O]: the affinity [T], and its slope d(affinity)/dy times O [T, O] given it as [T, 1]."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]


def _silu_slope(y_TO: Tensor, _: Tensor) -> Tensor:
    gate_TO = y_TO.sigmoid()
    return gate_TO * (1 + y_TO * (1 - gate_TO))


def _sigmoid_slope(y_TO: Tensor, _: Tensor) -> Tensor:
    gate_TO = y_TO.sigmoid()
    return gate_TO * (1 - gate_TO)


AFFINITIES: dict[str, _Affinity] = {
    "softplus": _Affinity(lambda y: F.softplus(y).mean(-1), lambda y, _: y.sigmoid()),
    "relu": _Affinity(lambda y: y.relu().mean(-1), lambda y, _: (y > 0).to(y.dtype)),
    "silu": _Affinity(lambda y: F.silu(y).mean(-1), _silu_slope),
    "sigmoid": _Affinity(lambda y: y.sigmoid().mean(-1), _sigmoid_slope),
    "l2": _Affinity(lambda y: y.norm(dim=-1), lambda y, s: y * (y.shape[-1] / s.masked_fill(s == 0, 1))),
}


def affinity(name: str, y_TO: Tensor) -> Tensor:
    """Affinity [T] in float32 of one expert's outputs; not finite where an output is not."""
    y_TO = y_TO.float()
    # -inf is 0 to softplus: without the second term a broken expert would just lose.
    return AFFINITIES[name].value(y_TO) + 0 * y_TO.sum(-1)


class _DownAndContest(torch.autograd.Function):
    """Hidden states [T, E, I] -> affinity [T, E], winners [T, K] and the winners' outputs [T, K, O].

    One node, so that each expert's affinity is taken while its outputs are in cache, and the backward pass makes the
    gradient of one expert's outputs at a time: affinity's everywhere, plus the winners' where this expert won.
    """

    @staticmethod
    def forward(
        ctx: Any, h_TEI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, name: str, num_winners: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_tokens, num_experts = h_TEI.shape[:2]
        y_ETO = h_TEI.new_empty(num_experts, num_tokens, weight_EOI.shape[1])
        affinity_TE = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=h_TEI.device)
        for expert, y_TO in enumerate(y_ETO.unbind()):
            linear_into(h_TEI[:, expert], weight_EOI[expert], None if bias_EO is None else bias_EO[expert], y_TO)
            affinity_TE[:, expert] = affinity(name, y_TO)
        winners_TK = top_experts(spread_non_finite(affinity_TE), num_winners)
        ctx.save_for_backward(h_TEI, weight_EOI, y_ETO, affinity_TE, winners_TK)
        ctx.name = name
        ctx.mark_non_differentiable(winners_TK)
        rows_TK = winners_TK * num_tokens + torch.arange(num_tokens, device=h_TEI.device)[:, None]
        won_TKO = y_ETO.flatten(0, 1).index_select(0, rows_TK.flatten()).unflatten(0, rows_TK.shape)
        return affinity_TE, winners_TK, won_TKO

    @staticmethod
    def backward(
        ctx: Any, grad_affinity_TE: Tensor, _: Tensor, grad_won_TKO: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        h_TEI, weight_EOI, y_ETO, affinity_TE, winners_TK = ctx.saved_tensors
        slope = AFFINITIES[ctx.name].slope
        _, weight_wanted, bias_wanted, *_ = ctx.needs_input_grad
        grad_h_TEI = torch.empty_like(h_TEI)
        grad_weight_EOI = torch.empty_like(weight_EOI) if weight_wanted else None
        grad_bias_EO = weight_EOI.new_empty(weight_EOI.shape[:2]) if bias_wanted else None
        grad_won_PO = grad_won_TKO.flatten(0, 1)
        scale_TE = grad_affinity_TE / weight_EOI.shape[1]
        pairs = Pairs.sort(winners_TK, weight_EOI.shape[0])
        for expert, rows in expert_slices(pairs.ends_E):
            grad_TO = slope(y_ETO[expert].float(), affinity_TE[:, expert, None]).mul_(scale_TE[:, expert, None])
            grad_TO.index_add_(0, pairs.token_P[rows], grad_won_PO.index_select(0, pairs.order_P[rows]).float())
            grad_TO = grad_TO.to(weight_EOI.dtype)
            torch.mm(grad_TO, weight_EOI[expert], out=grad_h_TEI[:, expert])
            if grad_weight_EOI is not None:
                torch.mm(grad_TO.t(), h_TEI[:, expert], out=grad_weight_EOI[expert])
            if grad_bias_EO is not None:
                torch.sum(grad_TO, 0, out=grad_bias_EO[expert])
        return grad_h_TEI, grad_weight_EOI, grad_bias_EO, None, None


def compete(
    h_TEI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, name: str, num_winners: int
) -> CompetitionResult:
    """Let all experts (hidden states h, down projection) compete for each token; winners are weighted by affinity."""
    affinity_TE, winners_TK, won_TKO = _DownAndContest.apply(h_TEI, weight_EOI, bias_EO, name, num_winners)
    weights_TK = winning_weights(affinity_TE, winners_TK)
    # Several times faster on CPU than a batched product of [K, O] with [K] for each token.
    output_TO = (won_TKO * weights_TK.to(won_TKO.dtype)[:, :, None]).sum(1)
    return CompetitionResult(output_TO, affinity_TE, winners_TK, weights_TK, token_diversity(won_TKO))


def winning_weights(affinity_TE: Tensor, winners_TK: Tensor) -> Tensor:
    """s_i / sum of the winners' s; equal weights where relu or L2 leave a sum of exactly 0."""
    won_TK = affinity_TE.gather(1, winners_TK)
    won_TK = won_TK + (won_TK.sum(-1, keepdim=True) == 0)
    return won_TK / won_TK.sum(-1, keepdim=True)
