"""Intervals and tests over questions, for models that are held fixed, and what they do not cover."""

from __future__ import annotations

import numpy as np
import pytest

from llava_compete.evaluation.compare.joining import group_units
from llava_compete.evaluation.compare.questions import Benchmark, permutation_p, question_intervals


def benchmark(scores_MSU: np.ndarray, weights_U: np.ndarray | None = None) -> Benchmark:
    return Benchmark(scores_MSU, np.ones(scores_MSU.shape[2]) if weights_U is None else weights_U)


def simulate(rng, true_difference: float, seeds: int, units: int, seed_spread: float) -> np.ndarray:
    """0/1 scores: each unit has its own difficulty and sensitivity, each training seed its own shift."""
    difficulty = rng.normal(0, 1, size=units)
    effect = true_difference + rng.normal(0, 0.3, size=units)
    scores = []
    for method in range(2):
        shift = rng.normal(0, seed_spread, size=(seeds, 1))
        probability = 1 / (1 + np.exp(-(difficulty + (method > 0) * effect + shift)))
        scores.append(rng.random((seeds, units)) < probability)
    return np.array(scores, dtype=float)


def expected_difference(true_difference: float, seed_spread: float) -> float:
    """The population value of `simulate`, by a large draw."""
    draws = [simulate(np.random.default_rng(i), true_difference, 50, 4000, seed_spread) for i in range(20)]
    return float(np.mean([scores[1].mean() - scores[0].mean() for scores in draws]))


def covered(truth: float, trials: int, difference: float, units: int, seed_spread: float) -> float:
    hits = 0
    for trial in range(trials):
        scores = simulate(np.random.default_rng(1000 + trial), difference, 1, units, seed_spread)
        interval = question_intervals([benchmark(scores)], 400, seed=trial)[0]
        hits += interval.low <= truth <= interval.high
    return hits / trials


def test_intervals_are_as_wide_as_lmms_evals_clustered_errors():
    """Questions about one image stand together; theirs: equation 4 of arXiv 2411.00640; ours: a bootstrap."""
    metrics = pytest.importorskip("lmms_eval.api.metrics")
    rng = np.random.default_rng(3)
    images = np.repeat(np.arange(600), rng.integers(1, 6, size=600))
    of_image = rng.normal(0, 0.5, size=600)[images]
    scores = np.stack([rng.random(len(images)) < 0.6, rng.random(len(images)) < 0.6 + 0.2 * of_image]).astype(float)
    differences = scores[1] - scores[0]
    theirs = metrics.clustered_stderr(differences.tolist(), images.tolist())
    naive = differences.std(ddof=1) / len(differences) ** 0.5
    grouped = group_units(scores[:, None], np.ones(len(images)), [f"image {image}" for image in images])
    low, high = question_intervals([grouped], 4000)[0]
    assert theirs > 1.05 * naive
    assert (high - low) / (2 * 1.96) == pytest.approx(theirs, rel=0.05)
    assert (low + high) / 2 == pytest.approx(differences.mean(), abs=0.1 * theirs)


@pytest.mark.slow
def test_interval_covers_95_percent_of_other_questions():
    """One seed without spread: the only chance is which questions were asked."""
    assert 0.92 <= covered(expected_difference(0.4, 0.0), 400, 0.4, 200, 0.0) <= 0.98


@pytest.mark.slow
def test_interval_is_far_too_narrow_for_other_trainings():
    """Why a method is judged over seeds."""
    assert covered(expected_difference(0.0, 0.3), 200, 0.0, 400, 0.3) < 0.85


@pytest.mark.slow
def test_permutation_keeps_its_level():
    rejected = sum(
        permutation_p([benchmark(simulate(np.random.default_rng(trial), 0.0, 1, 150, 0.0))], 200, seed=trial)[0] <= 0.05
        for trial in range(300)
    )
    assert rejected / 300 <= 0.08


@pytest.mark.slow
def test_questions_about_one_image_must_be_one_unit():
    """Two equal methods, 18 questions an image: each method reads some pictures better than the other does."""
    rejected = {"by image": 0, "by question": 0}
    for trial in range(200):
        rng = np.random.default_rng(trial)
        by_image = 0.5 + rng.normal(0, 0.15, size=(2, 1, 100)).clip(-0.4, 0.4)
        scores = (rng.random((2, 1, 1800)) < np.repeat(by_image, 18, axis=2)).astype(float)
        images = [f"group {index // 18}" for index in range(1800)]
        kinds = {"by image": group_units(scores, np.ones(1800), images), "by question": benchmark(scores)}
        for kind, units in kinds.items():
            rejected[kind] += permutation_p([units], 200, seed=trial)[0] <= 0.05
    assert rejected["by image"] / 200 <= 0.09
    assert rejected["by question"] / 200 > 0.15


def test_permutation_finds_a_real_difference():
    assert permutation_p([benchmark(simulate(np.random.default_rng(0), 1.0, 1, 400, 0.0))], 2000)[0] < 0.01


def test_equal_runs_have_no_difference():
    equal = [benchmark(np.zeros((2, 2, 50)))]
    assert permutation_p(equal, 200) == [1.0]
    assert question_intervals(equal, 200) == [(0.0, 0.0)]


def test_weights_count():
    """Two strata with weights that undo their sizes: the mean is that of the strata's means."""
    better = np.concatenate([np.full(10, 1.0), np.full(90, 0.0)])
    weights = np.concatenate([np.full(10, 1 / 10), np.full(90, 1 / 90)])
    strata = benchmark(np.stack([np.zeros(100), better])[:, None], weights)
    assert strata.by_run_MS().ravel() == pytest.approx([0.0, 0.5])
    low, high = question_intervals([strata], 500)[0]
    assert low < 0.5 < high
