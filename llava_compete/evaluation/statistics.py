"""Paired comparison of two or more methods: bootstrap intervals, permutation tests, Holm's correction.

Suffixes: M methods compared with one baseline, S training seeds, U units (questions), B resamples. A benchmark is a set
of units with weights; the mean over benchmarks resamples the units of each on their own. Caller: `evaluation.compare`.
"""

from __future__ import annotations

import itertools
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
    """Score differences to the baseline on one benchmark.

    Attributes:
        differences_MSU: difference of each unit's score, method by method, seed by seed (0 seeds is an error).
        weights_U: weights of the units.
    """

    differences_MSU: Array
    weights_U: Array

    def by_seed_MS(self) -> Array:
        """Weighted mean difference of each pair of runs."""
        return self.differences_MSU @ self.weights_U / self.weights_U.sum()


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
        p_runs: exact permutation test over which runs belong to which method, two-sided; None with one seed.
    """

    mean: float
    over_questions: Interval
    over_seeds: Interval | None
    p_questions: float
    p_runs: float | None


def compare(
    benchmarks: Sequence[Benchmark], scores: Sequence[tuple[Array, Array]], resamples: int = 10_000, seed: int = 0
) -> list[Difference]:
    """Compare every method with the baseline on the mean of the benchmarks (give one for that benchmark alone).

    Args:
        benchmarks: all with the same M and S.
        scores: for each benchmark the scores of the runs, baseline [S] and methods [M, S], for `p_runs`.
        resamples: B, of the bootstrap and of the permutations.
    """
    rng = np.random.default_rng(seed)
    observed_MS = np.mean([benchmark.by_seed_MS() for benchmark in benchmarks], axis=0)
    observed_M = observed_MS.mean(axis=1)
    num_seeds = observed_MS.shape[1]
    boot_BM = np.mean([_bootstrap(benchmark, rng, resamples) for benchmark in benchmarks], axis=0)
    flipped_BM = np.mean([_sign_flips(benchmark, rng, resamples) for benchmark in benchmarks], axis=0)
    # A hair's breadth below the observed value, so that equal values count as equal whatever the order of summing.
    extreme_BM = np.abs(flipped_BM) >= np.abs(observed_M) * (1 - 1e-9) - 1e-12
    p_M = (1 + extreme_BM.sum(axis=0)) / (resamples + 1)
    baseline_S = np.mean([baseline for baseline, _ in scores], axis=0)
    methods_MS = np.mean([methods for _, methods in scores], axis=0)
    found = []
    for index, mean in enumerate(observed_M):
        seeds = None
        if num_seeds > 1:
            # Resampling a handful of seeds understates their spread: the error of their mean is drawn from Student's t.
            error = observed_MS[index].std(ddof=1) / math.sqrt(num_seeds)
            seeds = _percentiles(boot_BM[:, index] + error * rng.standard_t(num_seeds - 1, size=resamples))
        found.append(
            Difference(
                mean=float(mean),
                over_questions=_percentiles(boot_BM[:, index]),
                over_seeds=seeds,
                p_questions=float(p_M[index]),
                p_runs=permute_runs(baseline_S, methods_MS[index]) if num_seeds > 1 else None,
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


def permute_runs(first_S: Array, second_S: Array) -> float:
    """Two-sided exact test of a difference in mean, over all ways to split the runs in two groups of the same sizes."""
    pooled = np.concatenate([first_S, second_S])
    size = len(first_S)
    observed = abs(first_S.mean() - second_S.mean())
    splits = np.array(list(itertools.combinations(range(len(pooled)), size)))
    first_sums = pooled[splits].sum(axis=1)
    gaps = np.abs(first_sums / size - (pooled.sum() - first_sums) / (len(pooled) - size))
    return float((gaps >= observed - 1e-12).mean())


def _bootstrap(benchmark: Benchmark, rng: np.random.Generator, resamples: int) -> Array:
    """Weighted mean differences [B, M] of resampled units; every method and seed sees the same resample."""
    weighted_UM = (benchmark.differences_MSU.mean(axis=1) * benchmark.weights_U).T
    rows = []
    for count in _chunks(resamples, len(weighted_UM)):
        drawn_BU = rng.integers(len(weighted_UM), size=(count, len(weighted_UM)))
        totals_B1 = benchmark.weights_U[drawn_BU].sum(axis=1, keepdims=True)
        sums_BM = np.stack([column[drawn_BU].sum(axis=1) for column in weighted_UM.T], axis=1)
        rows.append(sums_BM / totals_B1)
    return np.concatenate(rows)


def _sign_flips(benchmark: Benchmark, rng: np.random.Generator, resamples: int) -> Array:
    """Weighted mean differences [B, M] after swapping method and baseline on each unit at random."""
    weighted_UM = (benchmark.differences_MSU.mean(axis=1) * benchmark.weights_U).T / benchmark.weights_U.sum()
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
