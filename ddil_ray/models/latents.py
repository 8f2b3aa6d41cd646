"""Images to latents and back, by the autoencoder of a pipeline."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddil_ray.errors import ConfigError
from ddil_ray.models.contents import network_class

__all__ = ["LatentCodec", "load_codec", "vae_scale", "variant_of"]

_WEIGHTS = re.compile(r"model(\.(?P<variant>\w+))?(-\d+-of-\d+)?\.safetensors$")


_PIXELS = 4 * 1024**2
"""Of the images in one pass of an autoencoder: what it holds meanwhile is some hundreds of times as much."""
_AREA = 64
"""Pixels of a latent, about."""


class LatentCodec:
    """Encodes images (B, C, H, W) in [-1, 1] to latents, shifted and scaled as the denoiser is trained on, and back.

    Args:
        vae: an AutoencoderKL or AutoencoderTiny of diffusers, in eval mode.
    """

    def __init__(self, vae: nn.Module) -> None:
        self.vae: Any = vae.requires_grad_(False)
        config: Any = self.vae.config
        if getattr(config, "latents_mean", None) is not None:
            raise ConfigError(
                "`latents_mean` of the teacher's autoencoder must be null, but is set: latents that are normalised "
                "channel by channel are not supported. Use another teacher."
            )
        self._scale, self._shift = float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0)
        self.pixels = _pixels_per_latent(config)
        """Pixels per latent along one side."""

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents of `images`: the mode of the posterior, so that the same image has the same latents."""
        return torch.cat([self._encode(part) for part in images.split(_rows_at_once(images))])

    def _encode(self, images: Tensor) -> Tensor:
        encoded = self.vae.encode(images.to(self._like()))
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        result: Tensor = (latents - self._shift) * self._scale
        return result.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of `latents`, not clipped."""
        parts = (latents / self._scale + self._shift).to(self._like()).split(_rows_at_once(latents, _AREA))
        return torch.cat([self.vae.decode(part).sample.float() for part in parts])

    def to(self, device: torch.device | str) -> LatentCodec:
        """This codec with its network on `device`."""
        self.vae.to(device)
        return self

    def _like(self) -> Tensor:
        parameter: Tensor = next(self.vae.parameters())
        return parameter


def _rows_at_once(rows: Tensor, area: int = 1) -> int:
    """How many of `rows` (B, C, H, W), of `area` pixels per entry, go into one pass."""
    return max(1, _PIXELS // max(1, rows.shape[2] * rows.shape[3] * area))


@functools.lru_cache(maxsize=2)
def load_codec(folder: Path) -> LatentCodec:
    """The codec of a pipeline folder; the same object each time, so that copies of a model share it.

    Raises:
        ConfigError: no readable `vae`.
    """
    try:
        config = json.loads((folder / "vae" / "config.json").read_text())
        vae = network_class(config).from_pretrained(
            folder / "vae",
            low_cpu_mem_usage=False,
            variant=variant_of(folder / "vae"),
            torch_dtype=torch.float32,
            use_safetensors=True,
        )
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"`teacher.model` must be a pipeline with a readable autoencoder, but {folder / 'vae'} failed: {error}."
        ) from error
    return LatentCodec(vae.eval())


def variant_of(component: Path) -> str | None:
    """The variant, such as fp16, of a component's weights where it has no plain ones."""
    found = [match for path in component.glob("*model*") if (match := _WEIGHTS.search(path.name))]
    if any(match["variant"] is None for match in found):
        return None
    return next((str(match["variant"]) for match in found), None)


def vae_scale(folder: Path) -> int:
    """Pixels per latent along one side."""
    return _pixels_per_latent(json.loads((folder / "vae" / "config.json").read_text()))


def _pixels_per_latent(config: Mapping[str, Any]) -> int:
    return int(2 ** (len(config.get("block_out_channels", config.get("encoder_block_out_channels"))) - 1))
