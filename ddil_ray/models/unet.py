"""Family `unet`: pixel-space `UNet2DModel` pipelines of diffusers, class-conditional or unconditional."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from ddil_ray.diffusion.prediction import Prediction
from ddil_ray.diffusion.schedule import schedule_from_diffusers
from ddil_ray.errors import ConfigError
from ddil_ray.models.model import DiffusionModel

__all__ = ["UNetNetwork", "load_unet", "new_unet", "unet_model", "with_guidance_embedding"]

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
        half = _GUIDANCE_CHANNELS // 2
        frequencies = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=w.device))
        angles = 1000 * w[:, None].float() * frequencies
        projected: Tensor = self.projection(torch.cat([angles.sin(), angles.cos()], dim=1))
        return projected

    def forward(self, sample: Tensor) -> Tensor:
        """The embedding of `sample` under the guidance last set in `w`."""
        assert self.w is not None
        embedded: Tensor = self.inner(sample + self.offset(self.w).to(sample.dtype))
        return embedded


class UNetNetwork(nn.Module):
    """A `UNet2DModel` with this library's network signature, optionally conditioned on guidance.

    Args:
        unet: the diffusers network; used, not copied.
        guidance_embedding: let the time embedding read w.
    """

    def __init__(self, unet: UNet2DModel, *, guidance_embedding: bool = False) -> None:
        super().__init__()
        self.unet = unet
        self.conditional = unet.config.num_class_embeds is not None
        if guidance_embedding:
            embedding = unet.time_embedding
            unet.time_embedding = _GuidedTimeEmbedding(embedding, embedding.linear_1.in_features)

    def forward(self, x_t: Tensor, time: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        """Raw prediction (B, C, H, W)."""
        if isinstance(self.unet.time_embedding, _GuidedTimeEmbedding):
            self.unet.time_embedding.w = w
        labels = cond if self.conditional else None
        prediction: Tensor = self.unet(x_t, time, class_labels=labels, return_dict=False)[0]
        return prediction

    @torch.no_grad()
    def plain_unet(self, w: float) -> UNet2DModel:
        """A plain `UNet2DModel` that computes what this network computes at guidance `w`, exactly.

        The guidance offset enters before a linear layer, so at one w it is a change of that layer's bias.
        """
        plain = UNet2DModel.from_config(self.unet.config)
        embedding = self.unet.time_embedding
        state = self.unet.state_dict()
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
        ConfigError: epsilon prediction over a schedule with no signal at t = 1, where x_0 is not determined.
    """
    size = unet.config.sample_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    schedule = schedule_from_diffusers(scheduler_config)
    prediction = Prediction(scheduler_config.get("prediction_type", "epsilon"))
    if prediction is Prediction.EPSILON and float(schedule.alpha(torch.ones(1))) < 1e-6:
        raise ConfigError(
            "`prediction_type` of a teacher with zero terminal SNR must be `v_prediction` or `sample`, but is "
            "`epsilon` instead: at t = 1 the noise says nothing of the image. Use another teacher, or one trained "
            "without `rescale_betas_zero_snr`."
        )
    conditions = unet.config.num_class_embeds
    return DiffusionModel(
        network=UNetNetwork(unet, guidance_embedding=guidance_embedding),
        prediction=prediction,
        schedule=schedule,
        sample_shape=(unet.config.in_channels, height, width),
        num_conditions=conditions,
        null_cond=None if conditions is None else conditions - 1,
        bottleneck="unet.mid_block",
        family="unet",
        scheduler_config=dict(scheduler_config),
    )


def with_guidance_embedding(model: DiffusionModel) -> DiffusionModel:
    """`model` around the same network, which now also reads w and does not yet heed it."""
    assert isinstance(model.network, UNetNetwork)
    return model.with_network(UNetNetwork(model.network.unet, guidance_embedding=True))


def load_unet(folder: Path) -> DiffusionModel:
    """Read a pipeline folder that has `unet/` (UNet2DModel) and `scheduler/`."""
    scheduler = folder / "scheduler" / "scheduler_config.json"
    try:
        config = json.loads(scheduler.read_text())
        unet = UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`teacher.model` must be a readable diffusers pipeline folder, but {folder} failed to load: {error}. "
            "Save the pipeline again with `save_pretrained`."
        ) from error
    return unet_model(unet.eval(), config)


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
