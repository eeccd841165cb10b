"""How fast maximum likelihood finds the experts as data grow, with competition and with softmax gating.

What the theory says (CompeteSMoE, arXiv 2505.13380, section 3, and for softmax gating Nguyen, Nguyen and Ho,
"Demystifying softmax gating function in Gaussian mixture of experts", arXiv 2305.03288). Conditions: independent
samples of a Gaussian mixture of k* distinct experts, bounded covariate, compact parameter space, exact maximum
likelihood over mixtures of at most k experts, as many experts gated as atoms share a crowded cell (here all are
gated), experts strongly identifiable (the density and its derivatives by the atom's parameters up to the second order
are linearly independent functions). Then, up to logarithms, the experts' parameters converge at

    exact (k = k*):   n^(-1/2)  for either gating;
    over (k > k*):    n^(-1/4)  where two fitted atoms share a true one, for competition gating (its gate has no
                                parameters of its own) and for softmax gating of strongly identifiable experts such
                                as two-layer ones;
                      n^(-1/8)  for the intercepts (slopes and variances n^(-1/4)) of linear experts under softmax
                                gating, two atoms in a cell: the gate's slope and the experts interact through
                                d2u / d(omega) d(b) = du / d(a) and d2u / db2 = 2 du / d(nu). The least-squares
                                version (arXiv 2402.02952) is slower than every polynomial.

Competition's gate breaks the second relation, for softplus(h) bends with h. Two-layer experts under softmax gating
keep a relation like the first, d2u / d(omega) d(c) = du / d(w), but none for the second derivative by one parameter
twice, which is what the rate needs.

These are upper bounds, sharp in the worst case over mixtures near the truth, and asymptotic. A measured slope that is
steeper does not contradict them; one that is flatter would mean that n is too small or a condition fails. For one fixed
truth, steeper is the rule: in most data sets the most likely extra atom lies away from the truth with a mass of order
n^(-1/2) (here a median of about 0.05 at n = 1,000 and 0.015 at 10,000, at a distance of about 1), and only in the
others do two atoms close in on a true one from both sides, which is what n^(-1/4) is about.
The loss of `voronoi.py` with power 1 is the parameters' error; its part from crowded cells is what the over-specified
rates are about, the rest (single cells, masses) falls like n^(-1/2) throughout. With the paper's power 2 on crowded
cells the whole loss should fall like n^(-1/2) wherever the parameters do like n^(-1/4).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from llava_compete.processes import end_with_parent
from llava_compete.study.fit import maximise, near_truth_starts
from llava_compete.study.mixture import Experts, Family, Gating, sample
from llava_compete.study.voronoi import atoms, masses, voronoi_loss

Specification = Literal["exact", "over"]
TRUE_EXPERTS = 2
WIDTH = 2.0  # the covariate is uniform on [-WIDTH, WIDTH]
# Same experts and noise under both gatings, so that only the gate differs.
_TRUE_EXPERTS: dict[Experts, list[list[float]]] = {
    "linear": [[1.5, 1.0], [-1.5, -0.5]],
    "two_layer": [[2.0, 1.5, 0.5], [1.5, -1.0, 1.0]],
}
_TRUE_VARIANCES = [0.2, 0.3]
_TRUE_GATE_SLOPES = [0.5, -0.5]
_COARSE_FROM = 10_000
# Fits handled in one batch, as fits x samples: bounds memory.
_BATCH = 2_000_000


@dataclass(frozen=True)
class Settings:
    """Size of the study."""

    sizes: tuple[int, ...]
    repetitions: int
    starts: int
    start_spread: float = 0.3
    bootstrap: int = 2000
    seed: int = 0

    @classmethod
    def full(cls) -> Settings:
        """40 repetitions at 100 to 100,000 samples; with 6 starts a third of the data sets missed the maximum."""
        return cls(sizes=(100, 316, 1000, 3162, 10_000, 31_623, 100_000), repetitions=40, starts=24)

    @classmethod
    def quick(cls) -> Settings:
        """The same in small: 10 repetitions up to 3,162 samples."""
        return cls(sizes=(100, 316, 1000, 3162), repetitions=10, starts=4)


@dataclass(frozen=True)
class Slope:
    """Least-squares slope of log mean loss against log n with its 95% bootstrap interval over repetitions."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """Losses of one gating, kind of experts and specification."""

    gating: Gating
    experts: Experts
    specification: Specification
    expected_rate: float  # exponent of the theorem for the slope that `verdict` judges
    sizes: tuple[int, ...]
    errors_NR: list[list[float]]  # parameters' error (power 1), by size and repetition
    crowded_errors_NR: list[list[float]]  # its part from crowded cells; zeros in an exact fit
    paper_losses_NR: list[list[float]]  # the paper's loss (power 2 on crowded cells)
    unconverged: int
    slope: Slope
    crowded_slope: Slope | None  # None in an exact fit
    paper_slope: Slope

    @property
    def verdict(self) -> str:
        """How the slope that the theorem speaks of (crowded cells where there are some) stands to its bound."""
        judged = self.crowded_slope or self.slope
        if judged.high < self.expected_rate:
            return "faster than the bound"
        return "slower than the bound" if judged.low > self.expected_rate else "agrees"


def true_parameters(family: Family) -> Tensor:
    """The true mixture [2, P] of a family."""
    gates = [[0.0] if family.gating == "competition" else [0.0, slope] for slope in _TRUE_GATE_SLOPES]
    rows = [
        gate + eta + [math.log(variance)]
        for gate, eta, variance in zip(gates, _TRUE_EXPERTS[family.experts], _TRUE_VARIANCES, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def expected_rate(gating: Gating, experts: Experts, specification: Specification) -> float:
    """Exponent of the theorem for the parameters' error, see the module's text."""
    if specification == "exact":
        return -1 / 2
    return -1 / 8 if (gating, experts) == ("softmax", "linear") else -1 / 4


def run(settings: Settings, workers: int = 1) -> dict[str, Any]:
    """The whole study as plain data: settings, truth, one entry a curve, and comparisons of the two gatings.

    `workers` processes share the cells; the result does not depend on their number.
    """
    started = time.perf_counter()
    kinds = list(itertools.product(_TRUE_EXPERTS, get_args(Specification), get_args(Gating)))
    # Largest first, so that no worker is left with the longest cell at the end.
    cells = sorted(itertools.product(kinds, settings.sizes), key=lambda cell: (-cell[1], cell[0][1] == "exact"))
    tasks = [(Family(gating, experts), spec, size, settings) for (experts, spec, gating), size in cells]
    with tqdm(total=len(cells), desc="fits", unit="cell") as bar, _mapper(workers) as mapper:
        measured = {}
        for cell, losses in zip(cells, mapper(_measure, tasks), strict=True):
            measured[cell] = losses
            bar.update()
    curves = [_curve(kind, [measured[kind, size] for size in settings.sizes], settings) for kind in kinds]
    return {
        "settings": asdict(settings),
        "true_experts": _TRUE_EXPERTS,
        "true_variances": _TRUE_VARIANCES,
        "true_gate_slopes": _TRUE_GATE_SLOPES,
        "curves": [asdict(curve) | {"verdict": curve.verdict} for curve in curves],
        "error_ratio_softmax_over_competition": [
            _ratio(curves[i], curves[i + 1], settings) for i in range(0, len(curves), 2)
        ],
        "seconds": time.perf_counter() - started,
    }


def fit_slope(sizes: tuple[int, ...], losses_NR: NDArray[np.float64], bootstrap: int, seed: int) -> Slope:
    """Slope of log mean loss on log n, and its interval from resampling the repetitions of each size."""
    log_n = np.log(sizes) - np.mean(np.log(sizes))

    def slope(means: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.log(means) @ log_n / (log_n @ log_n)

    rng = np.random.default_rng(seed)
    count, repetitions = losses_NR.shape
    picks = rng.integers(repetitions, size=(bootstrap, count, repetitions))
    means = np.take_along_axis(losses_NR[None], picks, axis=2).mean(-1)
    low, high = np.quantile(slope(means), [0.025, 0.975])
    return Slope(float(slope(losses_NR.mean(-1))), float(low), float(high))


class _Losses(NamedTuple):
    """Losses of one cell by repetition, and how many of the chosen fits had not converged."""

    errors_R: list[float]
    crowded_R: list[float]
    paper_R: list[float]
    unconverged: int


@contextlib.contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Iterable[_Losses]]]:
    """An ordered map, in this process or over several with a core each."""
    if workers == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        yield pool.map


def _start_worker() -> None:
    end_with_parent()
    torch.set_num_threads(1)


def _measure(task: tuple[Family, Specification, int, Settings]) -> _Losses:
    """All repetitions of one family, specification and sample size."""
    family, specification, size, settings = task
    truth_KP = true_parameters(family)
    true_atoms, true_masses = atoms(family, truth_KP[None])[0], masses(family, truth_KP[None], WIDTH)[0]
    experts = TRUE_EXPERTS + (specification == "over")
    # The data depend on (seed, size) only: exact and over-specified fits see the same samples.
    data_rng = torch.Generator().manual_seed(settings.seed * 1_000_003 + size)
    x_RN, y_RN = sample(family, truth_KP, settings.repetitions, size, WIDTH, data_rng)
    start_rng = torch.Generator().manual_seed(settings.seed * 1_000_003 + size + 1)
    fits = settings.repetitions * settings.starts
    start = near_truth_starts(family, truth_KP, experts, fits, settings.start_spread, start_rng)
    theta, unconverged = _best_fits(family, start, x_RN, y_RN, settings.starts)
    found = atoms(family, theta), masses(family, theta, WIDTH), true_atoms, true_masses
    error = voronoi_loss(*found, crowded_power=1.0)
    paper = voronoi_loss(*found, crowded_power=2.0)
    return _Losses(error.total_B.tolist(), error.crowded_B.tolist(), paper.total_B.tolist(), unconverged)


def _curve(kind: tuple[Experts, Specification, Gating], cells: list[_Losses], settings: Settings) -> Curve:
    experts, specification, gating = kind
    errors, crowded, paper = [c.errors_R for c in cells], [c.crowded_R for c in cells], [c.paper_R for c in cells]

    def slope(losses_NR: list[list[float]]) -> Slope:
        return fit_slope(settings.sizes, np.array(losses_NR), settings.bootstrap, settings.seed)

    return Curve(
        gating,
        experts,
        specification,
        expected_rate(gating, experts, specification),
        settings.sizes,
        errors,
        crowded,
        paper,
        unconverged=sum(cell.unconverged for cell in cells),
        slope=slope(errors),
        crowded_slope=slope(crowded) if specification == "over" else None,
        paper_slope=slope(paper),
    )


def _best_fits(family: Family, start: Tensor, x_RN: Tensor, y_RN: Tensor, starts: int) -> tuple[Tensor, int]:
    """The most likely of `starts` fits for each data set, and how many of those chosen had not converged."""
    repetitions, size = x_RN.shape
    chunk = max(1, _BATCH // (size * starts))
    chosen, missed = [], 0
    for first in range(0, repetitions, chunk):
        rows = slice(first, first + chunk)
        x, y = x_RN[rows].repeat_interleave(starts, 0), y_RN[rows].repeat_interleave(starts, 0)
        theta = start[first * starts : (first + chunk) * starts]
        if size >= _COARSE_FROM:  # most Newton steps on a tenth of the samples, the last ones on all
            theta = maximise(family, theta, x[:, ::10], y[:, ::10]).theta_BKP
        fits = maximise(family, theta, x, y)
        best = fits.value_B.view(-1, starts).argmax(1) + torch.arange(len(x) // starts) * starts
        chosen.append(fits.theta_BKP[best])
        missed += int((~fits.converged_B[best]).sum())
    return torch.cat(chosen), missed


def _ratio(competition: Curve, softmax: Curve, settings: Settings) -> dict[str, Any]:
    """Mean error of softmax over that of competition at each size, with bootstrap intervals.

    Repetitions are resampled in pairs: both gatings see the same covariates and noise.
    """
    rng = np.random.default_rng(settings.seed)
    rows = []
    for size, ours, theirs in zip(settings.sizes, competition.errors_NR, softmax.errors_NR, strict=True):
        picks = rng.integers(len(ours), size=(settings.bootstrap, len(ours)))
        ratios = np.array(theirs)[picks].mean(-1) / np.array(ours)[picks].mean(-1)
        low, high = np.quantile(ratios, [0.025, 0.975])
        ratio = float(np.mean(theirs) / np.mean(ours))
        rows.append({"n": size, "ratio": ratio, "low": float(low), "high": float(high)})
    return {"experts": competition.experts, "specification": competition.specification, "by_size": rows}
