"""Family `stable_diffusion`: latent text-to-image pipelines with a `UNet2DConditionModel` and one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from ddil_ray.diffusion.schedule import schedule_from_diffusers
from ddil_ray.errors import ConfigError
from ddil_ray.models.encoder import PipelineEncoder
from ddil_ray.models.family import Family, TextEncoder, checked_prediction, load_component, read_config
from ddil_ray.models.model import DiffusionModel
from ddil_ray.models.network import FamilyNetwork, sinusoid
from ddil_ray.prompts import NEGATIVE, Embeddings

__all__ = [
    "FAMILY",
    "StableDiffusion",
    "StableDiffusionNetwork",
    "bottleneck_of",
    "told_guidance",
]

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
            added_cond_kwargs=self.added(embeddings, x_t),
            timestep_cond=self.guidance(w, x_t),
            return_dict=False,
        )[0]
        return prediction

    def added(self, embeddings: Embeddings, x_t: Tensor) -> dict[str, Tensor] | None:
        """What the UNet reads besides a prompt's embedded words, by its own names."""
        return None

    def guidance(self, w: Tensor, x_t: Tensor) -> Tensor | None:
        """The embedding of `w`, where the network has a place for it."""
        channels = self.denoiser.config.time_cond_proj_dim
        return None if channels is None else sinusoid(w, channels).to(x_t)


class _ClipEncoder(PipelineEncoder):
    kind = StableDiffusionPipeline
    without = ("unet", "vae", "safety_checker", "feature_extractor", "image_encoder")

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Embeddings:
        """See `TextEncoder`."""
        embedded, _ = self.pipeline.encode_prompt(list(prompts), self.device, 1, False)
        return {"prompt": embedded.float().cpu()}


class StableDiffusion(Family):
    """Stable Diffusion 1 and 2: epsilon and v."""

    name = "stable_diffusion"
    component = "unet"
    encoder: type[PipelineEncoder] = _ClipEncoder

    def network(self, unet: UNet2DConditionModel, folder: Path) -> StableDiffusionNetwork:
        """`unet` of the pipeline in `folder`, wrapped."""
        return StableDiffusionNetwork(unet)

    def load(self, folder: Path) -> DiffusionModel:
        """See `Family.load`."""
        scheduler = read_config(folder, "scheduler")
        unet = load_component(UNet2DConditionModel, folder, "unet")
        _check_reads_noise_alone(unet, folder)
        schedule = schedule_from_diffusers(scheduler)
        size = unet.config.sample_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return DiffusionModel(
            network=self.network(unet, folder),
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
        return self.encoder(folder, device)

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


def _check_reads_noise_alone(unet: UNet2DConditionModel, folder: Path) -> None:
    read, made = unet.config.in_channels, unet.config.out_channels
    if read != made:
        raise ConfigError(
            f"`teacher.model` must be a text-to-image pipeline, whose UNet reads as many channels as it predicts, but "
            f"that of {folder} reads {read} and predicts {made}, as those that fill in or edit images do. Use the "
            "pipeline it was made from."
        )


FAMILY = StableDiffusion()
