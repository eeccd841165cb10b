"""The mixture's analytic derivatives against autograd, and its density against the definition."""

import pytest
import torch

from llava_compete.study.mixture import Family, gate_log_probs, likelihood, log_likelihood, sample
from llava_compete.study.sample_efficiency import true_parameters

FAMILIES = [Family(gating, experts) for gating in ("competition", "softmax") for experts in ("linear", "two_layer")]


def slow_log_likelihood(family, theta_KP, x_N, y_N):
    """The definition, one sample at a time."""
    total = 0.0
    for x, y in zip(x_N, y_N, strict=True):
        weights, densities = [], []
        for row in theta_KP:
            eta, variance = row[family.gate_params : -1], row[-1].exp()
            h = eta[0] * x + eta[1] if family.experts == "linear" else eta[0] * torch.tanh(eta[1] * x + eta[2])
            softplus = torch.log1p(torch.exp(h))
            weights.append(row[0].exp() * softplus if family.gating == "competition" else (row[0] + row[1] * x).exp())
            densities.append((-((y - h) ** 2) / (2 * variance)).exp() / variance.sqrt())
        total += (sum(w * d for w, d in zip(weights, densities, strict=True)) / sum(weights)).log()
    return total / len(x_N)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_likelihood_matches_the_definition_and_autograd(family):
    generator = torch.Generator().manual_seed(1)
    theta = torch.randn(2, 3, family.params, generator=generator, dtype=torch.float64)
    x, y = torch.randn(2, 2, 40, generator=generator, dtype=torch.float64)
    found = likelihood(family, theta, x, y)
    for fit in range(2):
        flat = theta[fit].flatten()

        def value(point, fit=fit):
            return log_likelihood(family, point.view(1, 3, -1), x[fit : fit + 1], y[fit : fit + 1])[0]

        expected = slow_log_likelihood(family, theta[fit], x[fit], y[fit])
        torch.testing.assert_close(found.value_B[fit], expected, rtol=1e-10, atol=1e-10)
        gradient = torch.autograd.functional.jacobian(value, flat)
        hessian = torch.autograd.functional.hessian(value, flat)
        torch.testing.assert_close(found.gradient_BQ[fit], gradient, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found.hessian_BQQ[fit], hessian, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_samples_follow_the_mixture(family):
    theta = true_parameters(family)
    x, y = sample(family, theta, 1, 200_000, 2.0, torch.Generator().manual_seed(0))
    probs = gate_log_probs(family, theta[None], x).exp()
    torch.testing.assert_close(probs.sum(1), torch.ones_like(x))
    eta = theta[:, family.gate_params : -1].unsqueeze(-1)
    h = eta[:, 0] * x + eta[:, 1] if family.experts == "linear" else eta[:, 0] * torch.tanh(eta[:, 1] * x + eta[:, 2])
    expected = (probs[0] * h).sum(0)
    assert abs((y[0] - expected).mean()) < 0.01
    second = (probs[0] * (h.square() + theta[:, -1:].exp())).sum(0)
    assert abs((y[0].square() - second).mean()) < 0.05
