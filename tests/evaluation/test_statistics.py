"""Intervals cover what they say, tests keep their level, Holm's correction against its definition."""

from __future__ import annotations

import numpy as np
import pytest

from llava_compete.evaluation.statistics import Benchmark, compare, holm, permute_runs


def run(differences_MSU: np.ndarray, weights_U: np.ndarray | None = None, **options):
    weights_U = np.ones(differences_MSU.shape[2]) if weights_U is None else weights_U
    benchmark = Benchmark(differences_MSU, weights_U)
    by_seed = benchmark.by_seed_MS()
    return compare([benchmark], [(np.zeros(by_seed.shape[1]), by_seed)], **options)


def simulate(rng, true_difference: float, seeds: int, units: int, seed_spread: float) -> np.ndarray:
    """Differences of 0/1 scores: each unit has its own difficulty and sensitivity, each training seed its own shift."""
    difficulty = rng.normal(0, 1, size=units)
    effect = true_difference + rng.normal(0, 0.3, size=units)
    scores = []
    for method in (0, 1):
        shift = rng.normal(0, seed_spread, size=(seeds, 1))
        probability = 1 / (1 + np.exp(-(difficulty + method * effect + shift)))
        scores.append(rng.random((seeds, units)) < probability)
    return (scores[1].astype(float) - scores[0].astype(float))[None]


def expected_difference(true_difference: float, seed_spread: float) -> float:
    """The population value of `simulate`, by a large draw."""
    draws = [simulate(np.random.default_rng(i), true_difference, 50, 4000, seed_spread).mean() for i in range(20)]
    return float(np.mean(draws))


def test_interval_over_questions_covers_95_percent():
    """One seed without spread: the only chance is which questions were asked."""
    truth = expected_difference(0.4, 0.0)
    hits = 0
    for trial in range(400):
        rng = np.random.default_rng(1000 + trial)
        interval = run(simulate(rng, 0.4, 1, 200, 0.0), resamples=400, seed=trial)[0].over_questions
        hits += interval.low <= truth <= interval.high
    assert 0.92 <= hits / 400 <= 0.98


@pytest.mark.parametrize(("seeds", "spread"), [(3, 0.3), (5, 0.15), (3, 0.0)])
def test_interval_over_seeds_covers_at_least_95_percent(seeds, spread):
    """It adds two variances that overlap, so it may be wider than needed, never narrower."""
    truth = expected_difference(0.4, spread)
    hits = 0
    for trial in range(300):
        rng = np.random.default_rng(5000 + trial)
        interval = run(simulate(rng, 0.4, seeds, 200, spread), resamples=400, seed=trial)[0].over_seeds
        hits += interval.low <= truth <= interval.high
    assert hits / 300 >= 0.93


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
    difference = run(np.zeros((1, 2, 50)), resamples=200)[0]
    assert difference.mean == 0
    assert difference.p_questions == 1
    assert difference.p_runs == 1
    assert tuple(difference.over_questions) == (0, 0)


def test_weights_count():
    """Two strata with weights that undo their sizes: the mean is that of the strata's means."""
    differences = np.concatenate([np.full(10, 1.0), np.full(90, 0.0)])[None, None]
    weights = np.concatenate([np.full(10, 1 / 10), np.full(90, 1 / 90)])
    difference = run(differences, weights, resamples=500)[0]
    assert difference.mean == pytest.approx(0.5)
    assert difference.over_questions.low < 0.5 < difference.over_questions.high


def test_mean_of_benchmarks_averages_them():
    rng = np.random.default_rng(0)
    first, second = (Benchmark(rng.normal(size=(2, 3, size)), np.ones(size)) for size in (40, 70))
    scores = [(np.zeros(3), item.by_seed_MS()) for item in (first, second)]
    together = compare([first, second], scores, resamples=100)
    alone = [compare([item], [score], resamples=100) for item, score in zip((first, second), scores, strict=True)]
    for index in range(2):
        assert together[index].mean == pytest.approx((alone[0][index].mean + alone[1][index].mean) / 2)


def test_holm_is_step_down():
    # 0.01·3, then 0.02·2, then 0.04·1, and never below an earlier one
    assert holm([0.02, 0.01, 0.04]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_permuting_runs_is_exact():
    # 20 splits of six runs; only this one and its mirror image are as far apart
    assert permute_runs(np.array([1.0, 2.0, 3.0]), np.array([11.0, 12.0, 13.0])) == pytest.approx(2 / 20)
