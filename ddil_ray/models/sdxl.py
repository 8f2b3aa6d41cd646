"""Family `sdxl`: Stable Diffusion XL, and smaller pipelines of its kind such as SSD-1B.

Their UNets read two text encoders, a pooled embedding, and the sizes of an image: the one it was made from, where it
was cropped, and the one to make (Podell et al. 2023, arXiv:2307.01952, section 2.2). Here a network is always told the
sizes that its pipeline tells it at inference: those of the sample itself, not cropped, whatever those of the training
images were. So a student learns what it is later asked for. `ddil-ray prepare` keeps the images' own sizes and crops
for whoever needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from ddil_ray.errors import ConfigError
from ddil_ray.models.encoder import PipelineEncoder
from ddil_ray.models.latents import vae_scale
from ddil_ray.models.model import DiffusionModel
from ddil_ray.models.stable_diffusion import StableDiffusion, StableDiffusionNetwork
from ddil_ray.prompts import Embeddings

__all__ = ["FAMILY", "Sdxl", "SdxlNetwork"]


class SdxlNetwork(StableDiffusionNetwork):
    """A `UNet2DConditionModel` that also reads pooled embeddings and sizes.

    Args:
        unet: the diffusers network; used, not copied.
        pixels: per latent, along one side.
    """

    def __init__(self, unet: UNet2DConditionModel, pixels: int) -> None:
        super().__init__(unet)
        self.pixels = pixels

    def added(self, embeddings: Embeddings, x_t: Tensor) -> dict[str, Tensor]:
        """Pooled embeddings, and six numbers: original height and width, crop from top and left, target height and
        width, in pixels."""
        height, width = (self.pixels * side for side in x_t.shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=x_t.device)
        return {"text_embeds": embeddings["pooled"], "time_ids": sizes.expand(len(x_t), -1)}


class _TwoClipEncoders(PipelineEncoder):
    kind = StableDiffusionXLPipeline
    without = ("unet", "vae", "feature_extractor", "image_encoder")

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Embeddings:
        words, _, pooled, _ = self.pipeline.encode_prompt(list(prompts), None, self.device, 1, False)
        return {"prompt": words.float().cpu(), "pooled": pooled.float().cpu()}

    @torch.no_grad()
    def negative(self, prompt: str | None) -> Embeddings:
        """See `TextEncoder.negative`; for None zeros, where the pipeline's `force_zeros_for_empty_prompt` says so."""
        encoded = self.pipeline.encode_prompt([""], None, self.device, 1, True, negative_prompt=prompt)
        _, words, _, pooled = encoded
        return {"prompt": words.float().cpu(), "pooled": pooled.float().cpu()}


class Sdxl(StableDiffusion):
    """Stable Diffusion XL: epsilon and v."""

    name = "sdxl"
    encoder = _TwoClipEncoders

    def load(self, folder: Path) -> DiffusionModel:
        """See `Family.load`."""
        absent = [name for name in ("text_encoder", "text_encoder_2") if not (folder / name).is_dir()]
        if absent:
            raise ConfigError(
                f"`teacher.model` must be an SDXL pipeline with both text encoders, but {folder} has no "
                f"{' and no '.join(absent)}, as a refiner has not. Use the base pipeline."
            )
        return super().load(folder)

    def network(self, unet: UNet2DConditionModel, folder: Path) -> SdxlNetwork:
        """See `StableDiffusion.network`."""
        return SdxlNetwork(unet, vae_scale(folder))


FAMILY = Sdxl()
