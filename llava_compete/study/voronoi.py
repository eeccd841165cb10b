"""The Voronoi loss between a fitted and a true mixing measure.

Each fitted atom belongs to the cell of the nearest true atom. With Delta the difference of the experts' parameters
(eta, nu) and m the atoms' masses,

    loss = sum_j sum_{i in cell j} m_i |Delta_ij|^(r_j) + sum_j | sum_{i in cell j} m_i - m*_j |,

where r_j = 1 if cell j has one fitted atom, else `crowded_power`: 2 in the paper's loss, which then falls like
n^(-1/2) when the theorem holds, and 1 to read off the rate of the parameters themselves. The mass of an atom is its
mean gating probability over the covariate, which needs no gauge (exp(tau) is defined up to a common shift).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llava_compete.study.mixture import Family, gate_log_probs


def atoms(family: Family, theta_BKP: Tensor) -> Tensor:
    """Experts' parameters and noise variance [B, K, H + 1]; a two-layer expert with its sign fixed (v > 0)."""
    eta = theta_BKP[:, :, family.gate_params : -1]
    if family.experts == "two_layer":  # v tanh(z) = (-v) tanh(-z)
        eta = eta * torch.where(eta[:, :, :1] < 0, -1.0, 1.0)
    return torch.cat([eta, theta_BKP[:, :, -1:].exp()], -1)


def masses(family: Family, theta_BKP: Tensor, width: float, points: int = 201) -> Tensor:
    """Mean gating probability [B, K] of each atom over x uniform on [-width, width]."""
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points * 2 - 1
    return gate_log_probs(family, theta_BKP, (grid * width).expand(len(theta_BKP), -1)).exp().mean(-1)


class VoronoiLoss(NamedTuple):
    """The loss [B] of each fit in its three parts."""

    single_B: Tensor  # cells with one fitted atom
    crowded_B: Tensor  # cells with several: where the over-specified rates apply
    mass_B: Tensor

    @property
    def total_B(self) -> Tensor:
        """The loss itself."""
        return self.single_B + self.crowded_B + self.mass_B


def voronoi_loss(
    atoms_BKA: Tensor, masses_BK: Tensor, true_atoms_JA: Tensor, true_masses_J: Tensor, crowded_power: float
) -> VoronoiLoss:
    """Loss of each fit [B] with K atoms against one truth of J atoms."""
    distance_BKJ = torch.cdist(atoms_BKA, true_atoms_JA.expand(len(atoms_BKA), -1, -1))
    nearest_BK = distance_BKJ.argmin(-1)
    member_BKJ = torch.nn.functional.one_hot(nearest_BK, len(true_atoms_JA)).to(masses_BK.dtype)
    crowded_BK = (member_BKJ.sum(1) > 1).gather(1, nearest_BK)
    own_BK = distance_BKJ.gather(-1, nearest_BK.unsqueeze(-1)).squeeze(-1)
    mass_error_BJ = (torch.einsum("bk,bkj->bj", masses_BK, member_BKJ) - true_masses_J).abs()
    return VoronoiLoss(
        single_B=(masses_BK * own_BK * ~crowded_BK).sum(1),
        crowded_B=(masses_BK * own_BK**crowded_power * crowded_BK).sum(1),
        mass_B=mass_error_BJ.sum(1),
    )
