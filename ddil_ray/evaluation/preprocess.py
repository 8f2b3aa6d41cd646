"""From images in [-1, 1] to the pixels that a pretrained network was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own short name

from ddil_ray.errors import ConfigError, first_line

__all__ = ["Preprocessing", "load_preprocessing", "to_three_channels"]


def to_three_channels(images: Tensor) -> Tensor:
    """(N, 3, H, W) of (N, C, H, W): grey repeated, channels beyond the third dropped."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class Preprocessing:
    """Resize to a square and normalise per channel.

    The whole image is resized, where processors of photographs crop the middle: samples are square and centred.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, size, size) of (N, C, H, W) images in [-1, 1]."""
        pixels = (to_three_channels(images) + 1) / 2
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(v, device=images.device).reshape(1, 3, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std


def load_preprocessing(model: str, *, field: str) -> Preprocessing:
    """What the preprocessor_config.json of a transformers model (folder or hub id) asks for.

    Raises:
        ConfigError: it is not there, or has no size.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        config, _ = ImageProcessingMixin.get_image_processor_dict(model)
        size = _pixels(config.get("crop_size") if config.get("do_center_crop", True) else None) or _pixels(
            config.get("size")
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`{field}` must come with a readable preprocessor_config.json, but {model!r} failed: {first_line(error)}"
        ) from error
    if size is None:
        raise ConfigError(f"`{field}` must state a size in its preprocessor_config.json, but {model!r} has none.")
    mean, std = (tuple(map(float, config.get(name) or [0.5] * 3)) for name in ("image_mean", "image_std"))
    return Preprocessing(size, mean, std)


def _pixels(size: int | Mapping[str, Any] | None) -> int | None:
    """Pixels of a side, in whichever form transformers wrote them."""
    if isinstance(size, Mapping):
        found = [size[name] for name in ("height", "shortest_edge", "longest_edge") if name in size]
        return int(found[0]) if found else None
    return size
