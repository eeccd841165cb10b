"""Fits recover known experts, the Voronoi loss is right, slopes are right, and the command writes its files."""

import json
import math

import numpy as np
import pytest
import torch

from llava_compete import cli
from llava_compete.study import sample_efficiency as study
from llava_compete.study.fit import maximise, near_truth_starts
from llava_compete.study.mixture import Family, sample
from llava_compete.study.voronoi import atoms, masses, voronoi_loss

FAMILIES = [Family(gating, experts) for gating in ("competition", "softmax") for experts in ("linear", "two_layer")]


def slow_voronoi(fitted, fitted_masses, truth, true_masses, power):
    """The definition with loops."""
    cells = {j: [] for j in range(len(truth))}
    for i, atom in enumerate(fitted):
        distances = [math.dist(atom, other) for other in truth]
        cells[distances.index(min(distances))].append(i)
    loss = 0.0
    for j, members in cells.items():
        r = power if len(members) > 1 else 1.0
        loss += sum(fitted_masses[i] * math.dist(fitted[i], truth[j]) ** r for i in members)
        loss += abs(sum(fitted_masses[i] for i in members) - true_masses[j])
    return loss


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_voronoi_loss_matches_the_slow_version(power):
    generator = torch.Generator().manual_seed(0)
    fitted = torch.randn(50, 4, 3, generator=generator, dtype=torch.float64)
    fitted_masses = torch.rand(50, 4, generator=generator, dtype=torch.float64)
    truth, true_masses = torch.randn(2, 3, generator=generator, dtype=torch.float64), torch.tensor([0.3, 0.7]).double()
    found = voronoi_loss(fitted, fitted_masses, truth, true_masses, power).total_B
    pairs = zip(fitted.tolist(), fitted_masses.tolist(), strict=True)
    expected = [slow_voronoi(f, m, truth.tolist(), true_masses.tolist(), power) for f, m in pairs]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_voronoi_loss_is_zero_at_the_truth_split_or_not_and_blind_to_order_and_gauge(family):
    truth = study.true_parameters(family)
    true = atoms(family, truth[None])[0], masses(family, truth[None], 2.0)[0]
    split = truth[[0, 1, 1]].clone()
    split[1, 0] += math.log(0.3)
    split[2, 0] += math.log(0.7)
    shifted = truth[[1, 0]].clone()
    shifted[:, : family.gate_params] += 0.8
    if family.experts == "two_layer":  # the same function with both signs turned
        shifted[:, family.gate_params : -1] *= -1
    for fitted in (truth, split, shifted):
        loss = voronoi_loss(atoms(family, fitted[None]), masses(family, fitted[None], 2.0), *true, crowded_power=1.0)
        assert loss.total_B.item() < 1e-7


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_fit_recovers_known_experts(family):
    truth = study.true_parameters(family)
    generator = torch.Generator().manual_seed(3)
    x, y = sample(family, truth, 3, 20_000, study.WIDTH, generator)
    fits = maximise(family, near_truth_starts(family, truth, 2, 3, 0.3, generator), x, y)
    assert fits.converged_B.all()
    torch.testing.assert_close(
        atoms(family, fits.theta_BKP), atoms(family, truth[None]).expand(3, -1, -1), atol=0.2, rtol=0
    )
    at_truth = maximise(family, truth.expand(3, -1, -1), x, y)
    torch.testing.assert_close(fits.value_B, at_truth.value_B, atol=1e-8, rtol=0)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_an_over_specified_fit_is_at_least_as_likely_and_its_starts_double_either_atom(family):
    truth = study.true_parameters(family)
    generator = torch.Generator().manual_seed(4)
    x, y = sample(family, truth, 1, 500, study.WIDTH, generator)
    starts = near_truth_starts(family, truth, 3, 2, 0.0, generator)
    torch.testing.assert_close(starts[:, 2, family.gate_params :], truth[:, family.gate_params :])
    exact = maximise(family, truth[None], x, y)
    spread = near_truth_starts(family, truth, 3, 6, 0.3, generator)
    over = maximise(family, spread, x.expand(6, -1), y.expand(6, -1))
    assert over.value_B.max() >= exact.value_B[0] - 1e-9


def test_slopes_and_their_intervals_are_those_of_a_known_power_law():
    rng = np.random.default_rng(0)
    sizes = (100, 1000, 10_000, 100_000)
    exact = np.array([[n**-0.25] * 5 for n in sizes])
    assert study.fit_slope(sizes, exact, 100, 0).value == pytest.approx(-0.25)
    covered = 0
    for trial in range(100):
        noisy = exact.mean(1, keepdims=True) * rng.gamma(4, 0.25, size=(4, 40))
        slope = study.fit_slope(sizes, noisy, 300, trial)
        covered += slope.low <= -0.25 <= slope.high
    assert covered >= 85


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_number_of_workers():
    tiny = study.Settings(sizes=(100, 200), repetitions=2, starts=1, bootstrap=10)
    one, two = study.run(tiny), study.run(tiny, workers=2)
    assert one["curves"] == two["curves"]


def test_the_command_writes_json_figure_and_text(tmp_path, monkeypatch):
    tiny = study.Settings(sizes=(100, 400), repetitions=3, starts=2, bootstrap=50)
    monkeypatch.setattr(study.Settings, "quick", classmethod(lambda cls: tiny))
    assert cli.main(["study", "sample-efficiency", "--quick", "--workers", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "sample_efficiency.json").read_text())
    assert len(result["curves"]) == 8
    assert all(np.isfinite(curve["errors_NR"]).all() for curve in result["curves"])
    assert (tmp_path / "sample_efficiency.png").stat().st_size > 10_000
    assert "| linear | over | competition | -0.25 |" in (tmp_path / "README.md").read_text()
