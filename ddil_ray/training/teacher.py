"""Training a small diffusion teacher, for demos and for data of one's own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddil_ray.config import TeacherConfig
from ddil_ray.config.teacher import TeacherTrainer
from ddil_ray.data import ImageData, check_fills_batch, load_images
from ddil_ray.diffusion.prediction import from_x0
from ddil_ray.diffusion.schedule import add_noise
from ddil_ray.errors import ConfigError, RunFailedError
from ddil_ray.models.model import DiffusionModel
from ddil_ray.models.unet import new_unet, unet_model
from ddil_ray.training.optimizer import OptimizerSettings

__all__ = ["new_teacher", "teacher_data", "train_teacher"]

_RECORD_EVERY = 50


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
            f"{width} pixels. Use fewer levels, or set `data.image_size`."
        )
    torch.manual_seed(config.seed)
    try:
        unet = new_unet(
            sample_shape=(channels, height, width), num_classes=data.num_classes, **config.model.model_dump()
        )
    except ValueError as error:
        raise ConfigError(f"`model` must describe a UNet2DModel, but diffusers refuses it: {error}") from error
    scheduler = {
        "_class_name": "DDIMScheduler",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        **config.schedule.model_dump(),
    }
    return unet_model(unet, scheduler)


def train_teacher(
    model: DiffusionModel,
    data: ImageData,
    settings: TeacherTrainer,
    *,
    seed: int = 0,
    on_record: Callable[[dict[str, float]], None] = lambda record: None,
) -> DiffusionModel:
    """Fit the network's own prediction by mean squared error at uniform t; returns the averaged model.

    A share `label_dropout` of rows is trained on the unconditional class, so that the teacher can be guided. The
    learning rate warms up over a twentieth of the steps and decays by a cosine. `on_record` gets metrics now and then.

    Source: Ho et al. 2020, arXiv:2006.11239, eq. 14; Ho and Salimans 2022, arXiv:2207.12598, algorithm 1.
    """
    generator = torch.Generator().manual_seed(seed)
    network, rows_per_step = model.network.train(), settings.batch_size
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    factor = OptimizerSettings(steps=settings.steps, warmup_steps=settings.steps // 20, decay="cosine").factor
    schedule = LambdaLR(optimizer, factor)
    losses, started = [], time.perf_counter()
    for step in range(1, settings.steps + 1):
        loss = _loss(model, data, rows_per_step, settings.label_dropout, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise RunFailedError(f"The loss must stay finite, but is {losses[-1]} at step {step}. Lower `trainer.lr`.")
        if step % _RECORD_EVERY == 0 or step == settings.steps:
            seconds = time.perf_counter() - started
            on_record(
                {
                    "step": step,
                    "total_steps": settings.steps,
                    "loss": sum(losses) / len(losses),
                    "throughput/samples_per_s": len(losses) * rows_per_step / seconds,
                }
            )
            losses, started = [], time.perf_counter()
    trained = model.with_network(average.module)
    trained.network.eval().requires_grad_(False)
    return trained


def _loss(
    model: DiffusionModel, data: ImageData, rows: int, label_dropout: float, generator: torch.Generator
) -> Tensor:
    chosen = torch.randint(len(data), (rows,), generator=generator)
    x_0, cond = data.images[chosen], data.labels[chosen]
    if model.null_cond is not None:
        dropped = torch.rand(rows, generator=generator) < label_dropout
        cond = torch.where(dropped, model.null_cond, cond)
    t = torch.rand(rows, generator=generator, dtype=torch.float64).clamp(min=model.schedule.earliest)
    x_t = add_noise(x_0, torch.randn(x_0.shape, generator=generator), t, model.schedule)
    wanted = from_x0(x_0, x_t, t, prediction=model.prediction, schedule=model.schedule)
    output = model.network(x_t, model.schedule.network_time(t), cond, torch.zeros(rows))
    loss: Tensor = (output - wanted).square().mean()
    return loss
