"""Paired tests over trainings: Student's t, equivalence, power, and Holm's correction. The one owner of these.

A comparison of two methods is one of trainings: each is run with the same S seeds, and the S paired differences are the
sample. Each method is tested by its own differences: a variance pooled over methods gives a noisy one too short an
interval (84.5% in place of 95%). A handful of trainings is never resampled: percentiles of three values know no tails.
Numbers are in the unit of the given differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats
from scipy.optimize import brentq

Array = NDArray[np.float64]
LEVEL = 0.05
POWER = 0.8


class Interval(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True)
class PairedT:
    """A paired t-test.

    Attributes:
        mean: mean of the differences.
        deviation: their standard deviation (n - 1).
        interval: 95% for the true mean; None, as `p`, where all differences are equal and not 0: they have no spread
            to measure by.
        p: two-sided.
    """

    mean: float
    deviation: float
    interval: Interval | None
    p: float | None


def paired_t(differences: Sequence[float] | Array) -> PairedT:
    """Test at least two paired differences against 0."""
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2:
        raise ValueError(f"found {len(values)} difference, expected at least 2")
    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    if deviation <= 1e-12 * max(1.0, abs(mean)):
        none = abs(mean) <= 1e-12
        return PairedT(mean, 0.0, Interval(mean, mean) if none else None, 1.0 if none else None)
    found = stats.ttest_1samp(values, 0.0)
    low, high = found.confidence_interval(1 - LEVEL)
    return PairedT(mean, deviation, Interval(float(low), float(high)), float(found.pvalue))


def equivalence(differences: Sequence[float] | Array, margin: float) -> float:
    """p of two one-sided tests (TOST): small where the true mean lies within -margin and +margin."""
    if not margin > 0:
        raise ValueError(f"margin: found {margin}, expected a number above 0")
    values = np.asarray(differences, dtype=np.float64)
    if values.std(ddof=1) <= 1e-12 * max(1.0, abs(values.mean())):
        return 1.0  # no spread to measure by
    above = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(values, margin, alternative="less").pvalue
    return float(max(above, below))


def power(effect: float, deviation: float, runs: int, level: float = LEVEL) -> float:
    """The chance that a two-sided paired t over `runs` finds a true difference, by the non-central t.

    Args:
        effect: the true mean difference.
        deviation: standard deviation of the paired differences.
        level: below which p counts.
    """
    freedom = runs - 1
    critical = special.stdtrit(freedom, 1 - level / 2)
    shift = abs(effect) / deviation * math.sqrt(runs)
    # The wrong side's tail is below P(Z < -shift), and its series ends in NaN where that is nothing.
    wrong_side = stats.nct.cdf(-critical, freedom, shift) if shift < 6 else 0.0
    return float(stats.nct.sf(critical, freedom, shift) + wrong_side)


def detectable_effect(deviation: float, runs: int, level: float = LEVEL) -> float:
    """The smallest true difference that `runs` trainings find with a power of 80%."""
    if deviation == 0:
        return 0.0
    # The critical value bounds it from above but for few runs, whose tails are long: 10 critical values always do.
    high = 10 * float(special.stdtrit(runs - 1, 1 - level / 2)) * deviation / math.sqrt(runs)
    return float(brentq(lambda effect: power(effect, deviation, runs, level) - POWER, 0.0, high))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: adjusted p-values, in the given order."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
