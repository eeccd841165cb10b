"""Expert-router coupling (arXiv 2512.23447): each expert answers its own row of the router most, each row its expert.

Row i of the router is a proxy for the tokens of expert i: R~_i = R_i (1 + eps_i u_i), with u_i in (-1, 1) and eps_i
half the distance to the nearest other row over |R_i|, which is constant in the gradient (the paper's figure 8). Its
weight is 1 and alpha 1 where the paper says nothing else (section 4.1: "the loss weight of the ERC loss is fixed at 1,
and we use alpha = 1 by default"), beside a balance loss of 0.01; alpha 0.5 was better with 256 experts. With
M_ij = |W_j R~_i|, W_j the first projection of expert j (the gate's where there is one; biases apart, which the
paper's experts have not), the loss is the mean over all n² cells of max(M_ij - alpha M_ii, 0) + max(M_ji - alpha
M_ii, 0), j != i. No token takes part, so that its cost does not grow with the batch. Suffixes: R rows, J = R experts,
D width, M and I rows of the projection and those that are read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def proxies(rows_RD: Tensor, noise_RD: Tensor | None) -> Tensor:
    """The rows, moved by as much of their noise as keeps them nearer to themselves than to another row."""
    if noise_RD is None:
        return rows_RD
    with torch.no_grad():
        distances_RR = torch.linalg.vector_norm(rows_RD[:, None] - rows_RD[None], dim=-1)
        nearest_R = distances_RR.fill_diagonal_(torch.inf).amin(-1)
        reach_R = nearest_R / (2 * torch.linalg.vector_norm(rows_RD, dim=-1).clamp(min=1e-12))
        factors_RD = 1 + reach_R[:, None] * noise_RD.to(rows_RD)
    return rows_RD * factors_RD


def coupling_loss(proxies_RD: Tensor, up_EMD: Tensor, num_read: int, alpha: float) -> Tensor:
    """The loss, 0-dim float32, of the first R experts; `num_read`: I, rows of `up` that are the first projection."""
    norms_RJ = _Norms.apply(proxies_RD.to(up_EMD.dtype), up_EMD, num_read)
    own_R = alpha * norms_RJ.diagonal()
    excess_RJ = (norms_RJ - own_R[:, None]).relu() + (norms_RJ - own_R[None]).relu()
    itself_RJ = torch.eye(len(own_R), dtype=torch.bool, device=own_R.device)
    return excess_RJ.masked_fill(itself_RJ, 0.0).mean()


class _Norms(torch.autograd.Function):
    """|W_j R~_i| as [R, J], float32. One node, so that it keeps the packed parameter itself and no view of it, which
    would keep ZeRO-3's gathered weights alive."""

    @staticmethod
    def forward(ctx: Any, proxies_RD: Tensor, up_EMD: Tensor, num_read: int) -> Tensor:
        h_JRI = torch.matmul(proxies_RD, up_EMD[: len(proxies_RD), :num_read].transpose(1, 2))
        norms_JR = torch.linalg.vector_norm(h_JRI, dim=-1, dtype=torch.float32)
        ctx.save_for_backward(proxies_RD, up_EMD, h_JRI, norms_JR)
        ctx.num_read = num_read
        return norms_JR.t()

    @staticmethod
    def backward(ctx: Any, grad_RJ: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        proxies_RD, up_EMD, h_JRI, norms_JR = ctx.saved_tensors
        scale_JR = torch.where(norms_JR > 0, grad_RJ.t() / norms_JR, 0.0)
        grad_h_JRI = h_JRI * scale_JR.to(h_JRI.dtype)[:, :, None]
        rows = slice(len(proxies_RD)), slice(ctx.num_read)
        grad_proxies_RD = grad_up_EMD = None
        if ctx.needs_input_grad[0]:
            grad_proxies_RD = torch.matmul(grad_h_JRI, up_EMD[rows]).sum(0)
        if ctx.needs_input_grad[1]:
            grad_up_EMD = torch.zeros_like(up_EMD)
            grad_up_EMD[rows] = torch.matmul(grad_h_JRI.transpose(1, 2), proxies_RD)
        return grad_proxies_RD, grad_up_EMD, None
