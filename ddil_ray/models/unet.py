"""Family `unet`: pixel-space `UNet2DModel` pipelines of diffusers, class-conditional or unconditional."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ConsistencyModelPipeline, UNet2DModel
from torch import Tensor, nn

from ddil_ray.diffusion.schedule import schedule_from_diffusers
from ddil_ray.models.family import Family, checked_prediction, load_component, read_config
from ddil_ray.models.model import DiffusionModel
from ddil_ray.models.network import FamilyNetwork, sinusoid

__all__ = ["FAMILY", "PixelUNet", "UNetNetwork", "new_unet", "unet_model"]

_GUIDANCE_CHANNELS = 64


class _GuidedTimeEmbedding(nn.Module):
    """A time embedding that also reads guidance: inner(sample + projection(sinusoid(1000 w))), projection 0 at first.

    Source: Meng et al. 2023, arXiv:2210.03142, section 3.1; zero-initialised here, so that a new student is exactly
    its teacher.
    """

    def __init__(self, inner: nn.Module, channels: int) -> None:
        super().__init__()
        self.inner = inner
        self.projection = nn.Linear(_GUIDANCE_CHANNELS, channels, bias=False)
        nn.init.zeros_(self.projection.weight)
        self.w: Tensor | None = None

    def offset(self, w: Tensor) -> Tensor:
        """What guidance `w` (B,) adds to the inner embedding's input, (B, channels)."""
        projected: Tensor = self.projection(sinusoid(w, _GUIDANCE_CHANNELS))
        return projected

    def forward(self, sample: Tensor) -> Tensor:
        """The embedding of `sample` under the guidance last set in `w`."""
        assert self.w is not None
        embedded: Tensor = self.inner(sample + self.offset(self.w).to(sample.dtype))
        return embedded


class UNetNetwork(FamilyNetwork):
    """A `UNet2DModel` with this library's network signature, optionally conditioned on guidance.

    Args:
        unet: the diffusers network; used, not copied.
        guidance_embedding: let the time embedding read w.
    """

    denoiser: UNet2DModel

    def __init__(self, unet: UNet2DModel, *, guidance_embedding: bool = False) -> None:
        super().__init__(unet)
        self.conditional = unet.config.num_class_embeds is not None
        if guidance_embedding:
            embedding = unet.time_embedding
            unet.time_embedding = _GuidedTimeEmbedding(embedding, embedding.linear_1.in_features)

    def forward(self, x_t: Tensor, time: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        """Raw prediction (B, C, H, W)."""
        if isinstance(self.denoiser.time_embedding, _GuidedTimeEmbedding):
            self.denoiser.time_embedding.w = w
        labels = cond if self.conditional else None
        prediction: Tensor = self.denoiser(x_t, time, class_labels=labels, return_dict=False)[0]
        return prediction

    @torch.no_grad()
    def plain_unet(self, w: float) -> UNet2DModel:
        """A plain `UNet2DModel` that computes what this network computes at guidance `w`, exactly.

        The guidance offset enters before a linear layer, so at one w it is a change of that layer's bias.
        """
        plain = UNet2DModel.from_config(self.denoiser.config)
        embedding = self.denoiser.time_embedding
        state = self.denoiser.state_dict()
        if isinstance(embedding, _GuidedTimeEmbedding):
            linear: Any = embedding.inner.linear_1
            bias = linear.bias + linear.weight @ embedding.offset(torch.tensor([w]).to(linear.bias))[0]
            state.pop("time_embedding.projection.weight")
            state = {k.replace("time_embedding.inner.", "time_embedding."): v for k, v in state.items()}
            state["time_embedding.linear_1.bias"] = bias
        plain.load_state_dict(state)
        return plain


def unet_model(
    unet: UNet2DModel, scheduler_config: dict[str, Any], *, guidance_embedding: bool = False
) -> DiffusionModel:
    """The `DiffusionModel` of a diffusers network and scheduler config.

    Raises:
        ConfigError: see `checked_prediction`.
    """
    size = unet.config.sample_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    schedule = schedule_from_diffusers(scheduler_config)
    conditions = unet.config.num_class_embeds
    return DiffusionModel(
        network=UNetNetwork(unet, guidance_embedding=guidance_embedding),
        prediction=checked_prediction(scheduler_config, schedule),
        schedule=schedule,
        sample_shape=(unet.config.in_channels, height, width),
        num_conditions=conditions,
        null_cond=None if conditions is None else conditions - 1,
        bottleneck="denoiser.mid_block",
        reads_guidance=guidance_embedding,
        family=FAMILY,
        scheduler_config=dict(scheduler_config),
    )


class PixelUNet(Family):
    """Pipelines such as DDPM, DDIM and ConsistencyModel."""

    name = "unet"
    component = "unet"
    latent = False

    def load(self, folder: Path) -> DiffusionModel:
        """See `Family.load`."""
        config = read_config(folder, "scheduler")
        model = unet_model(load_component(UNet2DModel, folder, "unet"), config)
        model.folder = folder
        return model

    def with_guidance_embedding(self, model: DiffusionModel) -> DiffusionModel:
        """See `Family.with_guidance_embedding`."""
        assert isinstance(model.network, UNetNetwork)
        told = model.with_network(UNetNetwork(model.network.denoiser, guidance_embedding=True))
        told.reads_guidance = True
        return told

    def pipeline(self, model: DiffusionModel, scheduler: Any, *, w: float) -> ConsistencyModelPipeline:
        """One that samples with DDIM and LCM schedulers alike, and takes `class_labels`."""
        return ConsistencyModelPipeline(unet=self.plain(model.network, w), scheduler=scheduler)

    def example(self, model: DiffusionModel, *, times: Tensor) -> str:
        """See `Family.example`."""
        labels = ", class_labels=[0] * 8" if model.num_conditions else ""
        return f"batch_size=8, num_inference_steps={len(times) - 1}{labels}"

    def guidance_scale(self, model: DiffusionModel, w: float) -> None:
        """See `Family.guidance_scale`."""

    def plain(self, network: nn.Module, w: float) -> nn.Module:
        """See `Family.plain`."""
        assert isinstance(network, UNetNetwork)
        plain: nn.Module = network.plain_unet(w)
        return plain


FAMILY = PixelUNet()


def new_unet(
    *,
    sample_shape: tuple[int, int, int],
    num_classes: int | None,
    block_out_channels: tuple[int, ...],
    layers_per_block: int = 1,
    attention_head_dim: int = 8,
    norm_num_groups: int = 8,
) -> UNet2DModel:
    """A fresh network for `train-teacher`, attention at its lowest resolution, with one class id more than
    `num_classes` for the unconditional embedding."""
    depth = len(block_out_channels)
    return UNet2DModel(
        sample_size=sample_shape[1] if sample_shape[1] == sample_shape[2] else sample_shape[1:],
        in_channels=sample_shape[0],
        out_channels=sample_shape[0],
        block_out_channels=block_out_channels,
        layers_per_block=layers_per_block,
        down_block_types=("DownBlock2D",) * (depth - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (depth - 1),
        attention_head_dim=attention_head_dim,
        norm_num_groups=norm_num_groups,
        num_class_embeds=None if num_classes is None else num_classes + 1,
    )
