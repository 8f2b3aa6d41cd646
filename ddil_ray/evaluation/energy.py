"""The energy distance between two sets of samples, and how large it is by chance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["energy_distance", "energy_test"]

_LEVEL = 0.95


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| over rows of (N, ...) and (M, ...); 0 where both have one law.

    Source: Szekely and Rizzo 2013, J. Stat. Plan. Inference 143, eq. 2; the unbiased form, which may fall below 0.
    """
    first = torch.cat([torch.ones(1, len(x)), torch.zeros(1, len(y))], dim=1)
    return float(_energies(_distances(x, y), first))


def energy_test(x: Tensor, y: Tensor, swaps: Tensor) -> tuple[float, float]:
    """The energy distance of two sets paired by rows, and the 95 % quantile of it if both had one law.

    Under one law a pair may change sides without changing anything, so the energy distances after random exchanges are
    what chance gives: the distance exceeds their quantile with probability 5 % (exactly, where (P + 1) / 20 is whole).
    Only pairs are exchanged, so rows may have any condition as long as both of a pair share it: the conditions of each
    side stay what they are. All of it comes from one matrix of distances.

    Args:
        x: (N, ...) samples.
        y: (N, ...) samples; row i belongs with row i of `x`.
        swaps: (P, N) bool, P >= 19: the pairs that change sides in each of P exchanges.

    Source: a permutation test of Szekely and Rizzo 2013, section 6.1; that it exchanges pairs alone is ours.
    """
    swaps = swaps.to(x.device)
    exchanges = torch.cat([torch.zeros_like(swaps[:1]), swaps])
    energies = _energies(_distances(x, y), torch.cat([~exchanges, exchanges], dim=1))
    rank = math.ceil(_LEVEL * (len(swaps) + 1))
    return float(energies[0]), float(energies[1:].kthvalue(rank).values)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """(N + M, N + M) float64 Euclidean distances of all rows of both."""
    both = torch.cat([x, y]).double().flatten(1)
    return torch.cdist(both, both)


def _energies(distances: Tensor, first: Tensor) -> Tensor:
    """(P,) energy distances, for P ways `first` (P, N + M) of saying which rows belong to the first set."""
    first = first.to(distances)
    second = 1 - first
    to_first, to_second = first @ distances, second @ distances
    n, m = first.sum(1), second.sum(1)
    across = (to_first * second).sum(1) / (n * m)
    return 2 * across - (to_first * first).sum(1) / (n * (n - 1)) - (to_second * second).sum(1) / (m * (m - 1))
