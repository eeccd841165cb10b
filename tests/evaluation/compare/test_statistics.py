"""Intervals cover what they say, tests keep their level, Holm's correction against its definition."""

from __future__ import annotations

import numpy as np
import pytest

from llava_compete.evaluation.compare.statistics import Benchmark, compare, holm


def run(scores_MSU: np.ndarray, weights_U: np.ndarray | None = None, **options):
    weights_U = np.ones(scores_MSU.shape[2]) if weights_U is None else weights_U
    return compare([Benchmark(scores_MSU, weights_U)], **options)


def simulate(rng, true_difference: float, seeds: int, units: int, seed_spread: float, methods: int = 1) -> np.ndarray:
    """0/1 scores: each unit has its own difficulty and sensitivity, each training seed its own shift.

    All methods but the first (the baseline) have the same true difference to it.
    """
    difficulty = rng.normal(0, 1, size=units)
    effect = true_difference + rng.normal(0, 0.3, size=units)
    scores = []
    for method in range(1 + methods):
        shift = rng.normal(0, seed_spread, size=(seeds, 1))
        probability = 1 / (1 + np.exp(-(difficulty + (method > 0) * effect + shift)))
        scores.append(rng.random((seeds, units)) < probability)
    return np.array(scores, dtype=float)


def expected_difference(true_difference: float, seed_spread: float) -> float:
    """The population value of `simulate`, by a large draw."""
    draws = [simulate(np.random.default_rng(i), true_difference, 50, 4000, seed_spread) for i in range(20)]
    return float(np.mean([scores[1].mean() - scores[0].mean() for scores in draws]))


def test_interval_over_questions_covers_95_percent():
    """One seed without spread: the only chance is which questions were asked."""
    truth = expected_difference(0.4, 0.0)
    hits = 0
    for trial in range(400):
        rng = np.random.default_rng(1000 + trial)
        interval = run(simulate(rng, 0.4, 1, 200, 0.0), resamples=400, seed=trial)[0].over_questions
        hits += interval.low <= truth <= interval.high
    assert 0.92 <= hits / 400 <= 0.98


@pytest.mark.parametrize(("seeds", "spread", "methods"), [(3, 0.3, 1), (5, 0.15, 1), (3, 0.0, 1), (3, 0.3, 7)])
def test_interval_over_seeds_covers_at_least_95_percent(seeds, spread, methods):
    """It adds two variances that overlap, so it may be wider than needed, never narrower."""
    truth = expected_difference(0.4, spread)
    hits = 0
    for trial in range(300):
        rng = np.random.default_rng(5000 + trial)
        found = run(simulate(rng, 0.4, seeds, 200, spread, methods), resamples=400, seed=trial)
        interval = found[trial % methods].over_seeds
        hits += interval.low <= truth <= interval.high
    assert hits / 300 >= 0.93


def test_one_method_is_the_paired_t_test_and_many_share_their_spread():
    """With one method the draws are those of a paired t; more methods give the spread more degrees of freedom."""
    rng = np.random.default_rng(3)
    runs_MS = rng.normal(0, 1, size=(8, 3)) + np.array([0.0, 5.0, -5.0])  # a seed's own level is no spread
    alone = run(np.repeat(runs_MS[:2, :, None], 2, axis=2), resamples=100_000)[0].over_seeds
    paired = runs_MS[1] - runs_MS[0]
    half = 4.303 * paired.std(ddof=1) / np.sqrt(3)  # Student's t with 2 degrees of freedom
    assert (alone.low, alone.high) == pytest.approx((paired.mean() - half, paired.mean() + half), rel=0.05, abs=0.05)

    widths = [
        (interval := run(rng.normal(0, 1, size=(8, 3, 1)), resamples=4000, seed=i)[0].over_seeds).high - interval.low
        for i in range(30)
    ]
    assert np.mean(widths) == pytest.approx(2 * 2.145 * np.sqrt(2 / 3), rel=0.1)  # 14 degrees of freedom


def test_false_alarms_of_a_whole_table_stay_rare():
    """Seven methods that equal the baseline: any corrected p below 0.05 is a false alarm."""
    alarms = 0
    for trial in range(200):
        found = run(simulate(np.random.default_rng(trial), 0.0, 3, 100, 0.3, 7), resamples=1000, seed=trial)
        alarms += min(holm([difference.p_seeds for difference in found])) < 0.05
    assert alarms / 200 <= 0.08


def test_a_real_difference_is_found_over_seeds():
    found = run(simulate(np.random.default_rng(0), 1.5, 3, 300, 0.1, 7), resamples=10_000)
    assert max(holm([difference.p_seeds for difference in found])) < 0.05


def test_interval_over_questions_alone_is_too_narrow_for_new_seeds():
    """Why the seeds are needed: with their spread, questions alone cover far less than they claim."""
    truth = expected_difference(0.0, 0.3)
    hits = 0
    for trial in range(200):
        rng = np.random.default_rng(9000 + trial)
        interval = run(simulate(rng, 0.0, 1, 400, 0.3), resamples=300, seed=trial)[0].over_questions
        hits += interval.low <= truth <= interval.high
    assert hits / 200 < 0.85


def test_permutation_keeps_its_level_and_finds_a_real_difference():
    rejected = sum(
        run(simulate(np.random.default_rng(trial), 0.0, 1, 150, 0.0), resamples=200, seed=trial)[0].p_questions <= 0.05
        for trial in range(300)
    )
    assert rejected / 300 <= 0.08
    assert run(simulate(np.random.default_rng(0), 1.0, 1, 400, 0.0), resamples=2000)[0].p_questions < 0.01


def test_equal_runs_have_no_difference():
    difference = run(np.zeros((2, 2, 50)), resamples=200)[0]
    assert difference.mean == 0
    assert difference.p_questions == 1
    assert difference.p_seeds == 1
    assert tuple(difference.over_questions) == (0, 0)


def test_weights_count():
    """Two strata with weights that undo their sizes: the mean is that of the strata's means."""
    better = np.concatenate([np.full(10, 1.0), np.full(90, 0.0)])
    weights = np.concatenate([np.full(10, 1 / 10), np.full(90, 1 / 90)])
    difference = run(np.stack([np.zeros(100), better])[:, None], weights, resamples=500)[0]
    assert difference.mean == pytest.approx(0.5)
    assert difference.over_questions.low < 0.5 < difference.over_questions.high


def test_mean_of_benchmarks_averages_them():
    rng = np.random.default_rng(0)
    first, second = (Benchmark(rng.normal(size=(3, 3, size)), np.ones(size)) for size in (40, 70))
    together = compare([first, second], resamples=100)
    alone = [compare([item], resamples=100) for item in (first, second)]
    for index in range(2):
        assert together[index].mean == pytest.approx((alone[0][index].mean + alone[1][index].mean) / 2)


def test_holm_is_step_down():
    # 0.01·3, then 0.02·2, then 0.04·1, and never below an earlier one
    assert holm([0.02, 0.01, 0.04]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
