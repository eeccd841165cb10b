"""Three small nodes with their gradients written out: as chains of operators they took half of a step on a CPU.

Suffixes: R runs, T tokens, D width, E experts, S sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EPS = 1e-6


class RmsNorm(torch.autograd.Function):
    """x / sqrt(mean(x²) + 1e-6) over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(EPS).rsqrt_()
        normed = x * inverse
        ctx.save_for_backward(normed, inverse)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        normed, inverse = ctx.saved_tensors
        along = (grad * normed).mean(-1, keepdim=True)
        return torch.addcmul(grad, normed, along, value=-1).mul_(inverse)


class RouterAux(torch.autograd.Function):
    """balance_coef x balance + z_coef x z of a router step, [R]; `first` marks each token's first choice, or says how
    much it counts.

    balance = E² x mean over (sequence, expert) of mean probability x share of first choices; z = mean logsumexp².
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, scores: Tensor | None, first: Tensor, sequences: int, coefs: tuple[float, float]
    ) -> Tensor:
        log_probs = logits.log_softmax(-1)
        sums = logits[..., 0] - log_probs[..., 0]
        probs = log_probs.exp_() if scores is None else scores.softmax(-1)
        runs, tokens, experts = probs.shape
        shape = (runs, sequences, tokens // sequences, experts)
        shares = first.view(shape).sum(2, keepdim=True, dtype=probs.dtype) * (sequences / tokens)
        balance = experts * (probs.view(shape).mean(2, keepdim=True) * shares).sum((1, 2, 3)) / sequences
        ctx.save_for_backward(logits if scores is not None else None, probs, shares, sums)
        ctx.coefs = coefs
        return coefs[0] * balance + coefs[1] * sums.square().mean(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, probs, shares, sums = ctx.saved_tensors
        runs, tokens, experts = probs.shape
        of_probs = shares * (grad.view(-1, 1, 1, 1) * (ctx.coefs[0] * experts / tokens))
        shape = (runs, shares.shape[1], -1, experts)
        inner = (probs.view(shape) * of_probs).sum(-1, keepdim=True)
        of_scores = (of_probs - inner).mul_(probs.view(shape)).view_as(probs)
        scale = (sums * (grad.view(-1, 1) * (2 * ctx.coefs[1] / tokens))).unsqueeze(-1)
        if logits is None:
            return of_scores.addcmul_(probs, scale), None, None, None, None
        return logits.softmax(-1).mul_(scale), of_scores, None, None, None
