"""The auxiliary losses of routing (design: distillation, diversity, balance, z), each a plain function of one value,
and the two nodes that weigh and sum them with their gradients written out.

Every mean over tokens is taken within a sequence first, then over the sequences of the global batch; `TokenGroups`
carries both, so padding has no weight and any cut into micro-batches gives the same sum. All inputs are float32, of one
layer or of L side by side ([T, L, E]; a loss is then [L]). These tensors are small, so that what they cost a GPU is the
number of operators, which its host launches one by one: a mean over tokens is one product with weights made once a
forward, all layers' losses are one node, whose backward takes 8 operators where autograd would take 20 a layer.
Suffixes: S sequences, T tokens, L layers, E experts, K chosen. CompeteSMoE, arXiv 2505.13380, section 3.
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
    return _balance(probs_TE, choice_shares(choices_TC, probs_TE, groups), groups)


@torch.no_grad()
def choice_shares(choices_TLC: Tensor, like_TLE: Tensor, groups: TokenGroups) -> Tensor:
    """[S, L, E]: E times each expert's mean share of a sequence's choices."""
    share = like_TLE.shape[-1] / choices_TLC.shape[-1]
    return _by_sequence(groups.sequence_weights_ST, torch.zeros_like(like_TLE).scatter_(-1, choices_TLC, share))


def _by_sequence(weights_ST: Tensor, values_TLE: Tensor) -> Tensor:
    return (weights_ST @ values_TLE.flatten(1)).unflatten(1, values_TLE.shape[1:])


def _balance(probs_TLE: Tensor, shares_SLE: Tensor, groups: TokenGroups) -> Tensor:
    return (_by_sequence(groups.global_weights_ST, probs_TLE) * shares_SLE).sum((0, -1))


def _balance_backward(
    grad_L: Tensor, coef: float, probs_TLE: Tensor, shares_SLE: Tensor, groups: TokenGroups
) -> Tensor:
    """Gradient of what `probs_TLE` is the softmax of."""
    shares_SF, probs_TF = (shares_SLE * grad_L[:, None]).flatten(1), probs_TLE.flatten(1)
    with without_autocast(grad_L.device.type):  # a backward may run under the caller's
        grad_TF = torch.addmm(probs_TF, groups.global_weights_ST.t(), shares_SF, beta=0, alpha=coef)
    return torch._softmax_backward_data(grad_TF.view_as(probs_TLE), probs_TLE, -1, probs_TLE.dtype)


def router_z_loss(logits_TE: Tensor, groups: TokenGroups) -> Tensor:
    """Mean of logsumexp(logits)²."""
    return token_mean(_logsumexp(logits_TE).square(), groups)


def _logsumexp(logits_TE: Tensor) -> Tensor:
    """torch.logsumexp takes nine kernels, this three: logsumexp is what a log-softmax subtracts from each of a row's
    logits. One that is not finite makes it NaN, so that a broken router's loss does not stay finite by ignoring it."""
    return (logits_TE - logits_TE.log_softmax(-1)).mean(-1)


def distillation_loss(squared_TE: Tensor, groups: TokenGroups) -> Tensor:
    """Mean over (token, expert) of `squared_TE`, (p - q)²."""
    return token_mean(squared_TE.mean(-1), groups)


def winner_distillation_loss(squared_TE: Tensor, winners_TK: Tensor, groups: TokenGroups) -> Tensor:
    """The same mean over the winners of the competition only."""
    return token_mean(squared_TE.gather(-1, winners_TK).mean(-1), groups)


def diversity_loss(diversity_T: Tensor, groups: TokenGroups) -> Tensor:
    """Mean of `Contest.diversity_T`, which the competition computes while it has the winners' outputs."""
    return token_mean(diversity_T, groups)


def token_mean(values_TL: Tensor, groups: TokenGroups) -> Tensor:
    return groups.token_weights_T @ values_TL


class RouterLosses(NamedTuple):
    """[L] each; only `aux_loss`, the others times their coefficients, has a gradient."""

    aux_loss: Tensor
    balance_loss: Tensor
    router_z_loss: Tensor


class CompetitionLosses(NamedTuple):
    """[L] each; only `aux_loss`, the others times their coefficients, has a gradient."""

    aux_loss: Tensor
    distillation_loss: Tensor
    winner_distillation_loss: Tensor
    diversity_loss: Tensor
    balance_loss: Tensor


def router_losses(
    logits_TLR: Tensor, scores_TLE: Tensor, shares_SLE: Tensor, groups: TokenGroups, coefs: dict[str, float]
) -> RouterLosses:
    """Of a router step; the balance is that of softmax(scores), with `choice_shares` of the choices that count."""
    scores = None if scores_TLE is logits_TLR else scores_TLE
    return RouterLosses(*_RouterLosses.apply(logits_TLR, scores, shares_SLE, groups, coefs))


class _RouterLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TLE: Tensor,
        scores_TLE: Tensor | None,
        shares_SLE: Tensor,
        groups: TokenGroups,
        coefs: dict[str, float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        probs_TLE = (logits_TLE if scores_TLE is None else scores_TLE).softmax(-1)
        balance_L = _balance(probs_TLE, shares_SLE, groups)
        sums_TL = _logsumexp(logits_TLE)
        z_L = token_mean(sums_TL.square(), groups)
        ctx.save_for_backward(None if scores_TLE is None else logits_TLE, probs_TLE, shares_SLE, sums_TL)
        ctx.groups, ctx.coefs = groups, coefs
        ctx.mark_non_differentiable(balance_L, z_L)
        ctx.set_materialize_grads(False)
        return _weighted_sum(coefs, balance_loss=balance_L, router_z_loss=z_L), balance_L, z_L

    @staticmethod
    def backward(ctx: Any, grad_L: Tensor | None, *_: None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """dz/dr = 2 x token weight x logsumexp(r) x softmax(r)."""
        if grad_L is None:
            return None, None, None, None, None
        logits_TLE, probs_TLE, shares_SLE, sums_TL = ctx.saved_tensors
        of_scores_TLE = _balance_backward(grad_L, ctx.coefs["balance_loss"], probs_TLE, shares_SLE, ctx.groups)
        scale_TL1 = (ctx.groups.token_weights_T[:, None] * grad_L).mul_(sums_TL).unsqueeze(-1)
        twice = 2 * ctx.coefs["router_z_loss"]
        if logits_TLE is None:
            return of_scores_TLE.addcmul_(probs_TLE, scale_TL1, value=twice), None, None, None, None
        return logits_TLE.softmax(-1).mul_(scale_TL1 * twice), of_scores_TLE, None, None, None


def competition_losses(
    logits_TLE: Tensor,
    affinity_TLE: Tensor,
    winners_TLK: Tensor,
    counted_TLC: Tensor,
    diversity_TL: Tensor,
    groups: TokenGroups,
    coefs: dict[str, float],
) -> CompetitionLosses:
    """Of a competition step; `counted_TLC`: the winners that count for the balance."""
    tensors = (logits_TLE, affinity_TLE, winners_TLK, counted_TLC, diversity_TL)
    return CompetitionLosses(*_CompetitionLosses.apply(*tensors, groups, coefs))


class _CompetitionLosses(torch.autograd.Function):
    """p = softmax(router's logits) learns from q = softmax(affinity), which is constant in both distillation losses."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TLE: Tensor,
        affinity_TLE: Tensor,
        winners_TLK: Tensor,
        counted_TLC: Tensor,
        diversity_TL: Tensor,
        groups: TokenGroups,
        coefs: dict[str, float],
    ) -> tuple[Tensor, ...]:
        p_TLE, q_TLE = logits_TLE.softmax(-1), affinity_TLE.softmax(-1)
        difference_TLE = p_TLE - q_TLE
        squared_TLE = difference_TLE.square()
        shares_SLE = choice_shares(counted_TLC, q_TLE, groups)
        terms = {
            **_distillation_terms(squared_TLE, winners_TLK, groups),
            "diversity_loss": diversity_loss(diversity_TL, groups),
            "balance_loss": _balance(q_TLE, shares_SLE, groups),
        }
        # A logit of -inf would have a probability of 0 and a finite loss: a broken router must show.
        aux_loss_L = torch.add(_weighted_sum(coefs, **terms), logits_TLE.sum((0, -1)), alpha=0)
        ctx.save_for_backward(p_TLE, q_TLE, difference_TLE, winners_TLK, shares_SLE)
        ctx.groups, ctx.coefs = groups, coefs
        ctx.mark_non_differentiable(*terms.values())
        ctx.set_materialize_grads(False)
        return aux_loss_L, *terms.values()

    @staticmethod
    def backward(ctx: Any, grad_L: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_L is None:
            return (None,) * 7
        p_TLE, q_TLE, difference_TLE, winners_TLK, shares_SLE = ctx.saved_tensors
        groups, coefs = ctx.groups, ctx.coefs
        return (
            _distillation_backward(grad_L, p_TLE, difference_TLE, winners_TLK, groups, coefs),
            _balance_backward(grad_L, coefs["balance_loss"], q_TLE, shares_SLE, groups),
            None,
            None,
            groups.token_weights_T[:, None] * grad_L * coefs["diversity_loss"],
            None,
            None,
        )


class TeachingLosses(NamedTuple):
    """[L] each; only `aux_loss`, the others times their coefficients, has a gradient, and at the router alone."""

    aux_loss: Tensor
    balance_loss: Tensor
    router_z_loss: Tensor
    distillation_loss: Tensor
    winner_distillation_loss: Tensor


def teaching_losses(
    logits_TLE: Tensor,
    scores_TLE: Tensor,
    shares_SLE: Tensor,
    taught_TLE: Tensor,
    affinity_TLE: Tensor,
    winners_TLK: Tensor,
    groups: TokenGroups,
    coefs: dict[str, float],
) -> TeachingLosses:
    """Of a competition step whose output is the router's: a router step's losses, and the distillation to the
    affinities of `taught_TLE`, the logits once more."""
    step = router_losses(logits_TLE, scores_TLE, shares_SLE, groups, coefs)
    aux_loss_L, *terms = _Distillation.apply(taught_TLE, affinity_TLE, winners_TLK, groups, coefs)
    return TeachingLosses(step.aux_loss + aux_loss_L, step.balance_loss, step.router_z_loss, *terms)


class _Distillation(torch.autograd.Function):
    """The two distillation losses of `_CompetitionLosses` by themselves."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TLE: Tensor,
        affinity_TLE: Tensor,
        winners_TLK: Tensor,
        groups: TokenGroups,
        coefs: dict[str, float],
    ) -> tuple[Tensor, ...]:
        p_TLE = logits_TLE.softmax(-1)
        difference_TLE = p_TLE - affinity_TLE.softmax(-1)
        squared_TLE = difference_TLE.square()
        terms = _distillation_terms(squared_TLE, winners_TLK, groups)
        ctx.save_for_backward(p_TLE, difference_TLE, winners_TLK)
        ctx.groups, ctx.coefs = groups, coefs
        ctx.mark_non_differentiable(*terms.values())
        ctx.set_materialize_grads(False)
        return _weighted_sum(coefs, **terms), *terms.values()

    @staticmethod
    def backward(ctx: Any, grad_L: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_L is None:
            return (None,) * 5
        p_TLE, difference_TLE, winners_TLK = ctx.saved_tensors
        grad_TLE = _distillation_backward(grad_L, p_TLE, difference_TLE, winners_TLK, ctx.groups, ctx.coefs)
        return grad_TLE, *(None,) * 4


def _distillation_terms(squared_TLE: Tensor, winners_TLK: Tensor, groups: TokenGroups) -> dict[str, Tensor]:
    return {
        "distillation_loss": distillation_loss(squared_TLE, groups),
        "winner_distillation_loss": winner_distillation_loss(squared_TLE, winners_TLK, groups),
    }


def _distillation_backward(
    grad_L: Tensor,
    p_TLE: Tensor,
    difference_TLE: Tensor,
    winners_TLK: Tensor,
    groups: TokenGroups,
    coefs: dict[str, float],
) -> Tensor:
    """At the logits, of c · mean over E of (p - q)² + c' · mean over the K winners of (p - q)²."""
    everywhere = 2 * coefs["distillation_loss"] / p_TLE.shape[-1]
    at_winners = everywhere + 2 * coefs["winner_distillation_loss"] / winners_TLK.shape[-1]
    slope_TLE = torch.full_like(p_TLE, everywhere).scatter_(-1, winners_TLK, at_winners)
    weights_TL = groups.token_weights_T[:, None] * grad_L
    grad_p_TLE = slope_TLE.mul_(difference_TLE).mul_(weights_TL[:, :, None])
    return torch._softmax_backward_data(grad_p_TLE, p_TLE, -1, p_TLE.dtype)


def _weighted_sum(coefs: dict[str, float], **terms: Tensor) -> Tensor:
    first, *others = terms
    total = terms[first] * coefs[first]
    for name in others:
        total = torch.add(total, terms[name], alpha=coefs[name])
    return total
