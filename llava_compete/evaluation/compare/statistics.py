"""Paired comparison of two or more methods: bootstrap intervals, permutation tests, Holm's correction.

Suffixes: M methods compared with one baseline, S training seeds, U units (questions), B resamples. A benchmark is a set
of units with weights; the mean over benchmarks resamples the units of each on their own. Units are a random sample of
questions, seeds a random sample of trainings; both may enter an interval. Caller: `evaluation.compare`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_CELLS = 4_000_000  # numbers drawn at a time


@dataclass(frozen=True)
class Benchmark:
    """Scores of all runs on one benchmark.

    Attributes:
        scores_MSU: score of each unit, seed by seed, of the baseline and then of the M methods: [M + 1, S, U].
        weights_U: weights of the units.
    """

    scores_MSU: Array
    weights_U: Array

    def by_run_MS(self) -> Array:
        """The benchmark's score of each run: [M + 1, S]."""
        return self.scores_MSU @ self.weights_U / self.weights_U.sum()

    def weighted_differences_UM(self) -> Array:
        """Difference to the baseline of each unit's mean over seeds, times the unit's weight: [U, M]."""
        by_method = self.scores_MSU.mean(axis=1)
        return ((by_method[1:] - by_method[:1]) * self.weights_U).T


class Interval(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """One method against the baseline; differences are in the unit of the scores.

    Attributes:
        mean: mean over seeds and units.
        over_questions: 95% interval if the same trained models met other questions of the same kind.
        over_seeds: 95% interval if the training were repeated as well; None with one seed.
        p_questions: paired permutation test over questions, two-sided, for these trained models.
        p_seeds: two-sided p-value of the distribution behind `over_seeds`; None with one seed.
    """

    mean: float
    over_questions: Interval
    over_seeds: Interval | None
    p_questions: float
    p_seeds: float | None


def compare(benchmarks: Sequence[Benchmark], resamples: int = 10_000, seed: int = 0) -> list[Difference]:
    """Compare every method with the baseline on the mean of the benchmarks (give one for that benchmark alone).

    The interval over seeds adds two errors: the resampled questions, and the error of a mean over S trainings, which is
    drawn from Student's t because resampling a handful of seeds understates their spread. The spread of the runs
    holds some of the first error too, so the interval is rather too wide than too narrow.

    Args:
        benchmarks: all with the same M and S.
        resamples: B, of the bootstrap and of the permutations.
    """
    rng = np.random.default_rng(seed)
    by_run_MS = np.mean([benchmark.by_run_MS() for benchmark in benchmarks], axis=0)
    observed_M = (by_run_MS[1:] - by_run_MS[:1]).mean(axis=1)
    boot_BM = np.mean([_bootstrap(benchmark, rng, resamples) for benchmark in benchmarks], axis=0)
    flipped_BM = np.mean([_sign_flips(benchmark, rng, resamples) for benchmark in benchmarks], axis=0)
    # A hair's breadth below the observed value, so that equal values count as equal whatever the order of summing.
    extreme_BM = np.abs(flipped_BM) >= np.abs(observed_M) * (1 - 1e-9) - 1e-12
    p_M = (1 + extreme_BM.sum(axis=0)) / (resamples + 1)
    seeds_B = _seed_errors(by_run_MS, rng, resamples)
    found = []
    for index, mean in enumerate(observed_M):
        both_B = None if seeds_B is None else boot_BM[:, index] + seeds_B
        found.append(
            Difference(
                mean=float(mean),
                over_questions=_percentiles(boot_BM[:, index]),
                over_seeds=None if both_B is None else _percentiles(both_B),
                p_questions=float(p_M[index]),
                p_seeds=None if both_B is None else _two_sided(both_B),
            )
        )
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: adjusted p-values, in the given order."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _seed_errors(by_run_MS: Array, rng: np.random.Generator, resamples: int) -> Array | None:
    """Draws [B] of the error that a mean difference over S seeds has from the choice of seeds; None with one seed.

    Two-way analysis of variance: what the methods' and the seeds' means leave of the runs' scores is the spread of a
    training, taken to be alike for all methods, with M (S - 1) degrees of freedom. For one method this is the paired t.
    """
    methods, seeds = by_run_MS.shape
    if seeds < 2:
        return None
    freedom = (methods - 1) * (seeds - 1)
    means = by_run_MS.mean(axis=1, keepdims=True) + by_run_MS.mean(axis=0, keepdims=True) - by_run_MS.mean()
    variance = ((by_run_MS - means) ** 2).sum() / freedom
    return math.sqrt(2 * variance / seeds) * rng.standard_t(freedom, size=resamples)


def _bootstrap(benchmark: Benchmark, rng: np.random.Generator, resamples: int) -> Array:
    """Weighted mean differences [B, M] of resampled units; every method and seed sees the same resample."""
    weighted_UM, units = benchmark.weighted_differences_UM(), len(benchmark.weights_U)
    rows = []
    for count in _chunks(resamples, units):
        drawn_BU = rng.integers(units, size=(count, units)) + np.arange(count)[:, None] * units
        times_BU = np.bincount(drawn_BU.ravel(), minlength=count * units).reshape(count, units).astype(np.float64)
        rows.append(times_BU @ weighted_UM / (times_BU @ benchmark.weights_U)[:, None])
    return np.concatenate(rows)


def _sign_flips(benchmark: Benchmark, rng: np.random.Generator, resamples: int) -> Array:
    """Weighted mean differences [B, M] after swapping method and baseline on each unit at random."""
    weighted_UM = benchmark.weighted_differences_UM() / benchmark.weights_U.sum()
    rows = [
        rng.choice(np.array([-1.0, 1.0]), size=(count, len(weighted_UM))) @ weighted_UM
        for count in _chunks(resamples, len(weighted_UM))
    ]
    return np.concatenate(rows)


def _chunks(total: int, width: int) -> Iterator[int]:
    size = max(_CELLS // width, 1)
    while total > 0:
        yield min(size, total)
        total -= size


def _percentiles(values_B: Array) -> Interval:
    low, high = np.percentile(values_B, [2.5, 97.5])
    return Interval(float(low), float(high))


def _two_sided(values_B: Array) -> float:
    """Twice the smaller share of draws on either side of zero."""
    beyond = min((values_B <= 0).sum(), (values_B >= 0).sum())
    return min(1.0, 2 * (1 + float(beyond)) / (len(values_B) + 1))
