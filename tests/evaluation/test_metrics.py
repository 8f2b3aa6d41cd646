"""Pins the metrics to closed forms and to other libraries (oracle 26)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import KernelInceptionDistance
from vendi_score import vendi

from ddil_ray.evaluation.metrics import (
    FrechetTo,
    energy_distance,
    frechet_distance,
    kernel_distance,
    paired_errors,
    vendi_score,
)


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


def test_folding_50000_rows_is_the_direct_computation():
    """Float32 rows, as blocks give them; the direct moments are taken of all rows at once."""
    a, b = (
        _normal(50_000, 16).float(),
        (_normal(50_000, 16, seed=1) @ torch.diag(torch.linspace(0.5, 1.5, 16)).double()),
    )
    b = b.float() + 0.3
    (m_a, c_a), (m_b, c_b) = ((x.double().mean(0).numpy(), np.cov(x.double().numpy().T)) for x in (a, b))
    cross = np.sqrt(np.linalg.eigvals(c_a @ c_b).real.clip(0)).sum()
    exact = ((m_a - m_b) ** 2).sum() + np.trace(c_a) + np.trace(c_b) - 2 * cross
    to_a = FrechetTo(a)
    assert to_a(b) == pytest.approx(exact, rel=1e-9)
    assert to_a(b) == to_a(b)  # one measurement leaves nothing behind
    assert vendi_score(b) == pytest.approx(vendi.score_dual(b.double().numpy()), rel=1e-9)


def test_kernel_distance_is_the_unbiased_mmd():
    """Equal to torchmetrics' metric, and to the double sums of its definition, where one subset is everything."""
    real, fake = _normal(60), _normal(60, mean=0.5, seed=1)
    metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=60)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    kernel = {n: (x @ y.T / 8 + 1) ** 3 for n, x, y in (("rr", real, real), ("ff", fake, fake), ("rf", real, fake))}
    off = [(kernel[n].sum() - kernel[n].trace()) / (60 * 59) for n in ("rr", "ff")]
    assert kernel_distance(real, fake) == pytest.approx(float(sum(off) - 2 * kernel["rf"].mean()), rel=1e-9)
    assert kernel_distance(real, fake) == pytest.approx(float(metric.compute()[0]), rel=1e-5)


def test_kernel_distance_of_many_rows_is_zero_for_one_law_and_the_same_for_one_seed():
    """The mean over subsets has sd .01 here (seen over 20 seeds of the data): |.| < .06 is six of them."""
    real, fake, other = _normal(3000), _normal(2500, seed=1), _normal(2500, mean=1.0, seed=1)
    assert abs(kernel_distance(real, fake)) < 0.06
    assert kernel_distance(real, other) > 1
    assert kernel_distance(real, fake) == kernel_distance(real, fake)


def test_vendi_counts_different_samples():
    """Equal to `vendi-score`; 1 for one sample over and over, n for n orthogonal ones."""
    features = _normal(300, mean=0.3)
    assert vendi_score(features) == pytest.approx(vendi.score_dual(features.numpy()), rel=1e-9)
    assert vendi_score(torch.ones(50, 8)) == pytest.approx(1)
    assert vendi_score(torch.eye(8).repeat(5, 1)) == pytest.approx(8)


def test_energy_distance_is_zero_for_one_law_and_grows_with_the_shift():
    """Unbiased; its sd at 800 rows is about .01 here, so |.| < .06 fails less than once in 10^8."""
    a = _normal(800)
    assert abs(energy_distance(a, _normal(800, seed=1))) < 0.06
    shifts = [energy_distance(a, _normal(800, mean=m, seed=1)) for m in (0.3, 1.0, 3.0)]
    assert 0.06 < shifts[0] < shifts[1] < shifts[2]


def test_paired_errors_are_mean_squares_per_sample():
    assert paired_errors(torch.zeros(2, 3), torch.tensor([[2.0, 2, 2], [3, 0, 0]])).tolist() == [4.0, 3.0]
