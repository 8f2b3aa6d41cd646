"""Family `flux`: FLUX.1, flow matching over latents that its transformer reads as tokens of 2 x 2.

The teacher of `dev` is told the guidance scale g = w + 1 and guides itself in one pass; `schnell` is not, and can be
guided towards a negative prompt like any other (the pipeline's `true_cfg_scale` = w + 1). Prompts are embedded at the
pipeline's default `max_sequence_length` of 512 T5 tokens, also for `schnell`, whose published examples use 256.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own short name

from ddil_ray.errors import ConfigError
from ddil_ray.models.encoder import PipelineEncoder
from ddil_ray.models.family import TextEncoder, read_config
from ddil_ray.models.flow import FlowFamily
from ddil_ray.models.latents import vae_scale
from ddil_ray.models.network import FamilyNetwork
from ddil_ray.prompts import Embeddings

__all__ = ["FAMILY", "Flux", "FluxNetwork", "pack", "unpack"]

_PATCH = 2


def pack(latents: Tensor) -> Tensor:
    """Tokens (B, H/2 * W/2, 4 C) of latents (B, C, H, W), as the pipeline's `_pack_latents` gives them."""
    return F.pixel_unshuffle(latents, _PATCH).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents (B, C, height, width) of tokens (B, H/2 * W/2, 4 C), as the pipeline's `_unpack_latents` gives them."""
    patches = tokens.transpose(1, 2).unflatten(2, (height // _PATCH, width // _PATCH))
    return F.pixel_shuffle(patches, _PATCH)


class FluxNetwork(FamilyNetwork):
    """A `FluxTransformer2DModel` that reads prompt ids and latents; told w where it has a guidance embedding."""

    denoiser: FluxTransformer2DModel

    def forward(self, x_t: Tensor, time: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        """See `FamilyNetwork.forward`."""
        embeddings, (height, width) = self.embeddings(cond, x_t), x_t.shape[-2:]
        tokens: Tensor = self.denoiser(
            pack(x_t),
            timestep=time / 1000,
            guidance=w + 1 if self.denoiser.config.guidance_embeds else None,
            encoder_hidden_states=embeddings["prompt"],
            pooled_projections=embeddings["pooled"],
            txt_ids=torch.zeros(embeddings["prompt"].shape[1], 3, device=x_t.device),
            img_ids=_positions(height // _PATCH, width // _PATCH, x_t.device),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)


def _positions(height: int, width: int, device: torch.device) -> Tensor:
    """(height * width, 3): 0, row and column of each token."""
    return torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32, device=device) for n in (1, height, width)))


class _TwoEncoders(PipelineEncoder):
    kind = FluxPipeline
    without = ("transformer", "vae", "image_encoder", "feature_extractor")

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Embeddings:
        words, pooled, _ = self.pipeline.encode_prompt(list(prompts), device=self.device)
        return {"prompt": words.float().cpu(), "pooled": pooled.float().cpu()}


class Flux(FlowFamily):
    """FLUX.1 dev and schnell."""

    name = "flux"
    channels_per_sample = _PATCH**2
    trailing = True
    kind = FluxTransformer2DModel
    network = FluxNetwork

    def channels(self, transformer: Any) -> int:
        """See `FlowFamily.channels`."""
        read, made = transformer.config.in_channels, transformer.out_channels
        if read != made:
            raise ConfigError(
                f"`teacher.model` must be a text-to-image pipeline, whose transformer reads as many channels as it "
                f"predicts, but this one reads {read} and predicts {made}, as those that fill in or edit images do. "
                "Use the pipeline it was made from."
            )
        return int(read) // _PATCH**2

    def size(self, transformer: Any, folder: Path) -> int:
        """See `FlowFamily.size`. The transformer knows no size of its own, but the autoencoder does, in pixels."""
        pixels = read_config(folder, "vae").get("sample_size", 1024)
        return int(pixels) // vae_scale(folder)

    def patch(self, transformer: Any) -> int:
        """See `FlowFamily.patch`."""
        return _PATCH

    def reads_guidance(self, transformer: Any) -> bool:
        """See `FlowFamily.reads_guidance`."""
        return bool(transformer.config.guidance_embeds)

    def text_encoder(self, folder: Path, device: torch.device | str = "cpu") -> TextEncoder:
        """See `Family.text_encoder`."""
        return _TwoEncoders(folder, device)


FAMILY = Flux()
