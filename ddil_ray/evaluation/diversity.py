"""LPIPS diversity: how different samples of one condition look, as the mean distance of random pairs.

A model that gives one picture per condition scores 0, however good the picture. Pairs are made within a block, so that
no image outlives its block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own short name

from ddil_ray.errors import ConfigError, first_line
from ddil_ray.evaluation.preprocess import to_three_channels

__all__ = ["ImageDistance", "Lpips", "load_lpips", "pair_distances", "pairs_of_a_condition"]

_LEAST_PIXELS = 64
"""Smaller images are enlarged to this (ours): the networks need 32 pixels or more."""


class ImageDistance(Protocol):
    """A distance between images."""

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """(P,) distances of images (P, C, H, W) in [-1, 1]."""

    def to(self, device: torch.device | str) -> ImageDistance:
        """The same distance, computed on `device`."""


@dataclass(frozen=True)
class Lpips:
    """Learned perceptual distance.

    Source: Zhang et al. 2018, arXiv:1801.03924, eq. 1; computed by torchmetrics.
    """

    metric: nn.Module
    """`LearnedPerceptualImagePatchSimilarity` that does not reduce."""
    device: torch.device | str = "cpu"

    def to(self, device: torch.device | str) -> Lpips:
        """See `ImageDistance`."""
        self.metric.to(device)
        return replace(self, device=device)

    @torch.no_grad()
    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """See `ImageDistance`."""
        distances: Tensor = self.metric(*(self._fitting(images) for images in (first, second)))
        self.metric.reset()  # type: ignore[operator]
        return distances.flatten().cpu()

    def _fitting(self, images: Tensor) -> Tensor:
        images = to_three_channels(images).to(self.device)
        if min(images.shape[-2:]) >= _LEAST_PIXELS:
            return images
        enlarged: Tensor = F.interpolate(images, (_LEAST_PIXELS, _LEAST_PIXELS), mode="bilinear")
        return enlarged


def load_lpips(network: str) -> Lpips:
    """LPIPS on `network`: alex, vgg or squeeze.

    Raises:
        ConfigError: torchvision, which has these networks, or their weights are missing.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        return Lpips(LearnedPerceptualImagePatchSimilarity(network, reduction="none"))
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"`evaluation.lpips` must be none where torchvision is missing, but is {network}. Run `pip install "
            "torchvision` (of the release that fits your torch), or set `evaluation.lpips=none`."
        ) from error
    except OSError as error:  # the weights are fetched once
        raise ConfigError(
            f"`evaluation.lpips` must be a network whose weights are there or can be fetched, but {network} failed: "
            f"{first_line(error)}"
        ) from error


def pair_distances(images: Tensor, cond: Tensor, distance: ImageDistance, generator: torch.Generator) -> Tensor:
    """(P,) distances within random pairs of `images` (N, C, H, W) that share a condition `cond` (N,)."""
    first, second = pairs_of_a_condition(cond, generator)
    return distance(images[first], images[second]) if len(first) else torch.zeros(0)


def pairs_of_a_condition(cond: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows (P,) and (P,) of random pairs with one condition each, no row in two pairs; as many as there are."""
    order = torch.randperm(len(cond), generator=generator)
    order = order[cond[order].argsort(stable=True)]
    grouped = cond[order]
    place = torch.arange(len(cond)) - torch.searchsorted(grouped, grouped)
    starts = (place[:-1] % 2 == 0) & (grouped[:-1] == grouped[1:])
    (rows,) = starts.nonzero(as_tuple=True)
    return order[rows], order[rows + 1]
