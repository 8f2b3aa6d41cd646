"""Pins the metrics to closed forms and to `prdc` (oracle 26)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from prdc import compute_prdc

from ddil_ray.data import load_images
from ddil_ray.evaluation import train_features
from ddil_ray.evaluation.metrics import energy_distance, frechet_distance, paired_difference, paired_error, prdc


def _normal(rows, size=8, mean=0.0, std=1.0, seed=0):
    return mean + std * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_is_the_gaussian_formula_on_sample_moments():
    a, b = _normal(500), _normal(400, mean=0.5, std=2.0, seed=1) @ torch.diag(torch.linspace(0.5, 1.5, 8)).double()
    (m_a, c_a), (m_b, c_b) = ((x.mean(0).numpy(), np.cov(x.numpy().T)) for x in (a, b))
    values, vectors = np.linalg.eigh(c_a)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ c_b @ root).clip(0)).sum()
    exact = ((m_a - m_b) ** 2).sum() + np.trace(c_a) + np.trace(c_b) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(exact, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("mean", [0.0, 0.7, 50.0])
def test_manifold_scores_equal_prdc(mean):
    real, fake = _normal(300), _normal(250, mean=mean, seed=1)
    ours, theirs = prdc(real, fake, k=5), compute_prdc(real.numpy(), fake.numpy(), nearest_k=5)
    for name, value in ours.items():
        assert value == pytest.approx(float(theirs[name]), abs=1e-9), name


def test_coverage_sees_a_dropped_mode_and_density_does_not():
    modes = torch.cat([_normal(500, mean=-10.0), _normal(500, mean=10.0, seed=1)])
    half = prdc(modes, _normal(1000, mean=10.0, seed=2))
    assert half["coverage"] == pytest.approx(0.5, abs=0.03)
    assert half["density"] > 0.9


def test_energy_distance_is_zero_for_one_law_and_grows_with_the_shift():
    """Unbiased; its sd at 800 rows is about .01 here, so |.| < .06 fails less than once in 10^8."""
    a = _normal(800)
    assert abs(energy_distance(a, _normal(800, seed=1))) < 0.06
    shifts = [energy_distance(a, _normal(800, mean=m, seed=1)) for m in (0.3, 1.0, 3.0)]
    assert 0.06 < shifts[0] < shifts[1] < shifts[2]


def test_paired_statistics():
    assert paired_error(torch.zeros(4, 3), torch.full((4, 3), 2.0)) == 4.0
    difference = paired_difference([1.0, 2.0, 4.0], [0.5, 1.1, 1.9])
    assert difference.ratio == pytest.approx((0.5 + 0.55 + 0.475) / 3)
    assert difference.low < difference.ratio < difference.high < 1
    assert (difference.better, difference.seeds) == (3, 3)


def test_features_are_trained_the_same_twice_and_say_how_good_they_are():
    data = load_images("digits")
    a, b = train_features(data, epochs=2), train_features(data, epochs=2)
    assert torch.equal(a(data.images[:10]), b(data.images[:10]))
    assert a(data.images[:10]).shape == (10, 64)
    assert "% on held-out images" in a.name
