"""The form that every feature network has: images in, rows of features out, and a name for the reader."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ddil_ray.data import ImageData
from ddil_ray.errors import ConfigError

__all__ = ["FeatureNetwork", "checked_network"]

_ROWS = 128
"""Images per pass."""


@dataclass(frozen=True)
class FeatureNetwork:
    """Images to features."""

    body: nn.Module
    """Maps (N, C, H, W) float32 images in [-1, 1] to (N, D)."""
    name: str
    """What it is, to be printed beside every score."""
    size: int | None = None
    """Pixels that images are resized to, where they are."""
    device: torch.device | str = "cpu"

    def to(self, device: torch.device | str) -> FeatureNetwork:
        """This network on `device`; its weights are moved, not copied."""
        self.body.to(device)
        return replace(self, device=device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(N, D) float32 features, on the CPU, of (N, C, H, W) images in [-1, 1]."""
        return torch.cat([self.body(part.float().to(self.device)).float().cpu() for part in images.split(_ROWS)])


def checked_network(body: nn.Module, *, origin: str, size: int | None, data: ImageData) -> FeatureNetwork:
    """The network `body` of `origin`, in eval mode, after a trial on two images of `data`.

    Raises:
        ConfigError: it fails on such images, or what it returns is not one row of finite features per image, or not the
            same each time.
    """
    network = FeatureNetwork(body.eval().requires_grad_(False), origin, size)
    rule = f"`evaluation.features` must map images (N, {', '.join(map(str, data.images.shape[1:]))}) to rows (N, D)"
    try:
        features, again = network(data.images[:2]), network(data.images[:2])
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{rule}, but {origin} failed on two images: {error}") from error
    if features.ndim != 2 or len(features) != 2 or not bool(features.isfinite().all()):
        raise ConfigError(f"{rule}, but {origin} gave shape {tuple(features.shape)} or values that are not finite.")
    if not torch.allclose(features, again, rtol=1e-3, atol=1e-5):
        raise ConfigError(f"{rule}, the same each time, but {origin} gave other ones when it was asked again.")
    return replace(network, name=f"{features.shape[1]} features of {origin}")
