"""Pins the energy distance to its definition and the permutation test to its level."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from ddil_ray.evaluation.energy import energy_distance, energy_test


def _normal(rows, size=3, mean=0.0, seed=0):
    return mean + torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _swaps(exchanges, rows, seed=0):
    return torch.rand(exchanges, rows, generator=torch.Generator().manual_seed(seed)) < 0.5


def _by_definition(x, y):
    """Means over pairs of rows, one by one."""
    across = [(a - b).norm() for a in x for b in y]
    within = [[(a - b).norm() for i, a in enumerate(z) for b in z[:i]] for z in (x, y)]
    return float(2 * torch.stack(across).mean() - sum(torch.stack(w).mean() for w in within))


def test_energy_distance_is_its_definition_for_sets_of_any_size_and_shape():
    x, y = _normal(12, size=4), _normal(9, size=4, mean=0.5, seed=1)
    assert energy_distance(x, y) == pytest.approx(_by_definition(x, y), abs=1e-7)
    assert energy_distance(x.reshape(12, 2, 2), y.reshape(9, 2, 2)) == energy_distance(x, y)


def test_the_floor_is_the_quantile_over_sets_with_their_pairs_exchanged():
    x, y, swaps = _normal(10), _normal(10, mean=0.4, seed=1), _swaps(19, 10)
    distance, floor = energy_test(x, y, swaps)
    exchanged = sorted(energy_distance(torch.where(s[:, None], y, x), torch.where(s[:, None], x, y)) for s in swaps)
    assert distance == pytest.approx(energy_distance(x, y), abs=1e-7)
    assert floor == pytest.approx(exchanged[18], abs=1e-7)  # the 19th of 19: one in twenty lies above


def test_two_sets_of_one_law_exceed_the_floor_in_one_case_of_twenty():
    """Also where rows have conditions of their own, 10 apart. 400 cases: a two-sided test at 10^-5."""
    conditions = 10.0 * (torch.arange(30) % 3)[:, None].double()
    above = 0
    for seed in range(400):
        x, y = (conditions + _normal(30, seed=2 * seed + side) for side in (0, 1))
        distance, floor = energy_test(x, y, _swaps(199, 30, seed))
        above += distance > floor
    assert stats.binomtest(above, 400, 0.05).pvalue > 1e-5


def test_a_shift_within_conditions_is_seen_however_far_the_conditions_lie_apart():
    """.8 sd in each of 3 dimensions, 128 pairs: 5.6 sd of the mean's difference per dimension."""
    conditions = 10.0 * (torch.arange(128) % 3)[:, None].double()
    for seed in range(10):
        x, y = conditions + _normal(128, seed=2 * seed), conditions + _normal(128, mean=0.8, seed=2 * seed + 1)
        distance, floor = energy_test(x, y, _swaps(199, 128, seed))
        assert distance > floor
