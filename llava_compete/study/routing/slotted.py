"""Routers that choose among more than experts (moe/ternary.py, moe/zero_computation.py), of R runs at once.

Suffixes: R runs, T tokens, D width, E experts, S slots, J constants.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_compete.moe.ternary import NULL_BIAS, SUBTRACTED_BIAS
from llava_compete.moe.zero_computation import CONSTANTS, TAU
from llava_compete.study.routing.choice import Choice, among, largest


def ternary(logits_RTS: Tensor, count: int) -> Choice:
    """TC-MoE's slots as signed weights of experts."""
    experts = (logits_RTS.shape[-1] - count) // 2
    bias_S = logits_RTS.new_zeros(logits_RTS.shape[-1])
    bias_S[experts:], bias_S[2 * experts :] = SUBTRACTED_BIAS, NULL_BIAS
    scores = logits_RTS + bias_S
    chosen, first = largest(scores.detach(), count)
    whole = scores.masked_fill(~chosen, -torch.inf)
    whole[..., 2 * experts :] = scores[..., 2 * experts :]
    weights = (scores - whole.logsumexp(-1, keepdim=True)).exp() * chosen
    added, subtracted = slice(experts), slice(experts, 2 * experts)
    return Choice(
        logits_RTS,
        torch.logaddexp(scores[..., added], scores[..., subtracted]),
        chosen[..., added] | chosen[..., subtracted],
        first[..., added] | first[..., subtracted],
        weights[..., added] - weights[..., subtracted],
        null_RT=scores.softmax(-1)[..., 2 * experts :].sum(-1),
    )


def zero_computation(logits_RTS: Tensor, count: int) -> Choice:
    """MoE++'s slots; its balance loss counts those that run no expert by tau."""
    experts = logits_RTS.shape[-1] - CONSTANTS - 2
    chosen, first = largest(logits_RTS.detach(), count)
    weights, counted = among(logits_RTS, chosen), first.to(logits_RTS.dtype)
    counted[..., experts:] *= TAU
    return Choice(
        logits_RTS, logits_RTS, chosen[..., :experts], counted, weights[..., :experts], free_RTS=weights[..., experts:]
    )


def free_answers(x_RTD: Tensor, free_RTS: Tensor, constants_RJD: Tensor, gates_RJ2D: Tensor) -> Tensor:
    """What MoE++'s slots after its experts give: constants mixed with the token, the token, nothing."""
    shares = torch.einsum("rtd,rjad->rtja", x_RTD, gates_RJ2D).softmax(-1) * free_RTS[..., :CONSTANTS, None]
    kept = free_RTS[..., CONSTANTS : CONSTANTS + 1] + shares[..., 0].sum(-1, keepdim=True)
    return torch.baddbmm(kept * x_RTD, shares[..., 1], constants_RJD)
