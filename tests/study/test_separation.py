"""The exact curve: against a fit to very many samples, against a matching of moments, and its slopes."""

import math

import pytest
import torch

from llava_compete.study import separation
from llava_compete.study.mixture import Family, log_likelihood
from llava_compete.study.sample_efficiency import true_parameters


@pytest.mark.parametrize("gating", ["softmax", "competition"])
def test_the_root_is_that_of_the_density(gating):
    family = Family(gating, "linear")
    grid = separation._Grid(family)
    # A density: squares sum to 1; and the density is the likelihood's at a point.
    assert float(grid.truth.square().sum()) == pytest.approx(1, abs=1e-6)
    theta = true_parameters(family)
    x, y = grid.x_N[7], grid.y_M[40]
    density = (grid.truth.view(len(grid.x_N), -1)[7, 40] / grid.root_weight_NM[7, 40]) ** 2
    expected = log_likelihood(family, theta[None], x.view(1, 1), y.view(1, 1)) - math.log(2 * math.pi) / 2
    assert float(density.log()) == pytest.approx(float(expected), abs=1e-9)


def test_softmax_hides_a_pair_of_intercepts_that_competition_shows():
    distances = (0.02, 0.04)
    found = {}
    for gating in ("softmax", "competition"):
        family = Family(gating, "linear")
        grid, point = separation._Grid(family), separation._start(family, 0, 1)
        values = []
        for e in reversed(distances):
            point, value = separation._nearest(grid, family, 0, point, e)
            values.append(value)
        found[gating] = math.log2(values[0] / values[1])
    # Halving e divides distance² by 2^8, or by 2^4.
    assert found["softmax"] == pytest.approx(8, abs=0.9)
    assert found["competition"] == pytest.approx(4.2, abs=0.6)


def test_the_nearest_is_nearer_than_moments_matched_by_hand():
    """Intercepts +-e with variances less by e² keep the first three moments: a mixture that the search must beat."""
    family, e = Family("softmax", "linear"), 0.3
    grid = separation._Grid(family)
    start = separation._start(family, 0, 1)
    matched = separation._mixture(family, 0, start, e)
    truth = true_parameters(family)
    matched[:2, family.gate_params : -1] = truth[0, family.gate_params : -1]
    matched[0, -2] += e
    matched[1, -2] -= e
    matched[:2, -1] = math.log(math.exp(float(truth[0, -1])) - e**2)
    by_hand = float((grid.root(family, matched) - grid.truth).square().sum()) / 2
    _, found = separation._nearest(grid, family, 0, start, e)
    assert 0 < found <= by_hand
    assert torch.isfinite(matched).all()


def test_where_competition_pays_is_where_the_curves_cross():
    e = (0.1, 0.2, 0.4, 0.8)
    softmax = separation.Curve("softmax", "linear", e, tuple(value**8 for value in e))
    competition = separation.Curve("competition", "linear", e, tuple(0.0081 * value**4 for value in e))
    assert softmax.slope == pytest.approx(8)
    # Equal where e^4 = .0081, so at e = .3, whose distance² is .3^8.
    assert separation.pays_from(softmax, competition) == pytest.approx(0.3**-8, rel=1e-6)
    assert separation.pays_from(competition, softmax) is None
    assert softmax.told_apart(0.3**-8) == pytest.approx(0.3, rel=1e-6)
