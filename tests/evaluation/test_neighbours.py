"""Pins precision, recall, density and coverage to `prdc` and to closed forms (oracle 26), in memory that does not grow
with the square of the rows."""

from __future__ import annotations

import resource

import pytest
import torch
from prdc import compute_prdc

from ddil_ray.evaluation import neighbours
from ddil_ray.evaluation.neighbours import prdc


def _normal(rows, size=8, mean=0.0, seed=0):
    return mean + torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("mean", [0.0, 0.7, 50.0])
@pytest.mark.parametrize("entries", [2**24, 999])
def test_they_equal_prdc_whatever_the_slices(mean, entries, monkeypatch):
    monkeypatch.setattr(neighbours, "_ENTRIES", entries)
    real, fake = _normal(300), _normal(250, mean=mean, seed=1)
    ours, theirs = prdc(real, fake, k=5), compute_prdc(real.numpy(), fake.numpy(), nearest_k=5)
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert value == pytest.approx(float(theirs[name]), abs=1e-9), name


def test_identical_sets_score_one_and_disjoint_ones_nothing():
    real = _normal(400)
    same, far = prdc(real, real), prdc(real, _normal(400, mean=100.0, seed=1))
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert same["density"] == pytest.approx(1, abs=0.2)
    assert set(far.values()) == {0.0}


def test_coverage_sees_a_dropped_mode_and_density_does_not():
    modes = torch.cat([_normal(500, mean=-10.0), _normal(500, mean=10.0, seed=1)])
    half = prdc(modes, _normal(1000, mean=10.0, seed=2))
    assert half["coverage"] == pytest.approx(0.5, abs=0.03)
    assert half["density"] > 0.9


@pytest.mark.slow
def test_50000_against_10000_rows_need_no_matrix_of_their_product():
    """That matrix would have 4 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scores = prdc(_normal(10_000, 4), _normal(50_000, 4, seed=1))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert grown < 1.5  # GiB
    assert scores["precision"] > 0.9
    assert scores["coverage"] > 0.99
