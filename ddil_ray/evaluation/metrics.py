"""Distances between sets of features, and paired statistics; pure functions. Precision and its kin: `neighbours`.

torchmetrics takes several seconds to import, so only what computes with it does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddil_ray.evaluation.energy import energy_distance

__all__ = [
    "FrechetTo",
    "energy_distance",
    "frechet_distance",
    "kernel_distance",
    "paired_errors",
    "vendi_score",
]

_ROWS = 4096
"""Features in float64 at a time."""
_KID_SUBSET = 1000


class FrechetTo:
    """Frechet distance to a Gaussian fitted once to `reference` (N, D); features are folded in, `_ROWS` at a time.

    Source: Heusel et al. 2017, arXiv:1706.08500, eq. 6; computed by torchmetrics in float64.
    """

    def __init__(self, reference: Tensor) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        network = _Features(torch.nn.Identity(), reference.shape[1])
        self._metric = FrechetInceptionDistance(feature=network, normalize=True, reset_real_features=False)
        self._metric.set_dtype(torch.float64)
        self._fold(reference, real=True)

    def _fold(self, features: Tensor, *, real: bool) -> None:
        for part in features.split(_ROWS):
            self._metric.update(part.double(), real=real)

    def __call__(self, features: Tensor) -> float:
        """Distance of features (M, D)."""
        self._metric.reset()
        self._fold(features, real=False)
        return float(self._metric.compute())


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to features `a` (N, D) and `b` (M, D); see `FrechetTo`."""
    return FrechetTo(a)(b)


class _Features(torch.nn.Module):
    """Passes features through as if they were images, which is what torchmetrics expects of a feature network."""

    def __init__(self, network: torch.nn.Module, num_features: int) -> None:
        super().__init__()
        self.network, self.num_features = network, num_features

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) from (N, D)."""
        passed: Tensor = self.network(features)
        return passed


def kernel_distance(real: Tensor, fake: Tensor, *, seed: int = 0) -> float:
    """Kernel distance (KID): the unbiased MMD^2 with kernel (x y / D + 1)^3 between features (N, D) and (M, D).

    The mean over random subsets of at most 1,000 rows of each: 100 subsets of 50,000 rows, as published scores have,
    and fewer of fewer rows (ours), at least 10.

    Source: Binkowski et al. 2018, arXiv:1801.01401, eq. 3 and 4; each subset is computed by torchmetrics in float64.
    """
    from torchmetrics.image.kid import poly_mmd

    rows = min(len(real), len(fake))
    size = min(_KID_SUBSET, rows)
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(max(10, -(-2 * rows // size))):
        x, y = (z[torch.randperm(len(z), generator=generator)[:size]].double() for z in (real, fake))
        values.append(poly_mmd(x, y))
    return float(torch.stack(values).mean())


def vendi_score(features: Tensor) -> float:
    """Effective number of different samples among features (N, D): exp of the entropy of the cosine kernel's spectrum.

    Source: Friedman and Dieng 2023, arXiv:2210.02410, eq. 2, by the D x D matrix that has the same spectrum.
    """
    units = (torch.nn.functional.normalize(part.double(), dim=1) for part in features.split(_ROWS))
    spectrum = torch.linalg.eigvalsh(sum(x.T @ x for x in units) / len(features)).clamp(min=0)
    return float(torch.special.entr(spectrum).sum().exp())


def paired_errors(student: Tensor, teacher: Tensor) -> Tensor:
    """(N,) float64 mean squared differences of samples (N, ...) that started from the same noises."""
    return (student - teacher).double().square().flatten(1).mean(1)
