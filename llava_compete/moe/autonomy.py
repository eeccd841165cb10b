"""Autonomy-of-Experts (arXiv 2501.13074): no router; experts are chosen by the norm of what they compute first.

The first projection of each expert (a gate's where there is one) is W_high_i W_low_i, of rank r: every expert computes
C_i = W_low_i x, those with the K largest |C_i| are chosen, weighted by the softmax over their norms, and go on from
their C_i (factorised.py). The balance loss reads the softmax of all norms (the paper's equation 6). Published code:
trestad/Autonomy-of-Experts, moe.py (`AoE`). The products are in the experts' dtype, norms and all that follows from
them in float32. The router holds W_low, since it is what chooses. The paper starts all weights at N(0, 0.02) in width
768; here W_low starts as nn.Linear would, which is that in this width, and in any other keeps norms as large: sqrt(r/3)
for tokens of unit variance. Suffixes as in routers.py; r is written as H in shapes, for R are the routed experts.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from llava_compete.moe.all_experts import AllExpertsUp
from llava_compete.moe.precision import compute_dtype, without_autocast
from llava_compete.moe.routers import Routing, SoftmaxRouter

# Of the logarithms by which an upcycled expert stretches its directions: with it norms of rank 128 differ by about a
# tenth among experts, a logit of 0.7, as a router of N(0, 0.02) has in width 1,024.
STRETCH = 0.5


class AutonomyRouter(SoftmaxRouter):
    """The experts' own first half. An upcycled model answers as its dense parent where the rank is full."""

    router_z_coef: ClassVar[float] = 0.0  # norms are positive: it would make all of them small
    has_rows: ClassVar[bool] = False
    factorises: ClassVar[bool] = True

    def make_parameters(self, hidden_size: int) -> None:
        self.low_proj = nn.Parameter(torch.empty(self.num_routed, self.rank, hidden_size))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        bound = 1 / math.sqrt(self.low_proj.shape[2])
        nn.init.uniform_(self.low_proj, -bound, bound, generator=generator)

    def forward(self, x_TD: Tensor) -> Routing:
        dtype = compute_dtype(x_TD, self.low_proj)
        with without_autocast(x_TD.device.type):
            low_TEH = AllExpertsUp.apply(x_TD.to(dtype), self.low_proj.to(dtype), None)
            norms_TE = torch.linalg.vector_norm(low_TEH, dim=-1, dtype=torch.float32)
            return self.route(norms_TE)._replace(low_TEH=low_TEH)


class Factors(NamedTuple):
    """W ~ high_i low_i for every expert i: low_EHD [E, r, D], high_EIH [E, I, r]; `cut`: |W - high low| / |W|, 0 at
    full rank."""

    low_EHD: Tensor
    high_EIH: Tensor
    cut: float


def factorise(weight_ID: Tensor, rank: int, num_experts: int, generator: torch.Generator) -> Factors:
    """One dense projection as the product of two, by its singular values, another way for each expert.

    With W = U S V, low_i = c_i diag(m_i) sqrt(S) V and high_i = U sqrt(S) diag(1 / m_i) / c_i: the product does not
    depend on m_i, but the norm by which an expert is chosen does. With one m for all, all tokens would choose the first
    K experts. m_i is log-normal, c_i gives low_i the size of a new one.
    """
    rows_UIH, values_H, columns_HD = torch.linalg.svd(weight_ID.double(), full_matrices=False)
    whole, kept_H = values_H.norm(), values_H[:rank]
    stretch_EH = torch.randn(num_experts, rank, generator=generator).double().mul(STRETCH).exp()
    low_EHD = (stretch_EH * kept_H.sqrt())[:, :, None] * columns_HD[:rank]
    sizes_E11 = math.sqrt(rank / 3) / low_EHD.flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None]
    high_EIH = rows_UIH[:, :rank] * (kept_H.sqrt() / stretch_EH)[:, None]
    cut = float(values_H[rank:].norm() / whole) if whole > 0 else 0.0
    low_EHD, high_EIH = (part.to(weight_ID.dtype).contiguous() for part in (low_EHD * sizes_E11, high_EIH / sizes_E11))
    return Factors(low_EHD, high_EIH, cut)
