"""Distances between sets of features, and paired statistics; pure functions.

Density, coverage, precision and recall are written here because no maintained package has them; the tests hold them
equal to `prdc`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from ddil_ray.evaluation.energy import energy_distance

__all__ = [
    "PairedDifference",
    "energy_distance",
    "frechet_distance",
    "paired_difference",
    "paired_error",
    "prdc",
]


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to features `a` (N, D) and `b` (M, D).

    Source: Heusel et al. 2017, arXiv:1706.08500, eq. 6; computed by torchmetrics in float64.
    """
    identity = torch.nn.Identity()
    metric = FrechetInceptionDistance(feature=_Features(identity, a.shape[1]), normalize=True)
    metric.set_dtype(torch.float64)
    metric.update(a.double(), real=True)
    metric.update(b.double(), real=False)
    return float(metric.compute())


class _Features(torch.nn.Module):
    """Passes features through as if they were images, which is what torchmetrics expects of a feature network."""

    def __init__(self, network: torch.nn.Module, num_features: int) -> None:
        super().__init__()
        self.network, self.num_features = network, num_features

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) from (N, D)."""
        passed: Tensor = self.network(features)
        return passed


def prdc(real: Tensor, fake: Tensor, *, k: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage with k nearest neighbours.

    Source: Naeem et al. 2020, arXiv:2002.09797, eq. 1 to 5.
    """
    real_radius = _kth_distance(real, k)
    fake_radius = _kth_distance(fake, k)
    across = torch.cdist(real, fake)
    in_real_ball = across < real_radius[:, None]
    return {
        "precision": float(in_real_ball.any(0).double().mean()),
        "recall": float((across < fake_radius[None]).any(1).double().mean()),
        "density": float(in_real_ball.double().sum(0).mean() / k),
        "coverage": float((across.min(1).values < real_radius).double().mean()),
    }


def _kth_distance(features: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th neighbour, itself not counted."""
    return torch.cdist(features, features).kthvalue(k + 1, dim=1).values


def paired_error(student: Tensor, teacher: Tensor) -> float:
    """Mean squared difference of samples (N, ...) that started from the same noises."""
    return float((student - teacher).double().square().mean())


@dataclass(frozen=True)
class PairedDifference:
    """How two arms differ over seeds."""

    ratio: float
    """Mean of the second arm over mean of the first."""
    low: float
    high: float
    """95 % confidence interval of the mean per-seed ratio, by Student's t."""
    better: int
    """Seeds where the second arm is lower."""
    seeds: int


def paired_difference(first: Sequence[float], second: Sequence[float]) -> PairedDifference:
    """Second arm against first, seed by seed; at least two seeds."""
    ratios = np.asarray(second) / np.asarray(first)
    half = stats.t.ppf(0.975, len(ratios) - 1) * stats.sem(ratios)
    return PairedDifference(
        ratio=float(ratios.mean()),
        low=float(ratios.mean() - half),
        high=float(ratios.mean() + half),
        better=int((ratios < 1).sum()),
        seeds=len(ratios),
    )
