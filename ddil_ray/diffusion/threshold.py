"""Thresholds on x_0 estimates, the "reflected diffusion" that keeps distillation stable.

A threshold is a function x_0 -> x_0'. eps and v are re-derived from x_0' wherever they are needed (`to_eps`), so that
alpha x_0' + sigma eps' = x_t stays exact. To add one: write a class and a row in `THRESHOLDS`.

Sources: Saharia et al. 2022, arXiv:2205.11487, section 2.3 (static, dynamic); Lou and Ermon 2023, arXiv:2304.04740
(thresholding as a discretised reflected process). Per-channel calibration is this project's own choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "THRESHOLDS",
    "DynamicThreshold",
    "NoThreshold",
    "PerChannelThreshold",
    "StaticThreshold",
    "Threshold",
    "clip_fraction",
    "reflect",
]


class Threshold(Protocol):
    """Brings an x_0 estimate (B, C, ...) back to where data lies."""

    def __call__(self, x_0: Tensor) -> Tensor:
        """The thresholded estimate, same shape and dtype."""


@dataclass(frozen=True)
class NoThreshold:
    """Leaves x_0 as it is, bit for bit."""

    def __call__(self, x_0: Tensor) -> Tensor:
        """`x_0` itself."""
        return x_0


@dataclass(frozen=True)
class StaticThreshold:
    """Clips to [-bound, bound]."""

    bound: float = 1.0

    def __call__(self, x_0: Tensor) -> Tensor:
        """Clipped `x_0`."""
        return x_0.clamp(-self.bound, self.bound)


_FITTED_ROWS = 4096
"""Rows that bounds are read off at most: a copy of them in float64 is made in every process."""


@dataclass(frozen=True)
class PerChannelThreshold:
    """Clips channel c to [low[c], high[c]], bounds calibrated on data with `fit`. For latents, which have no range."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def fit(cls, x_0: Tensor, *, quantile: float = 0.9995, margin: float = 0.1) -> PerChannelThreshold:
        """Bounds from data `x_0` (N, C, ...): the [1 - quantile, quantile] range, widened by `margin` of its width.

        Of more than `_FITTED_ROWS` rows every so-manieth is looked at.
        """
        x_0 = x_0[:: max(1, -(-len(x_0) // _FITTED_ROWS))]
        channels = x_0.movedim(1, 0).flatten(1).double().numpy()
        import numpy as np  # torch.quantile refuses more than 2^24 values

        low, high = np.quantile(channels, [1 - quantile, quantile], axis=1)
        spare = margin * (high - low) / 2
        return cls(tuple((low - spare).tolist()), tuple((high + spare).tolist()))

    def __call__(self, x_0: Tensor) -> Tensor:
        """Clipped `x_0`."""
        shape = (1, -1, *([1] * (x_0.ndim - 2)))
        low, high = (x_0.new_tensor(bound).reshape(shape) for bound in (self.low, self.high))
        return x_0.clamp(low, high)


@dataclass(frozen=True)
class DynamicThreshold:
    """Imagen's: q = max(quantile of |x_0| per sample, bound); clip to [-q, q] and scale by bound / q."""

    quantile: float = 0.995
    bound: float = 1.0

    def __call__(self, x_0: Tensor) -> Tensor:
        """Clipped and rescaled `x_0`."""
        q = torch.quantile(x_0.abs().flatten(1).float(), self.quantile, dim=1)
        q = q.clamp(min=self.bound).to(x_0.dtype).reshape(-1, *([1] * (x_0.ndim - 1)))
        return x_0.clamp(-q, q) * (self.bound / q)


THRESHOLDS: dict[str, Callable[..., Threshold]] = {
    "none": NoThreshold,
    "static": StaticThreshold,
    "per_channel": PerChannelThreshold,
    "dynamic": DynamicThreshold,
}
"""Every threshold by the name it has in a config."""


def clip_fraction(x_0: Tensor, thresholded: Tensor) -> float:
    """Share of values that a threshold changed, in [0, 1]."""
    return float((x_0 != thresholded).double().mean())


def reflect(x: Tensor, low: float, high: float) -> Tensor:
    """Fold `x` into [low, high] as a mirror at both ends would.

    Source: Lou and Ermon 2023, arXiv:2304.04740, section 5 (the reflection step of a reflected random walk).
    """
    width = high - low
    folded = torch.remainder(x - low, 2 * width)
    return low + torch.where(folded > width, 2 * width - folded, folded)
