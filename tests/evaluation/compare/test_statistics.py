"""The t-test against a table, equivalence and power against simulation, Holm's correction against its definition.

Coverage by simulation is the slow part: intervals hold the truth as often as they say, also for a noisy method.
"""

from __future__ import annotations

import numpy as np
import pytest

from llava_compete.evaluation.compare.statistics import (
    detectable_effect,
    equivalence,
    holm,
    paired_t,
    power,
)


def test_the_paired_t_is_the_textbooks():
    """Student's sleep data: extra hours with two drugs on ten patients; t = -4.0621, p = 0.002833 (R, ?t.test)."""
    first = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
    second = np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
    found = paired_t(first - second)
    assert found.mean == pytest.approx(-1.58)
    assert found.p == pytest.approx(0.002833, abs=1e-6)
    assert found.interval == pytest.approx((-2.4598858, -0.7001142), abs=1e-6)


def test_equal_differences_have_no_spread_to_measure_by():
    assert paired_t([0.0, 0.0, 0.0]) == (found := paired_t([0.0, 0.0]))
    assert (found.p, found.interval) == (1.0, (0.0, 0.0))
    constant = paired_t([2.0, 2.0, 2.0])
    assert (constant.mean, constant.p, constant.interval) == (2.0, None, None)
    assert equivalence([0.1, 0.1], 5.0) == 1.0
    with pytest.raises(ValueError, match="at least 2"):
        paired_t([1.0])


def test_equivalence_is_two_one_sided_tests():
    """By hand: mean 0.1, standard error 0.1 with 3 degrees of freedom, so t = 9 against +1 and 11 against -1."""
    differences = np.array([-0.1, 0.1, 0.1, 0.3])
    scale = 0.2 / differences.std(ddof=1)
    differences = 0.1 + (differences - 0.1) * scale
    assert equivalence(differences, 1.0) == pytest.approx(0.0014479, abs=1e-6)  # P(t3 > 9), from a table of t
    assert equivalence(differences, 0.05) > 0.5
    with pytest.raises(ValueError, match="margin"):
        equivalence(differences, 0.0)


def test_power_is_what_a_table_says():
    """Cohen's effect 0.5: 34 pairs have a power of 80% at 5% (G*Power: n = 34, power 0.8077775)."""
    assert power(0.5, 1.0, 34) == pytest.approx(0.8077775, abs=1e-6)
    assert power(0.0, 1.0, 5, level=0.01) == pytest.approx(0.01)
    for runs in (2, 3, 10, 30):
        for level in (0.05, 0.05 / 7):
            assert power(detectable_effect(2.0, runs, level), 2.0, runs, level) == pytest.approx(0.8)
    assert detectable_effect(2.0, 10) == pytest.approx(2 * detectable_effect(1.0, 10))
    assert detectable_effect(0.0, 3) == 0


def test_holm_is_step_down():
    # 0.01·3, then 0.02·2, then 0.04·1, and never below an earlier one
    assert holm([0.02, 0.01, 0.04]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def runs_of(rng: np.random.Generator, seeds: int, effects: list[float], spreads: list[float]) -> np.ndarray:
    """Scores [methods, seeds]: a seed moves all methods alike, and each run by its method's own spread."""
    level_S = rng.normal(0, 3, size=seeds)
    return np.array(
        [effect + level_S + rng.normal(0, spread, size=seeds) for effect, spread in zip(effects, spreads, strict=True)]
    )


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_each_methods_interval_covers_95_percent(seeds):
    """One method is four times as noisy as the others; a variance pooled over methods covered it in 84.5%."""
    effects, spreads = [0.0, 1.0, -1.0, 0.5, 0.0, 0.0, 0.0, 2.0], [0.5] * 7 + [2.0]
    trials, hits = 2000, np.zeros(7)
    for trial in range(trials):
        scores = runs_of(np.random.default_rng(trial), seeds, effects, spreads)
        for method in range(1, 8):
            low, high = paired_t(scores[method] - scores[0]).interval
            hits[method - 1] += low <= effects[method] <= high
    # The binomial's own error at 2,000 trials is 0.49%: four of them.
    assert hits / trials == pytest.approx(0.95, abs=0.02)


@pytest.mark.slow
def test_false_alarms_of_a_comparison_stay_below_5_percent():
    """Seven methods that equal the baseline: any corrected p below 0.05 is a false alarm."""
    alarms = 0
    for trial in range(1500):
        scores = runs_of(np.random.default_rng(trial), 5, [0.0] * 8, [0.5, 1, 1, 1, 1, 2, 2, 0.2])
        alarms += min(holm([paired_t(row - scores[0]).p for row in scores[1:]])) < 0.05
    assert alarms / 1500 <= 0.05 + 4 * 0.0056


@pytest.mark.slow
def test_equivalence_is_claimed_wrongly_in_at_most_5_percent():
    """The true difference is the margin itself: the worst case of what is not equivalent."""
    claims = sum(
        equivalence(np.random.default_rng(trial).normal(1.0, 0.3, size=6), 1.0) < 0.05 for trial in range(4000)
    )
    assert claims / 4000 == pytest.approx(0.05, abs=0.014)


@pytest.mark.slow
def test_power_is_the_share_of_comparisons_that_find_the_effect():
    effect = detectable_effect(1.5, 5, level=0.01)
    found = sum(paired_t(np.random.default_rng(trial).normal(effect, 1.5, size=5)).p < 0.01 for trial in range(4000))
    assert found / 4000 == pytest.approx(0.8, abs=0.026)
