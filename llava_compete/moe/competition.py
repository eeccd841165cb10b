"""The contest itself: every expert's affinity to a token, the K winners, and the winners' outputs, from one pass.

Affinity s_i = mean over output coordinates of softplus(y_i) (or another activation, or the L2 norm), in float32
whatever the dtype of y, without a float32 copy of y. CompeteSMoE (arXiv 2505.13380, section 3.1); for `experts.py`.
Suffixes: T tokens, E experts, K winners, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_compete.moe.losses import token_diversity
from llava_compete.moe.routers import spread_non_finite, top_experts


class CompetitionResult(NamedTuple):
    output_TO: Tensor
    affinity_TE: Tensor  # float32, before normalisation
    winners_TK: Tensor
    diversity_T: Tensor  # `losses.token_diversity` of the winners' outputs


class _Affinity(NamedTuple):
    """Affinity of float32 [T, O] outputs, and d(affinity)/d(outputs) given outputs and affinity [T, 1]."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]


def _silu_slope(y_TO: Tensor, _: Tensor) -> Tensor:
    gate_TO = y_TO.sigmoid()
    return gate_TO * (1 + y_TO * (1 - gate_TO)) / y_TO.shape[-1]


def _sigmoid_slope(y_TO: Tensor, _: Tensor) -> Tensor:
    gate_TO = y_TO.sigmoid()
    return gate_TO * (1 - gate_TO) / y_TO.shape[-1]


AFFINITIES: dict[str, _Affinity] = {
    "softplus": _Affinity(lambda y: F.softplus(y).mean(-1), lambda y, _: y.sigmoid() / y.shape[-1]),
    "relu": _Affinity(lambda y: y.relu().mean(-1), lambda y, _: (y > 0).to(y.dtype) / y.shape[-1]),
    "silu": _Affinity(lambda y: F.silu(y).mean(-1), _silu_slope),
    "sigmoid": _Affinity(lambda y: y.sigmoid().mean(-1), _sigmoid_slope),
    "l2": _Affinity(lambda y: y.norm(dim=-1), lambda y, s: y / s.masked_fill(s == 0, 1)),
}


class _Contest(torch.autograd.Function):
    """(y [E, T, O], affinity name, K) -> affinity [T, E], winners [T, K], their outputs [T, K, O].

    One node for the three, so that backward makes one gradient of y's size: the affinity's, written expert by expert,
    with the winners' added in place.
    """

    @staticmethod
    def forward(ctx: Any, y_ETO: Tensor, affinity: str, num_winners: int) -> tuple[Tensor, Tensor, Tensor]:
        affinity_TE = torch.stack([_affinity(affinity, y_TO) for y_TO in y_ETO.unbind()], dim=1)
        winners_TK = top_experts(spread_non_finite(affinity_TE), num_winners)
        tokens_T1 = torch.arange(y_ETO.shape[1], device=y_ETO.device)[:, None]
        ctx.save_for_backward(y_ETO, affinity_TE, winners_TK)
        ctx.affinity = affinity
        ctx.mark_non_differentiable(winners_TK)
        return affinity_TE, winners_TK, y_ETO[winners_TK, tokens_T1]

    @staticmethod
    def backward(ctx: Any, grad_s_TE: Tensor, _: Tensor, grad_won_TKO: Tensor) -> tuple[Tensor, None, None]:
        y_ETO, affinity_TE, winners_TK = ctx.saved_tensors
        slope = AFFINITIES[ctx.affinity].slope
        grad_ETO = torch.empty_like(y_ETO)
        for expert, y_TO in enumerate(y_ETO.unbind()):
            column_T1 = affinity_TE[:, expert, None]
            grad_ETO[expert] = slope(y_TO.float(), column_T1) * grad_s_TE[:, expert, None]
        tokens_T1 = torch.arange(y_ETO.shape[1], device=y_ETO.device)[:, None]
        # (winner, token) pairs are distinct, so gather, add and put needs no accumulating scatter.
        grad_ETO[winners_TK, tokens_T1] = grad_ETO[winners_TK, tokens_T1] + grad_won_TKO
        return grad_ETO, None, None


def _affinity(name: str, y_TO: Tensor) -> Tensor:
    y_TO = y_TO.float()
    # -inf is 0 to softplus: without the second term a broken expert would just lose.
    return AFFINITIES[name].value(y_TO) + 0 * y_TO.sum(-1)


def contest(y_ETO: Tensor, affinity: str, num_winners: int) -> CompetitionResult:
    """Let all experts' outputs [E, T, O] compete for each token; the winners' are weighted by raw affinity."""
    affinity_TE, winners_TK, won_TKO = _Contest.apply(y_ETO, affinity, num_winners)
    weights_TK = winning_weights(affinity_TE, winners_TK)
    output_TO = (won_TKO * weights_TK.to(won_TKO.dtype).unsqueeze(-1)).sum(1)
    return CompetitionResult(output_TO, affinity_TE, winners_TK, token_diversity(won_TKO))


def winning_weights(affinity_TE: Tensor, winners_TK: Tensor) -> Tensor:
    """s_i / sum of the winners' s; where relu or L2 leave a sum of exactly 0, all weights are 0."""
    won_TK = affinity_TE.gather(1, winners_TK)
    total_T1 = won_TK.sum(-1, keepdim=True)
    return won_TK / total_T1.masked_fill(total_T1 == 0, 1)
