"""The auxiliary losses of routing (design: distillation, diversity, balance, z), each a plain function of one value,
and the two nodes that weigh and sum them with their gradients written out.

Every mean over tokens is taken within a sequence first, then over the sequences of the global batch; `TokenGroups`
carries both, so padding has no weight and any cut into micro-batches gives the same sum. All inputs are float32. These
tensors are small, so that what they cost a GPU is the number of operators, which its host launches one by one: a mean
over tokens is one product with weights made once a forward, and each step's losses are one node, whose backward takes 7
operators where autograd would take 20. Suffixes: S sequences, T tokens, E experts, K chosen. CompeteSMoE, arXiv
2505.13380, section 3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_compete.moe.precision import without_autocast
from llava_compete.moe.state import TokenGroups


def balance_loss(probs_TE: Tensor, choices_TC: Tensor, groups: TokenGroups) -> Tensor:
    """E² x mean over (sequence, expert) of mean probability x mean share of choices; 1 when both are uniform.

    `choices_TC` [T, C]: the choices that count, the first alone (C = 1) or all.
    """
    return _balance(probs_TE, _shares(choices_TC, probs_TE, groups), groups)


def _shares(choices_TC: Tensor, like_TE: Tensor, groups: TokenGroups) -> Tensor:
    """[S, E]: E times each expert's mean share of a sequence's choices."""
    marks_TE = torch.zeros_like(like_TE).scatter_(1, choices_TC, like_TE.shape[1] / choices_TC.shape[1])
    return groups.sequence_weights_ST @ marks_TE


def _balance(probs_TE: Tensor, shares_SE: Tensor, groups: TokenGroups) -> Tensor:
    return torch.dot((groups.global_weights_ST @ probs_TE).flatten(), shares_SE.flatten())


def _balance_backward(grad: Tensor, coef: float, probs_TE: Tensor, shares_SE: Tensor, groups: TokenGroups) -> Tensor:
    """Gradient of what `probs_TE` is the softmax of."""
    with without_autocast(grad.device.type):  # a backward may run under the caller's
        grad_TE = torch.addmm(probs_TE, groups.global_weights_ST.t(), shares_SE * grad, beta=0, alpha=coef)
    return torch._softmax_backward_data(grad_TE, probs_TE, -1, probs_TE.dtype)


def router_z_loss(logits_TE: Tensor, groups: TokenGroups) -> Tensor:
    """Mean of logsumexp(logits)²."""
    return _token_mean(_logsumexp(logits_TE).square(), groups)


def _logsumexp(logits_TE: Tensor) -> Tensor:
    """torch.logsumexp takes nine kernels, this three: logsumexp is what a log-softmax subtracts from each of a row's
    logits. One that is not finite makes it NaN, so that a broken router's loss does not stay finite by ignoring it."""
    return (logits_TE - logits_TE.log_softmax(-1)).mean(-1)


def distillation_loss(squared_TE: Tensor, groups: TokenGroups) -> Tensor:
    """Mean over (token, expert) of `squared_TE`, (p - q)²."""
    return _token_mean(squared_TE.mean(-1), groups)


def winner_distillation_loss(squared_TE: Tensor, winners_TK: Tensor, groups: TokenGroups) -> Tensor:
    """The same mean over the winners of the competition only."""
    return _token_mean(squared_TE.gather(1, winners_TK).mean(-1), groups)


def diversity_loss(diversity_T: Tensor, groups: TokenGroups) -> Tensor:
    """Mean of `Contest.diversity_T`, which the competition computes while it has the winners' outputs."""
    return _token_mean(diversity_T, groups)


def _token_mean(values_T: Tensor, groups: TokenGroups) -> Tensor:
    return torch.dot(groups.token_weights_T, values_T)


class RouterLosses(NamedTuple):
    """Scalars; only `aux_loss`, the others times their coefficients, has a gradient."""

    aux_loss: Tensor
    balance_loss: Tensor
    router_z_loss: Tensor


class CompetitionLosses(NamedTuple):
    """Scalars; only `aux_loss`, the others times their coefficients, has a gradient."""

    aux_loss: Tensor
    distillation_loss: Tensor
    winner_distillation_loss: Tensor
    diversity_loss: Tensor
    balance_loss: Tensor


def router_losses(
    logits_TE: Tensor, scores_TE: Tensor, choices_TC: Tensor, groups: TokenGroups, coefs: dict[str, float]
) -> RouterLosses:
    """Of a router step; the balance is that of softmax(scores), with the choices that count."""
    scores = None if scores_TE is logits_TE else scores_TE
    return RouterLosses(*_RouterLosses.apply(logits_TE, scores, choices_TC, groups, coefs))


class _RouterLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        scores_TE: Tensor | None,
        choices_TC: Tensor,
        groups: TokenGroups,
        coefs: dict[str, float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        probs_TE = (logits_TE if scores_TE is None else scores_TE).softmax(-1)
        shares_SE = _shares(choices_TC, probs_TE, groups)
        balance = _balance(probs_TE, shares_SE, groups)
        sums_T = _logsumexp(logits_TE)
        weighted_T = sums_T * groups.token_weights_T
        z = torch.dot(weighted_T, sums_T)
        ctx.save_for_backward(None if scores_TE is None else logits_TE, probs_TE, shares_SE, weighted_T)
        ctx.groups, ctx.coefs = groups, coefs
        ctx.mark_non_differentiable(balance, z)
        ctx.set_materialize_grads(False)
        return _weighted_sum(coefs, balance_loss=balance, router_z_loss=z), balance, z

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """dz/dr = 2 x token weight x logsumexp(r) x softmax(r)."""
        if grad is None:
            return None, None, None, None, None
        logits_TE, probs_TE, shares_SE, weighted_T = ctx.saved_tensors
        of_scores_TE = _balance_backward(grad, ctx.coefs["balance_loss"], probs_TE, shares_SE, ctx.groups)
        scale_T1, twice = (weighted_T * grad)[:, None], 2 * ctx.coefs["router_z_loss"]
        if logits_TE is None:
            return of_scores_TE.addcmul_(probs_TE, scale_T1, value=twice), None, None, None, None
        return logits_TE.softmax(-1).mul_(scale_T1 * twice), of_scores_TE, None, None, None


def competition_losses(
    logits_TE: Tensor,
    affinity_TE: Tensor,
    winners_TK: Tensor,
    counted_TC: Tensor,
    diversity_T: Tensor,
    groups: TokenGroups,
    coefs: dict[str, float],
) -> CompetitionLosses:
    """Of a competition step; `counted_TC`: the winners that count for the balance."""
    tensors = (logits_TE, affinity_TE, winners_TK, counted_TC, diversity_T)
    return CompetitionLosses(*_CompetitionLosses.apply(*tensors, groups, coefs))


class _CompetitionLosses(torch.autograd.Function):
    """p = softmax(router's logits) learns from q = softmax(affinity), which is constant in both distillation losses."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        affinity_TE: Tensor,
        winners_TK: Tensor,
        counted_TC: Tensor,
        diversity_T: Tensor,
        groups: TokenGroups,
        coefs: dict[str, float],
    ) -> tuple[Tensor, ...]:
        p_TE, q_TE = logits_TE.softmax(-1), affinity_TE.softmax(-1)
        difference_TE = p_TE - q_TE
        squared_TE = difference_TE.square()
        shares_SE = _shares(counted_TC, q_TE, groups)
        terms = {
            "distillation_loss": distillation_loss(squared_TE, groups),
            "winner_distillation_loss": winner_distillation_loss(squared_TE, winners_TK, groups),
            "diversity_loss": diversity_loss(diversity_T, groups),
            "balance_loss": _balance(q_TE, shares_SE, groups),
        }
        # A logit of -inf would have a probability of 0 and a finite loss: a broken router must show.
        aux_loss = torch.add(_weighted_sum(coefs, **terms), logits_TE.sum(), alpha=0)
        ctx.save_for_backward(p_TE, q_TE, difference_TE, winners_TK, shares_SE)
        ctx.groups, ctx.coefs = groups, coefs
        ctx.mark_non_differentiable(*terms.values())
        ctx.set_materialize_grads(False)
        return aux_loss, *terms.values()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        p_TE, q_TE, difference_TE, winners_TK, shares_SE = ctx.saved_tensors
        coefs, weights_T = ctx.coefs, ctx.groups.token_weights_T * grad
        # d/dp of c · mean over E of (p - q)² + c' · mean over the K winners of (p - q)².
        everywhere = 2 * coefs["distillation_loss"] / p_TE.shape[1]
        at_winners = everywhere + 2 * coefs["winner_distillation_loss"] / winners_TK.shape[1]
        slope_TE = torch.full_like(p_TE, everywhere).scatter_(1, winners_TK, at_winners)
        grad_p_TE = slope_TE.mul_(difference_TE).mul_(weights_T[:, None])
        return (
            torch._softmax_backward_data(grad_p_TE, p_TE, -1, p_TE.dtype),
            _balance_backward(grad, coefs["balance_loss"], q_TE, shares_SE, ctx.groups),
            None,
            None,
            weights_T * coefs["diversity_loss"],
            None,
            None,
        )


def _weighted_sum(coefs: dict[str, float], **terms: Tensor) -> Tensor:
    first, *others = terms
    total = terms[first] * coefs[first]
    for name in others:
        total = torch.add(total, terms[name], alpha=coefs[name])
    return total
