"""Pins the pairing and the averaging of the LPIPS diversity, with a distance that is known."""

from __future__ import annotations

import pytest
import torch

from ddil_ray.errors import ConfigError
from ddil_ray.evaluation.diversity import load_lpips, pair_distances, pairs_of_a_condition


class MeanAbsolute:
    def __call__(self, first, second):
        return (first - second).abs().flatten(1).mean(1)

    def to(self, device):
        return self


def _pairs(cond, seed=0):
    return pairs_of_a_condition(cond, torch.Generator().manual_seed(seed))


def _distances(images, cond, seed=0):
    return pair_distances(images, cond, MeanAbsolute(), torch.Generator().manual_seed(seed))


def test_pairs_share_a_condition_and_no_row_is_used_twice():
    cond = torch.randint(7, (101,))
    first, second = _pairs(cond)
    assert torch.equal(cond[first], cond[second])
    assert len(torch.cat([first, second]).unique()) == 2 * len(first)
    assert len(first) == sum(int(n) // 2 for n in cond.bincount())


def test_pairs_are_random_and_the_same_for_one_seed():
    cond = torch.zeros(100, dtype=torch.int64)
    assert torch.equal(_pairs(cond)[0], _pairs(cond)[0])
    assert not torch.equal(_pairs(cond)[0], _pairs(cond, seed=1)[0])


def test_conditions_that_come_once_give_no_pair():
    assert len(_distances(torch.randn(5, 1, 2, 2), torch.arange(5))) == 0


def test_one_picture_per_condition_has_no_diversity():
    cond = torch.arange(4).repeat(10)
    images = torch.randn(4, 1, 2, 2)[cond]
    assert _distances(images, cond).tolist() == [0.0] * 20


def test_two_pictures_per_condition_have_the_diversity_of_a_random_pair():
    """A share q of one picture: E = 2 q (1 - q) N / (N - 1) times their distance, 2; sd of the mean over 500 pairs is
    2 sqrt(.42 * .58 / 500) = .044, so within .22 of it is five of them."""
    cond = torch.zeros(1000, dtype=torch.int64)
    images = torch.where(torch.arange(1000) < 300, -1.0, 1.0).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    mean = float(_distances(images, cond).mean())
    assert mean == pytest.approx(2 * 2 * 0.3 * 0.7 * 1000 / 999, abs=0.22)
    assert float(_distances(images, cond).unique().sum()) == 2.0  # 0 and 2: nothing else was compared


def test_a_missing_torchvision_is_one_message():
    pytest.importorskip("torchmetrics")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"`evaluation.lpips` must be none where torchvision is missing"):
            load_lpips("alex")
    else:
        pytest.skip("torchvision is here")
