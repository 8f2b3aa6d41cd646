"""Family `stable_diffusion`: latent text-to-image pipelines with a `UNet2DConditionModel` and one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from ddil_ray.diffusion.schedule import schedule_from_diffusers
from ddil_ray.models.family import Family, TextEncoder, checked_prediction, load_component, read_config
from ddil_ray.models.latents import variant_of
from ddil_ray.models.model import DiffusionModel
from ddil_ray.models.network import FamilyNetwork, sinusoid
from ddil_ray.prompts import NEGATIVE, Embeddings

__all__ = ["FAMILY", "StableDiffusion", "StableDiffusionNetwork", "bottleneck_of", "told_guidance"]

_GUIDANCE_CHANNELS = 256
"""Of the guidance embedding of a new student: `time_cond_proj_dim` of the published LCM checkpoints."""


class StableDiffusionNetwork(FamilyNetwork):
    """A `UNet2DConditionModel` that reads prompt ids; told w where it has a guidance embedding."""

    denoiser: UNet2DConditionModel

    def forward(self, x_t: Tensor, time: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        """See `FamilyNetwork.forward`."""
        embeddings = self.embeddings(cond, x_t)
        prediction: Tensor = self.denoiser(
            x_t,
            time,
            encoder_hidden_states=embeddings["prompt"],
            timestep_cond=self.guidance(w, x_t),
            return_dict=False,
        )[0]
        return prediction

    def guidance(self, w: Tensor, x_t: Tensor) -> Tensor | None:
        """The embedding of `w`, where the network has a place for it."""
        channels = self.denoiser.config.time_cond_proj_dim
        return None if channels is None else sinusoid(w, channels).to(x_t)


class _ClipEncoder(TextEncoder):
    def __init__(self, folder: Path, device: torch.device | str) -> None:
        self._pipeline = StableDiffusionPipeline.from_pretrained(
            folder,
            unet=None,
            vae=None,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            variant=variant_of(folder / "text_encoder"),
        ).to(device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Embeddings:
        device = self._pipeline.text_encoder.device
        embedded, _ = self._pipeline.encode_prompt(list(prompts), device, 1, False)
        return {"prompt": embedded.float().cpu()}


class StableDiffusion(Family):
    """Stable Diffusion 1 and 2: epsilon and v."""

    name = "stable_diffusion"
    component = "unet"
    network: type[StableDiffusionNetwork] = StableDiffusionNetwork

    def load(self, folder: Path) -> DiffusionModel:
        """See `Family.load`."""
        scheduler = read_config(folder, "scheduler")
        unet = load_component(UNet2DConditionModel, folder, "unet")
        schedule = schedule_from_diffusers(scheduler)
        size = unet.config.sample_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return DiffusionModel(
            network=self.network(unet),
            prediction=checked_prediction(scheduler, schedule),
            schedule=schedule,
            sample_shape=(unet.config.in_channels, height, width),
            null_cond=NEGATIVE,
            prompted=True,
            reads_guidance=unet.config.time_cond_proj_dim is not None,
            bottleneck=bottleneck_of(unet),
            family=self,
            folder=folder,
            scheduler_config=scheduler,
        )

    def text_encoder(self, folder: Path, device: torch.device | str = "cpu") -> TextEncoder:
        """See `Family.text_encoder`."""
        return _ClipEncoder(folder, device)

    def with_guidance_embedding(self, model: DiffusionModel) -> DiffusionModel:
        """See `Family.with_guidance_embedding`."""
        network = model.network
        assert isinstance(network, StableDiffusionNetwork)
        if network.denoiser.config.time_cond_proj_dim is None:
            network.denoiser = told_guidance(network.denoiser)
        model.reads_guidance = True
        return model

    def plain(self, network: nn.Module, w: float) -> nn.Module:
        """The UNet itself; pipelines tell it w where it reads it."""
        assert isinstance(network, StableDiffusionNetwork)
        unet: nn.Module = network.denoiser
        return unet


def told_guidance(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy of `unet` with a guidance embedding whose projection is 0, so that it computes the same at every w."""
    config = {**unet.config, "time_cond_proj_dim": _GUIDANCE_CHANNELS}
    told = UNet2DConditionModel.from_config(config)
    told.load_state_dict(unet.state_dict(), strict=False)
    projection: Any = told.time_embedding.cond_proj
    nn.init.zeros_(projection.weight)
    return told.to(unet.device).train(unet.training)


def bottleneck_of(unet: UNet2DConditionModel) -> str:
    """The middle block, or the last one on the way down where there is none."""
    return "denoiser.mid_block" if unet.mid_block is not None else f"denoiser.down_blocks.{len(unet.down_blocks) - 1}"


FAMILY = StableDiffusion()
