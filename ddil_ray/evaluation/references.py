"""The data that samples are compared with, as latents where they are latents, and as the pictures that they show."""

from __future__ import annotations

from dataclasses import replace

import torch

from ddil_ray.data import ImageData
from ddil_ray.models.latents import LatentCodec

__all__ = ["pictures_of", "reference_rows"]

_BATCH = 16


def reference_rows(data: ImageData, *, num_samples: int, seed: int) -> ImageData:
    """The rows of `data` that samples are compared with: all, or of latents, which have to be decoded first, as many
    as there are samples, drawn by `seed`. Samples then have the prompts of these rows."""
    if not data.latents or len(data) <= num_samples:
        return data
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:num_samples].sort().values
    return replace(data, images=data.images[chosen], labels=data.labels[chosen])


def pictures_of(data: ImageData, codec: LatentCodec | None, sample_shape: tuple[int, ...]) -> ImageData:
    """`data` with its latents decoded; of prompts alone no picture, but of the size that samples have.

    Args:
        data: any.
        codec: of its latents.
        sample_shape: (C, H, W) of a latent.
    """
    if codec is None or not data.latents:
        return data
    if not len(data):
        return replace(data, images=codec.decode(torch.zeros(1, *sample_shape))[:0], prepared_for=None)
    images = torch.cat([codec.decode(part).clamp(-1, 1) for part in data.images.split(_BATCH)])
    return replace(data, images=images, prepared_for=None)
