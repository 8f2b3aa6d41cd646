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

__all__ = ["LatentCodec", "load_codec", "vae_scale", "variant_of"]

_WEIGHTS = re.compile(r"model(\.(?P<variant>\w+))?(-\d+-of-\d+)?\.(safetensors|bin)$")


class LatentCodec:
    """Encodes images (B, C, H, W) in [-1, 1] to latents, shifted and scaled as the denoiser is trained on, and back.

    Args:
        vae: an AutoencoderKL or AutoencoderTiny of diffusers, in eval mode.
    """

    def __init__(self, vae: nn.Module) -> None:
        self.vae: Any = vae.requires_grad_(False)
        config: Any = self.vae.config
        self._scale, self._shift = float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0)
        self.pixels = _pixels_per_latent(config)
        """Pixels per latent along one side."""

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents of `images`: the mode of the posterior, so that the same image has the same latents."""
        encoded = self.vae.encode(images.to(self._like()))
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        result: Tensor = (latents - self._shift) * self._scale
        return result.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of `latents`, not clipped."""
        images: Tensor = self.vae.decode((latents / self._scale + self._shift).to(self._like())).sample
        return images.float()

    def to(self, device: torch.device | str) -> LatentCodec:
        """This codec with its network on `device`."""
        self.vae.to(device)
        return self

    def _like(self) -> Tensor:
        parameter: Tensor = next(self.vae.parameters())
        return parameter


@functools.lru_cache(maxsize=2)
def load_codec(folder: Path) -> LatentCodec:
    """The codec of a pipeline folder; the same object each time, so that copies of a model share it.

    Raises:
        ConfigError: no readable `vae`.
    """
    import diffusers

    try:
        config = json.loads((folder / "vae" / "config.json").read_text())
        vae = getattr(diffusers, config["_class_name"]).from_pretrained(
            folder / "vae", low_cpu_mem_usage=False, variant=variant_of(folder / "vae"), torch_dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, AttributeError) as error:
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
