"""Maximum likelihood by a batched Newton method, many fits at once.

Saddle-free Newton steps (the Hessian's eigenvalues by their absolute value) with a backtracking line search for each
fit, in the compact box that the theorems assume; fits that have converged leave the batch. Newton and not EM: in an
over-specified fit EM's steps shrink like those of a sublinear method just where the rates are measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llava_compete.study.mixture import Family, likelihood, log_likelihood

# A fit stops when a Newton step promises less than this of the *total* log-likelihood (statistical error is about 1).
_GAIN = 1e-5
_CURVATURE_FLOOR = 1e-9
_BACKTRACKS = 12


@dataclass(frozen=True)
class Box:
    """The compact parameter space: bounds [P] of one expert's parameters."""

    lower_P: Tensor
    upper_P: Tensor

    @classmethod
    def of(cls, family: Family) -> Box:
        """Masses within e^(+-8), every slope, weight and offset within +-6, variances between 0.02 and 8."""
        lower = [-8.0] + [-6.0] * (family.params - 2) + [-4.0]
        upper = [8.0] + [6.0] * (family.params - 2) + [2.1]
        return cls(torch.tensor(lower, dtype=torch.float64), torch.tensor(upper, dtype=torch.float64))


class Fits(NamedTuple):
    """Result of a batch: parameters, mean log-likelihood, which converged, and Newton steps used."""

    theta_BKP: Tensor
    value_B: Tensor
    converged_B: Tensor
    steps: int


def maximise(family: Family, start_BKP: Tensor, x_BN: Tensor, y_BN: Tensor, max_steps: int = 150) -> Fits:
    """Maximise the likelihood of each data set x_BN, y_BN from its start; shapes in `mixture.py`."""
    box = Box.of(family)
    theta_BKP = _normalise(family, start_BKP.clone(), box)
    value_B = log_likelihood(family, theta_BKP, x_BN, y_BN)
    active = torch.arange(len(theta_BKP))
    converged_B = torch.zeros(len(theta_BKP), dtype=torch.bool)
    samples = x_BN.shape[1]
    steps = 0
    while len(active) and steps < max_steps:
        steps += 1
        here, x, y = theta_BKP[active], x_BN[active], y_BN[active]
        direction_BQ, gain_B = _direction(family, here, x, y, box)
        moved = torch.zeros(len(active), dtype=torch.bool)
        best, best_value = here.clone(), value_B[active]
        waiting = torch.arange(len(active))
        scale = 1.0
        for _ in range(_BACKTRACKS):
            trial = _normalise(family, here[waiting] + scale * direction_BQ[waiting].view_as(here[waiting]), box)
            trial_value = log_likelihood(family, trial, x[waiting], y[waiting])
            better = trial_value > best_value[waiting] + 1e-4 * scale * gain_B[waiting]
            taken = waiting[better]
            best[taken], best_value[taken], moved[taken] = trial[better], trial_value[better], True
            waiting = waiting[~better]
            if not len(waiting):
                break
            scale *= 0.5
        theta_BKP[active], value_B[active] = best, best_value
        # A line search that cannot improve although the model promises to has reached rounding: also done.
        done = (gain_B * samples < _GAIN) | ~moved
        converged_B[active[done & (gain_B * samples < 1e-2)]] = True
        active = active[~done]
    return Fits(theta_BKP, value_B, converged_B, steps)


def near_truth_starts(
    family: Family, truth_KP: Tensor, experts: int, fits: int, spread: float, generator: torch.Generator
) -> Tensor:
    """Starts [fits, experts, P]: the true atoms, some twice when experts > K, all moved by N(0, spread^2).

    A true atom that is taken twice shares its mass between its copies. The atoms take turns from fit to fit, so that
    several starts on one data set double different ones: the best fit may crowd any of them. The spread does not
    depend on the sample size, so that a start cannot bring a rate with it.
    """
    true_experts = len(truth_KP)
    extra = (torch.arange(fits).unsqueeze(1) + torch.arange(experts - true_experts)) % true_experts
    index = torch.cat([torch.arange(true_experts).expand(fits, -1), extra], 1)
    start = truth_KP[index].clone()
    copies = (index.unsqueeze(2) == index.unsqueeze(1)).sum(2)
    start[:, :, 0] -= copies.double().log()
    return start + spread * torch.randn(start.shape, generator=generator, dtype=torch.float64)


def _direction(family: Family, theta_BKP: Tensor, x_BN: Tensor, y_BN: Tensor, box: Box) -> tuple[Tensor, Tensor]:
    """Ascent direction [B, Q] and the gain in mean log-likelihood that the quadratic model promises [B]."""
    _, gradient_BQ, hessian_BQQ = likelihood(family, theta_BKP, x_BN, y_BN)
    flat = theta_BKP.flatten(1)
    lower, upper = (bound.repeat(theta_BKP.shape[1]) for bound in (box.lower_P, box.upper_P))
    # At a bound with the gradient pointing outwards the coordinate is held.
    held = ((flat <= lower + 1e-9) & (gradient_BQ < 0)) | ((flat >= upper - 1e-9) & (gradient_BQ > 0))
    free = (~held).double()
    gradient_BQ = gradient_BQ * free
    hessian_BQQ = hessian_BQQ * free.unsqueeze(1) * free.unsqueeze(2) - torch.diag_embed(1 - free)
    values, vectors = torch.linalg.eigh(hessian_BQQ)
    along = (vectors.transpose(-1, -2) @ gradient_BQ.unsqueeze(-1)).squeeze(-1)
    step = along / values.abs().clamp_min(_CURVATURE_FLOOR)
    direction_BQ = (vectors @ step.unsqueeze(-1)).squeeze(-1)
    longest = direction_BQ.abs().amax(1, keepdim=True)
    direction_BQ = direction_BQ * torch.clamp(1.0 / longest.clamp_min(1e-30), max=1.0)
    return direction_BQ, (direction_BQ * gradient_BQ).sum(1) / 2


def _normalise(family: Family, theta_BKP: Tensor, box: Box) -> Tensor:
    """Fix the gauge (gating parameters are defined up to a common shift) and project into the box."""
    theta_BKP = theta_BKP.clone()
    gate = theta_BKP[:, :, : family.gate_params]
    theta_BKP[:, :, : family.gate_params] = gate - gate.mean(1, keepdim=True)
    return theta_BKP.clamp(box.lower_P, box.upper_P)
