"""The auxiliary losses of routing, each a plain function (design: distillation, diversity, balance, z).

Every mean over tokens is taken within a sequence first, then over the sequences of the global batch; `TokenGroups`
carries both, so padding has no weight and any cut into micro-batches gives the same sum. All inputs are float32. These
tensors are small, so that on a GPU the number of operators is what they cost: a mean over tokens is one product with
weights made once a forward. Suffixes: T tokens, E experts, K chosen. CompeteSMoE, arXiv 2505.13380, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava_compete.moe.state import TokenGroups


def balance_loss(probs_TE: Tensor, choices_TC: Tensor, groups: TokenGroups) -> Tensor:
    """E² x mean over (sequence, expert) of mean probability x mean share of choices; 1 when both are uniform.

    `choices_TC` [T, C]: the choices that count, the first alone (C = 1) or all.
    """
    num_experts = probs_TE.shape[1]
    # E² and the mean's 1/E, and the share 1/C of a choice, enter as the number that marks a choice.
    chosen_TE = torch.zeros_like(probs_TE).scatter_(1, choices_TC, num_experts / choices_TC.shape[1])
    mean_probs_SE = groups.global_weights_ST @ probs_TE
    return torch.dot(mean_probs_SE.flatten(), (groups.sequence_weights_ST @ chosen_TE).flatten())


def router_z_loss(logits_TE: Tensor, groups: TokenGroups) -> Tensor:
    """Mean of logsumexp(logits)²."""
    return _SquaredLogSumExp.apply(logits_TE, groups.token_weights_T)


class _SquaredLogSumExp(torch.autograd.Function):
    """Sum over t of weight_t x logsumexp(logits_t)². torch.logsumexp takes nine kernels, a log-softmax one, and
    logsumexp is what it subtracts from any of a row's logits."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, weights_T: Tensor) -> Tensor:
        log_probs_TE = logits_TE.log_softmax(-1)
        sums_T = logits_TE[:, 0] - log_probs_TE[:, 0]
        weighted_T = sums_T * weights_T
        ctx.save_for_backward(log_probs_TE, weighted_T)
        return torch.dot(weighted_T, sums_T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        log_probs_TE, weighted_T = ctx.saved_tensors
        return log_probs_TE.exp().mul_((weighted_T * (2 * grad))[:, None]), None


def squared_differences(probs_TE: Tensor, affinity_probs_TE: Tensor) -> Tensor:
    """(p - q)² [T, E], of which both distillation losses are means; the target q is detached here."""
    return (probs_TE - affinity_probs_TE.detach()).square()


def distillation_loss(squared_TE: Tensor, groups: TokenGroups) -> Tensor:
    """Mean over (token, expert) of (p - q)²."""
    return _token_mean(squared_TE.mean(-1), groups)


def winner_distillation_loss(squared_TE: Tensor, winners_TK: Tensor, groups: TokenGroups) -> Tensor:
    """The same mean over the winners of the competition only."""
    return _token_mean(squared_TE.gather(1, winners_TK).mean(-1), groups)


def diversity_loss(diversity_T: Tensor, groups: TokenGroups) -> Tensor:
    """Mean of `Contest.diversity_T`, which the competition computes while it has the winners' outputs."""
    return _token_mean(diversity_T, groups)


def _token_mean(values_T: Tensor, groups: TokenGroups) -> Tensor:
    return torch.dot(groups.token_weights_T, values_T)
