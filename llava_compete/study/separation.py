"""How well data can tell one expert from two that lie 2 e apart: the exact curve behind the over-specified rates.

For each e, the nearest mixture to the truth in which one true expert is represented by two of equal mass parameter,
whose parameters (of h) lie 2 e apart in the direction that is hardest to see; all else is free. Its squared Hellinger
distance to the truth is what n samples multiply: they tell the two from one where n x distance² is about 1. A distance²
of order e^s means that n samples leave an uncertainty of n^(-1/s) in e: s = 8 for linear experts under softmax gating,
4 where the gate or the experts bend. No sampling, no local maxima of a likelihood: quadrature and Gauss-Newton.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_compete.files import write_figure
from llava_compete.study.mixture import Experts, Family, Gating, gate_log_probs
from llava_compete.study.sample_efficiency import WIDTH, true_parameters

DISTANCES = tuple(np.geomspace(0.02, 0.8, 11).tolist())
_GRID_X, _GRID_Y, _REACH = 24, 90, 6.0
_STEPS = 40
_SLOPE_OVER = 4


@dataclass(frozen=True)
class Curve:
    """Squared Hellinger distance at each e, and its slope in log-log over the four smallest e."""

    gating: Gating
    experts: Experts
    distances: tuple[float, ...]
    squared_hellinger: tuple[float, ...]

    @property
    def slope(self) -> float:
        few = slice(_SLOPE_OVER)
        e, h = np.log(self.distances[few]), np.log(self.squared_hellinger[few])
        return float(np.polyfit(e, h, 1)[0])

    def told_apart(self, samples: float) -> float:
        """The e at which samples x distance² is 1, by interpolation in logarithms."""
        return float(np.exp(np.interp(-math.log(samples), np.log(self.squared_hellinger), np.log(self.distances))))


def curve(family: Family, distances: tuple[float, ...] = DISTANCES) -> Curve:
    """The curve of a family; of the two true experts the one that is harder to tell."""
    grid = _Grid(family)
    found = np.full(len(distances), np.inf)
    for split in range(2):
        for axis in range(family.expert_params):
            point = _start(family, split, axis)
            for place in reversed(range(len(distances))):  # from far apart to near, each from the last one's end
                point, value = _nearest(grid, family, split, point, distances[place])
                found[place] = min(found[place], value)
    return Curve(family.gating, family.experts, distances, tuple(found.tolist()))


def run() -> dict[str, Any]:
    """All four curves as plain data, and from which n on competition tells nearer experts apart than softmax."""
    curves = {
        (experts, gating): curve(Family(gating, experts))
        for experts in ("linear", "two_layer")
        for gating in ("softmax", "competition")
    }
    return {
        "curves": [
            {
                "experts": one.experts,
                "gating": one.gating,
                "distances": one.distances,
                "squared_hellinger": one.squared_hellinger,
                "slope": one.slope,
            }
            for one in curves.values()
        ],
        "pays_from_n": {
            experts: pays_from(curves[experts, "softmax"], curves[experts, "competition"])
            for experts in ("linear", "two_layer")
        },
        "told_apart": [
            {
                "experts": experts,
                "n": n,
                **{gating: curves[experts, gating].told_apart(n) for gating in ("softmax", "competition")},
            }
            for experts in ("linear", "two_layer")
            for n in (10**3, 10**4, 10**5, 10**6, 10**7, 10**8)
        ],
    }


def pays_from(softmax: Curve, competition: Curve) -> float | None:
    """The n at which the curves cross on their way to small e; None where competition's is not the higher one there."""
    ratio = np.log(competition.squared_hellinger) - np.log(softmax.squared_hellinger)
    if ratio[0] <= 0:
        return None
    below = np.flatnonzero(ratio <= 0)
    if not len(below):
        return 1 / softmax.squared_hellinger[-1]
    right = int(below[0])
    share = ratio[right - 1] / (ratio[right - 1] - ratio[right])
    logs = np.log(softmax.squared_hellinger)
    return float(np.exp(-(logs[right - 1] + share * (logs[right] - logs[right - 1]))))


class _Grid:
    """Quadrature points of (x, y) and the square root of the true density there, times that of the weights."""

    def __init__(self, family: Family) -> None:
        nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(_GRID_X))
        self.x_N = nodes * WIDTH
        self.y_M = torch.linspace(-_REACH, _REACH, _GRID_Y, dtype=torch.float64)
        step = float(self.y_M[1] - self.y_M[0])
        self.root_weight_NM = (weights / 2 * step).sqrt()[:, None].expand(-1, _GRID_Y)
        self.truth = self.root(family, true_parameters(family))

    def root(self, family: Family, theta_KP: Tensor) -> Tensor:
        """sqrt(p(y | x) x weight) at all points, flat."""
        log_gate_KN = gate_log_probs(family, theta_KP[None], self.x_N[None])[0]
        eta = theta_KP[:, family.gate_params : -1, None]
        if family.experts == "linear":
            h_KN = eta[:, 0] * self.x_N + eta[:, 1]
        else:
            h_KN = eta[:, 0] * torch.tanh(eta[:, 1] * self.x_N + eta[:, 2])
        lam = theta_KP[:, -1, None, None]
        log_normal = -0.5 * (math.log(2 * math.pi) + lam + (self.y_M - h_KN[..., None]) ** 2 * torch.exp(-lam))
        return (torch.logsumexp(log_gate_KN[..., None] + log_normal, 0) / 2).exp().mul(self.root_weight_NM).flatten()


def _start(family: Family, split: int, axis: int) -> Tensor:
    """The truth with one expert doubled, and a direction along one of its parameters: see `_mixture`."""
    truth = true_parameters(family)
    own, other = truth[split], truth[1 - split]
    gate = own[:1] - math.log(2)
    slopes = own[1 : family.gate_params].repeat(2)
    direction = torch.zeros(family.expert_params, dtype=torch.float64)
    direction[axis] = 1.0
    # Never exactly along it: a saddle by symmetry would hold the search.
    direction = direction + 0.1
    middle, noise = own[family.gate_params : -1], own[-1:].repeat(2)
    return torch.cat([gate, slopes, middle, direction, noise, other[family.gate_params :]])


def _mixture(family: Family, split: int, point: Tensor, e: float) -> Tensor:
    """Parameters [3, P] of a point: the pair's tau, its gate slopes, middle, direction, log variances, and the other
    expert's h and log variance, whose gate is held as the gauge."""
    gates, inner = family.gate_params - 1, family.expert_params
    tau, slopes, middle, direction, noise, other = point.split([1, 2 * gates, inner, inner, 2, inner + 1])
    apart = e * direction / direction.norm()
    pair = [
        torch.cat([tau, slopes[side * gates : (side + 1) * gates], middle + sign * apart, noise[side : side + 1]])
        for side, sign in enumerate((1.0, -1.0))
    ]
    held = true_parameters(family)[1 - split, : family.gate_params]
    return torch.stack([*pair, torch.cat([held, other])])


def _nearest(grid: _Grid, family: Family, split: int, point: Tensor, e: float) -> tuple[Tensor, float]:
    """Levenberg-Marquardt on sqrt(p) - sqrt(truth); the point and the squared Hellinger distance, 1/2 |residual|²."""

    def residual(at: Tensor) -> Tensor:
        return grid.root(family, _mixture(family, split, at, e)) - grid.truth

    here, damping = residual(point), 1e-3
    for _ in range(_STEPS):
        jacobian = torch.func.jacfwd(residual)(point)
        normal, gradient = jacobian.T @ jacobian, jacobian.T @ here
        before = float(here @ here)
        for _ in range(8):
            scaled = normal + damping * torch.diag(normal.diagonal().clamp(min=1e-12))
            trial = point - torch.linalg.solve(scaled, gradient)
            there = residual(trial)
            if float(there @ there) < before:
                point, here, damping = trial, there, max(damping / 5, 1e-12)
                break
            damping *= 5
        else:
            break
        if float(here @ here) > before * (1 - 1e-6):
            break
    return point, float(here @ here) / 2


_NAMES = {"linear": "linear experts", "two_layer": "two-layer experts"}


def describe(result: dict[str, Any], command: str) -> str:
    """Markdown: slopes, the distances that n samples tell apart, and from which n on competition pays."""
    lines = [
        "# Separation: one expert, or two that lie 2 e apart?",
        "",
        f"`{command}`: exact, by quadrature; no samples.",
        "",
        "Squared Hellinger distance from the truth to the nearest mixture in which two experts of equal mass",
        "parameter, 2 e apart, stand for one. n samples tell the two from one where n x distance² is about 1.",
        "",
        "| experts | gating | slope in logarithms | " + " | ".join(f"e at n = 1e{p}" for p in range(3, 9)) + " |",
        "| --- | --- | --- |" + " --- |" * 6,
    ]
    for one in result["curves"]:
        cells = [f"{row[one['gating']]:.3f}" for row in result["told_apart"] if row["experts"] == one["experts"]]
        lines.append(f"| {one['experts']} | {one['gating']} | {one['slope']:.1f} | " + " | ".join(cells) + " |")
    lines.append("")
    for experts, samples in result["pays_from_n"].items():
        where = "at no n of this range" if samples is None else f"from n of about {samples:.1e} on"
        lines.append(f"{_NAMES[experts].capitalize()}: competition tells nearer experts apart than softmax {where}.")
    return "\n".join([*lines, ""])


def draw(result: dict[str, Any], path: Path) -> None:
    """Distance² against e, a panel a kind of experts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    panels = dict(zip(_NAMES, axes, strict=True))
    for one in result["curves"]:
        label = f"{one['gating']}: slope {one['slope']:.1f}"
        panels[one["experts"]].plot(one["distances"], one["squared_hellinger"], "o-", ms=4, label=label)
    for experts, axis in panels.items():
        axis.set(xscale="log", yscale="log", xlabel="e", title=_NAMES[experts])
        axis.legend()
    axes[0].set_ylabel("squared Hellinger distance")
    write_figure(path, figure, dpi=120)
    plt.close(figure)
