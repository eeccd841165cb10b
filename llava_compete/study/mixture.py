"""Gaussian mixtures of experts in one covariate, with competition or softmax gating: likelihood and derivatives.

    p(y | x) = sum_i pi_i(x) N(y; h(x, eta_i), nu_i),   pi_i = softmax_i(gate_i)

- competition gating (raw affinities as in the method): gate_i = tau_i + log softplus(h(x, eta_i)), so
  pi_i is proportional to exp(tau_i) * softplus(h_i); the gate has no parameters but the atom's mass.
- softmax gating: gate_i = tau_i + omega_i * x, with its own slope.

Experts: linear h = a x + b, and two-layer h = v tanh(w x + c). Everything is batched over fits (repetitions and
starts) in float64, and the first two derivatives are exact and analytic, because rates such as n^(-1/2) are only
visible when each likelihood is maximised far below its own statistical error.

Shape suffixes: B fits, N samples, K experts, P parameters of one expert, H of them inside h.
Parameter order of one expert: tau, [omega], h's parameters, lambda = log nu.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Gating = Literal["competition", "softmax"]
Experts = Literal["linear", "two_layer"]
# Fits x samples worked on at once: small enough that the temporaries stay in a core's cache.
_BLOCK = 16_384


@dataclass(frozen=True)
class Family:
    """Which mixture: its gating and its experts."""

    gating: Gating
    experts: Experts

    @property
    def gate_params(self) -> int:
        """Parameters of an expert that only the gate uses."""
        return 1 if self.gating == "competition" else 2

    @property
    def expert_params(self) -> int:
        """Parameters inside h, without the noise variance."""
        return 2 if self.experts == "linear" else 3

    @property
    def params(self) -> int:
        """Parameters of one expert in all."""
        return self.gate_params + self.expert_params + 1


class Likelihood(NamedTuple):
    """Mean log-likelihood of each fit, its gradient and its Hessian over the flattened [K, P] parameters."""

    value_B: Tensor
    gradient_BQ: Tensor
    hessian_BQQ: Tensor


class _Curve(NamedTuple):
    """h and its derivatives; the parameter axes are lists, so that the sample axis stays last and contiguous."""

    h_BKN: Tensor
    first: list[Tensor]
    second: dict[tuple[int, int], Tensor]  # upper triangle; absent = 0


def _curve(family: Family, eta_BKH1: list[Tensor], x_B1N: Tensor, derivatives: bool) -> _Curve:
    if family.experts == "linear":
        slope, intercept = eta_BKH1
        h_BKN = slope * x_B1N + intercept
        return _Curve(h_BKN, [x_B1N.expand_as(h_BKN), torch.ones_like(h_BKN)] if derivatives else [], {})
    scale, weight, bias = eta_BKH1
    tanh_BKN = torch.tanh(weight * x_B1N + bias)
    h_BKN = scale * tanh_BKN
    if not derivatives:
        return _Curve(h_BKN, [], {})
    slope_BKN = 1 - tanh_BKN.square()
    by_bias_BKN = scale * slope_BKN
    bend_BKN = -2 * tanh_BKN * by_bias_BKN
    second = {
        (0, 1): slope_BKN * x_B1N,
        (0, 2): slope_BKN,
        (1, 1): bend_BKN * x_B1N.square(),
        (1, 2): bend_BKN * x_B1N,
        (2, 2): bend_BKN,
    }
    return _Curve(h_BKN, [tanh_BKN, by_bias_BKN * x_B1N, by_bias_BKN], second)


def _log_affinity(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log softplus(h) and its first two derivatives by h."""
    softplus = torch.logaddexp(h, torch.zeros_like(h))
    sigmoid = torch.sigmoid(h)
    ratio = sigmoid / softplus
    return softplus.log(), ratio, ratio * (1 - sigmoid - ratio)


def _split(family: Family, theta_BKP: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Columns [B, K, 1] of the gate's parameters, of h's parameters, and the log variance."""
    columns = list(theta_BKP.unsqueeze(-1).unbind(2))
    return columns[: family.gate_params], columns[family.gate_params : -1], columns[-1]


def gate_log_probs(family: Family, theta_BKP: Tensor, x_BN: Tensor) -> Tensor:
    """Log gating probabilities [B, K, N]."""
    gate, eta, _ = _split(family, theta_BKP)
    x_B1N = x_BN.unsqueeze(1)
    if family.gating == "softmax":
        scores_BKN = gate[0] + gate[1] * x_B1N
    else:
        scores_BKN = gate[0] + _log_affinity(_curve(family, eta, x_B1N, derivatives=False).h_BKN)[0]
    return torch.log_softmax(scores_BKN, dim=1)


def log_likelihood(family: Family, theta_BKP: Tensor, x_BN: Tensor, y_BN: Tensor) -> Tensor:
    """Mean log-likelihood [B] (without the constant -log(2 pi) / 2)."""
    total_B = torch.zeros(len(theta_BKP), dtype=theta_BKP.dtype)
    for x_part, y_part in _blocks(x_BN, y_BN):
        gate, eta, lam = _split(family, theta_BKP)
        x_B1N = x_part.unsqueeze(1)
        h_BKN = _curve(family, eta, x_B1N, derivatives=False).h_BKN
        if family.gating == "softmax":
            scores_BKN = gate[0] + gate[1] * x_B1N
        else:
            scores_BKN = gate[0] + torch.logaddexp(h_BKN, torch.zeros_like(h_BKN)).log()
        density_BKN = -0.5 * (lam + (y_part.unsqueeze(1) - h_BKN).square() * torch.exp(-lam))
        total_B += (torch.logsumexp(scores_BKN + density_BKN, 1) - torch.logsumexp(scores_BKN, 1)).sum(-1)
    return total_B / x_BN.shape[1]


def likelihood(family: Family, theta_BKP: Tensor, x_BN: Tensor, y_BN: Tensor) -> Likelihood:
    """Mean log-likelihood with exact gradient and Hessian.

    With z_i = gate_i + log N_i, the log-likelihood is logsumexp(z) - logsumexp(gate); for either logsumexp with
    softmax weights r the gradient is r_i dz_i and the Hessian r_i (d2z_i + dz_i dz_i') on the diagonal blocks
    minus (r dz)(r dz)' everywhere.
    """
    fits, experts, params = theta_BKP.shape
    value_B = torch.zeros(fits, dtype=theta_BKP.dtype)
    gradient_BKP = torch.zeros_like(theta_BKP)
    blocks_BKPP = torch.zeros(fits, experts, params, params, dtype=theta_BKP.dtype)
    outer_BQQ = torch.zeros(fits, experts * params, experts * params, dtype=theta_BKP.dtype)
    g0, last = family.gate_params, params - 1
    for x_part, y_part in _blocks(x_BN, y_BN):
        gate, eta, lam = _split(family, theta_BKP)
        x_B1N = x_part.unsqueeze(1)
        h_BKN, first, second = _curve(family, eta, x_B1N, derivatives=True)
        if family.gating == "softmax":
            scores_BKN = gate[0] + gate[1] * x_B1N
            a1 = a2 = torch.zeros_like(h_BKN)
        else:
            affinity_BKN, a1, a2 = _log_affinity(h_BKN)
            scores_BKN = gate[0] + affinity_BKN
        precision = torch.exp(-lam)
        residual = y_part.unsqueeze(1) - h_BKN
        pull = residual * precision  # d log N / dh
        square = residual * pull
        z_BKN = scores_BKN - 0.5 * (lam + square)
        z_total, gate_total = torch.logsumexp(z_BKN, 1, keepdim=True), torch.logsumexp(scores_BKN, 1, keepdim=True)
        value_B += (z_total - gate_total).sum((1, 2))
        for sign, weights, by_h, by_hh, noise in (
            (1.0, torch.exp(z_BKN - z_total), a1 + pull, a2 - precision, True),
            (-1.0, torch.exp(scores_BKN - gate_total), a1, a2, False),
        ):
            if not noise and family.gating == "softmax":
                columns = [torch.ones_like(h_BKN), x_B1N.expand_as(h_BKN)]
            else:
                columns = [torch.ones_like(h_BKN)] + ([x_B1N.expand_as(h_BKN)] if g0 == 2 else [])
                columns += [by_h * slope for slope in first]
                if noise:
                    columns.append(0.5 * (square - 1))
            used = len(columns)
            score_BKPN = torch.stack(columns, 2)
            weighted_BKPN = score_BKPN * weights.unsqueeze(2)
            gradient_BKP[:, :, :used] += sign * weighted_BKPN.sum(-1)
            blocks_BKPP[:, :, :used, :used] += sign * weighted_BKPN @ score_BKPN.transpose(-1, -2)
            full = weighted_BKPN.flatten(1, 2)
            product = (full @ full.transpose(-1, -2)).view(fits, experts, used, experts, used)
            outer_BQQ.view(fits, experts, params, experts, params)[:, :, :used, :, :used] -= sign * product
            if used > g0:
                curve_w, pull_w = weights * by_hh, weights * by_h
                for i in range(len(first)):
                    for j in range(i, len(first)):
                        entry = curve_w * first[i] * first[j]
                        if (i, j) in second:
                            entry = entry + pull_w * second[i, j]
                        _add_symmetric(blocks_BKPP, g0 + i, g0 + j, sign * entry.sum(-1))
                    if noise:
                        _add_symmetric(blocks_BKPP, g0 + i, last, -(weights * pull * first[i]).sum(-1))
                if noise:
                    blocks_BKPP[:, :, last, last] -= 0.5 * (weights * square).sum(-1)
    hessian = outer_BQQ.view(fits, experts, params, experts, params)
    for expert in range(experts):
        hessian[:, expert, :, expert] += blocks_BKPP[:, expert]
    samples = x_BN.shape[1]
    return Likelihood(value_B / samples, gradient_BKP.flatten(1) / samples, outer_BQQ / samples)


def sample(
    family: Family, theta_KP: Tensor, repetitions: int, samples: int, width: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw `repetitions` data sets [repetitions, samples]: x uniform on [-width, width], y from the mixture."""
    x_BN = (2 * torch.rand(repetitions, samples, generator=generator, dtype=torch.float64) - 1) * width
    theta_BKP = theta_KP.expand(repetitions, -1, -1)
    cumulative = gate_log_probs(family, theta_BKP, x_BN).exp().cumsum(1)
    uniform = torch.rand(repetitions, 1, samples, generator=generator, dtype=torch.float64)
    chosen_B1N = (uniform > cumulative[:, :-1]).sum(1, keepdim=True)
    _, eta, lam = _split(family, theta_BKP)
    h_BKN = _curve(family, eta, x_BN.unsqueeze(1), derivatives=False).h_BKN
    scale_BKN = torch.exp(0.5 * lam).expand_as(h_BKN)
    noise = torch.randn(repetitions, samples, generator=generator, dtype=torch.float64)
    y_BN = h_BKN.gather(1, chosen_B1N).squeeze(1) + scale_BKN.gather(1, chosen_B1N).squeeze(1) * noise
    return x_BN, y_BN


def _add_symmetric(blocks_BKPP: Tensor, row: int, column: int, value_BK: Tensor) -> None:
    blocks_BKPP[:, :, row, column] += value_BK
    if row != column:
        blocks_BKPP[:, :, column, row] += value_BK


def _blocks(x_BN: Tensor, y_BN: Tensor) -> list[tuple[Tensor, Tensor]]:
    size = max(256, _BLOCK // max(1, len(x_BN)))
    return list(zip(x_BN.split(size, 1), y_BN.split(size, 1), strict=True))
