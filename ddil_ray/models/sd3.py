"""Family `sd3`: Stable Diffusion 3 and 3.5, flow matching over latents with up to three text encoders.

Prompts are embedded at the pipeline's default `max_sequence_length` of 256 T5 tokens, after the 77 of CLIP.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from ddil_ray.models.encoder import PipelineEncoder
from ddil_ray.models.family import TextEncoder, read_config
from ddil_ray.models.flow import FlowFamily, denoiser_of, refused_size
from ddil_ray.models.model import DiffusionModel
from ddil_ray.models.network import FamilyNetwork
from ddil_ray.prompts import Embeddings

__all__ = ["FAMILY", "Sd3", "Sd3Network"]


class Sd3Network(FamilyNetwork):
    """An `SD3Transformer2DModel` that reads prompt ids."""

    denoiser: SD3Transformer2DModel

    def forward(self, x_t: Tensor, time: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        """See `FamilyNetwork.forward`."""
        embeddings = self.embeddings(cond, x_t)
        prediction: Tensor = self.denoiser(
            x_t,
            timestep=time,
            encoder_hidden_states=embeddings["prompt"],
            pooled_projections=embeddings["pooled"],
            return_dict=False,
        )[0]
        return prediction


class _ThreeEncoders(PipelineEncoder):
    kind = StableDiffusion3Pipeline
    without = ("transformer", "vae", "image_encoder", "feature_extractor")

    def __init__(self, folder: Path, device: torch.device | str) -> None:
        super().__init__(folder, device)
        # Without T5 the pipeline asks the transformer how wide its zeros are to be.
        self.pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**read_config(folder, "transformer")))

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Embeddings:
        words, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), None, None, self.device, do_classifier_free_guidance=False
        )
        return {"prompt": words.float().cpu(), "pooled": pooled.float().cpu()}


class Sd3(FlowFamily):
    """Stable Diffusion 3 and 3.5. Called without `sigmas`, its pipeline takes the scheduler's own times, of which the
    last is nearly 0; see `flow_scheduler`."""

    name = "sd3"
    trailing = False
    kind = SD3Transformer2DModel
    network = Sd3Network

    def channels(self, transformer: Any) -> int:
        """See `FlowFamily.channels`."""
        return int(transformer.config.in_channels)

    def size(self, transformer: Any, folder: Path) -> int:
        """See `FlowFamily.size`."""
        return int(transformer.config.sample_size)

    def patch(self, transformer: Any) -> int:
        """See `FlowFamily.patch`."""
        return int(transformer.config.patch_size)

    def resized(self, model: DiffusionModel, size: tuple[int, int]) -> DiffusionModel:
        """See `FlowFamily.resized`; also refuses what is larger than the position embeddings."""
        config = denoiser_of(model).config
        most = config.patch_size * config.pos_embed_max_size
        if max(size) > most:
            raise refused_size(size, f"at most {most} x {most}, for which the transformer has positions")
        return super().resized(model, size)

    def text_encoder(self, folder: Path, device: torch.device | str = "cpu") -> TextEncoder:
        """See `Family.text_encoder`."""
        return _ThreeEncoders(folder, device)


FAMILY = Sd3()
