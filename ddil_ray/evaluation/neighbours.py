"""Precision, recall, density and coverage: what k nearest neighbours say about two sets of features.

Written here because no maintained package has all four; the tests hold them equal to `prdc`. Distances are made in
slices of rows, so that memory grows with the number of rows and not with its square.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NEIGHBOURS", "Manifold", "prdc"]

NEIGHBOURS = 5
"""The usual k."""
_ENTRIES = 2**24
"""Distances held at a time (128 MiB)."""


class Manifold:
    """Real features (N, D) with the balls that reach their k-th neighbours; fitted once, compared with many sets.

    Needs more than `k` rows.

    Source: Naeem et al. 2020, arXiv:2002.09797, eq. 1 to 5.
    """

    def __init__(self, real: Tensor, *, k: int = NEIGHBOURS) -> None:
        self.k, self.real = k, real.double()
        self.radius = _kth_distance(self.real, k)

    def fidelity(self, fake: Tensor) -> dict[str, float]:
        """Precision, density and coverage of `fake` (M, D), which do not look at the neighbours among its rows."""
        fake = fake.double()
        inside = torch.zeros(len(fake), dtype=torch.float64)
        nearest = torch.full_like(self.radius, torch.inf)
        for rows in _slices(len(fake), len(self.real)):
            distance = torch.cdist(fake[rows], self.real)
            inside[rows] = (distance < self.radius).double().sum(1)
            nearest = torch.minimum(nearest, distance.min(0).values)
        return {
            "precision": float((inside > 0).double().mean()),
            "density": float(inside.mean() / self.k),
            "coverage": float((nearest < self.radius).double().mean()),
        }

    def recall(self, fake: Tensor) -> float:
        """Share of real rows within reach of `fake` (M, D), M > k."""
        fake = fake.double()
        reach, reached = _kth_distance(fake, self.k), torch.zeros(len(self.real), dtype=torch.bool)
        for rows in _slices(len(fake), len(self.real)):
            reached |= (torch.cdist(fake[rows], self.real) < reach[rows, None]).any(0)
        return float(reached.double().mean())


def prdc(real: Tensor, fake: Tensor, *, k: int = NEIGHBOURS) -> dict[str, float]:
    """Precision, recall, density and coverage of `fake` (M, D) against `real` (N, D)."""
    manifold = Manifold(real, k=k)
    return {**manifold.fidelity(fake), "recall": manifold.recall(fake)}


def _kth_distance(features: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th neighbour, itself not counted."""
    parts = _slices(len(features), len(features))
    return torch.cat([torch.cdist(features[rows], features).kthvalue(k + 1, dim=1).values for rows in parts])


def _slices(rows: int, columns: int) -> list[slice]:
    """Slices of `rows` whose distances to `columns` others are at most `_ENTRIES`."""
    size = max(1, _ENTRIES // columns)
    return [slice(start, start + size) for start in range(0, rows, size)]
