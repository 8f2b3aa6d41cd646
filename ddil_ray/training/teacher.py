"""Training a small diffusion teacher, for demos and for data of one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddil_ray.config import TeacherConfig
from ddil_ray.config.teacher import Schedule, TeacherTrainer
from ddil_ray.data import ImageData, check_fills_batch, load_images
from ddil_ray.diffusion.prediction import from_x0
from ddil_ray.diffusion.schedule import add_noise
from ddil_ray.errors import ConfigError, first_line
from ddil_ray.models.model import DiffusionModel
from ddil_ray.models.unet import new_unet, unet_model
from ddil_ray.training.fitting import OnRecord, fit

__all__ = ["denoising_loss", "new_teacher", "scheduler_config", "teacher_data", "train_teacher"]


def teacher_data(config: TeacherConfig) -> ImageData:
    """The images to train on.

    Raises:
        DataError: unreadable, or fewer than a batch.
    """
    data = load_images(**config.data.model_dump(exclude={"prompt_cache_mib"}))
    check_fills_batch(data, config.trainer.batch_size)
    return data


def new_teacher(config: TeacherConfig, data: ImageData) -> DiffusionModel:
    """An untrained network of `config.model` for `data`, with the config's schedule; weights from the seed.

    Raises:
        ConfigError: a network that cannot be built, or that does not fit the images.
    """
    channels, height, width = data.images.shape[1:]
    depth = len(config.model.block_out_channels)
    if height % 2 ** (depth - 1) or width % 2 ** (depth - 1):
        raise ConfigError(
            f"`model.block_out_channels` must halve the images {depth - 1} times, but {data.name} has {height} x "
            f"{width} pixels. Use fewer levels, or set `data.image_size` for files of images."
        )
    torch.manual_seed(config.seed)
    try:
        unet = new_unet(
            sample_shape=(channels, height, width), num_classes=data.num_classes, **config.model.model_dump()
        )
    except Exception as error:  # of diffusers and torch, which run out of memory too
        raise ConfigError(
            f"`model` must describe a UNet2DModel, but diffusers refuses it: {first_line(error)}. Change its channels, "
            "or `norm_num_groups`, which divides them."
        ) from error
    return unet_model(unet, scheduler_config(config.schedule))


def scheduler_config(schedule: Schedule) -> dict[str, Any]:
    """The config of diffusers' DDIMScheduler for `schedule`."""
    return {
        "_class_name": "DDIMScheduler",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "timestep_spacing": "trailing",
        "steps_offset": 1,  # trailing has none; pipelines of diffusers warn of another number
        "clip_sample": False,
        **schedule.model_dump(),
    }


def train_teacher(
    model: DiffusionModel,
    data: ImageData,
    settings: TeacherTrainer,
    *,
    seed: int = 0,
    on_record: OnRecord = lambda record: None,
) -> DiffusionModel:
    """Fit the network's own prediction by mean squared error at uniform t; returns the averaged model.

    A share `label_dropout` of rows is trained on the unconditional class, so that the teacher can be guided.

    Source: Ho et al. 2020, arXiv:2006.11239, eq. 14; Ho and Salimans 2022, arXiv:2207.12598, algorithm 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        chosen = torch.randint(len(data), (settings.batch_size,), generator=generator)
        cond = data.labels[chosen]
        if model.null_cond is not None:
            dropped = torch.rand(len(cond), generator=generator) < settings.label_dropout
            cond = torch.where(dropped, model.null_cond, cond)
        return denoising_loss(model, data.images[chosen], cond, generator)

    return model.with_network(fit(model.network, loss, settings, on_record))


def denoising_loss(model: DiffusionModel, x_0: Tensor, cond: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the network's own prediction on `x_0` (B, C, H, W), noised to uniform t."""
    t = torch.rand(len(x_0), generator=generator, dtype=torch.float64).clamp(min=model.schedule.earliest)
    x_t = add_noise(x_0, torch.randn(x_0.shape, generator=generator), t, model.schedule)
    wanted = from_x0(x_0, x_t, t, prediction=model.prediction, schedule=model.schedule)
    output = model.network(x_t, model.schedule.network_time(t), cond, torch.zeros(len(x_0)))
    loss: Tensor = (output - wanted).square().mean()
    return loss
