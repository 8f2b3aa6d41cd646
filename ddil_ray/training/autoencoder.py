"""Training a small autoencoder: the first stage of a latent teacher."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ddil_ray.config.text_teacher import Autoencoder
from ddil_ray.errors import ConfigError, first_line
from ddil_ray.models.latents import LatentCodec
from ddil_ray.training.fitting import OnRecord, fit

__all__ = ["new_autoencoder", "psnr", "train_autoencoder"]

_BATCH = 128


def new_autoencoder(config: Autoencoder, *, size: int) -> AutoencoderKL:
    """An untrained autoencoder for RGB images of `size` pixels, without attention.

    Raises:
        ConfigError: images that cannot be halved so often, or groups that do not divide the channels.
    """
    depth = len(config.block_out_channels)
    if size % 2 ** (depth - 1):
        raise ConfigError(
            f"`image_size` must be a multiple of {2 ** (depth - 1)}, as `autoencoder.block_out_channels` halves images "
            f"{depth - 1} times, but is {size} instead."
        )
    try:
        return AutoencoderKL(
            block_out_channels=config.block_out_channels,
            down_block_types=("DownEncoderBlock2D",) * depth,
            up_block_types=("UpDecoderBlock2D",) * depth,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_num_groups,
            mid_block_add_attention=False,
            sample_size=size,
            scaling_factor=1.0,
        )
    except Exception as error:  # of diffusers and torch, which run out of memory too
        raise ConfigError(
            f"`autoencoder` must describe an AutoencoderKL, but diffusers refuses it: {first_line(error)}. Change its "
            "channels, or `norm_num_groups`, which divides them."
        ) from error


def train_autoencoder(
    vae: AutoencoderKL, images: Tensor, config: Autoencoder, *, seed: int, on_record: OnRecord
) -> AutoencoderKL:
    """Fit `vae` to `images` (N, 3, H, W) in [-1, 1]; its scaling factor then gives latents a deviation of 1.

    The loss per value of an image is the absolute plus the squared error (ours; Stable Diffusion's has a perceptual
    and an adversarial term, for which networks and data are missing here), and `kl_weight` times the divergence from
    the standard normal law per value of the latents.

    Source: Kingma and Welling 2014, arXiv:1312.6114, eq. 10; Rombach et al. 2022, arXiv:2112.10752, section 3.1.
    """
    generator = torch.Generator().manual_seed(seed)
    network: Any = vae

    def loss() -> Tensor:
        x = images[torch.randint(len(images), (config.batch_size,), generator=generator)]
        posterior = network.encode(x).latent_dist
        error = network.decode(posterior.sample(generator)).sample - x
        divergence: Tensor = posterior.kl().sum() / posterior.mean.numel()
        total: Tensor = error.abs().mean() + error.square().mean() + config.kl_weight * divergence
        return total

    fitted: Any = fit(vae, loss, config, on_record)
    latents = torch.cat([LatentCodec(fitted).encode(part) for part in images.split(_BATCH)])
    fitted.register_to_config(scaling_factor=1 / float(latents.std()))
    return fitted


@torch.no_grad()
def psnr(codec: LatentCodec, images: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of what is left of all `images` (N, C, H, W), whose values range over 2."""
    parts = [(codec.decode(codec.encode(part)).clamp(-1, 1) - part).square() for part in images.split(_BATCH)]
    return 10 * math.log10(4 / float(torch.cat(parts).mean()))
