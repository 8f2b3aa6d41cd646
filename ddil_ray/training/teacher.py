"""Training a small diffusion teacher, for demos and for data of one's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddil_ray.data import ImageData
from ddil_ray.diffusion.prediction import from_x0
from ddil_ray.diffusion.schedule import add_noise
from ddil_ray.models.model import DiffusionModel

__all__ = ["train_teacher"]


def train_teacher(
    model: DiffusionModel,
    data: ImageData,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    weight_decay: float = 0.0,
    ema_decay: float = 0.998,
    label_dropout: float = 0.1,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> DiffusionModel:
    """Fit the network's own prediction by mean squared error at uniform t; returns the averaged model.

    A share `label_dropout` of rows is trained on the unconditional class, so that the teacher can be guided. One-cycle
    learning rate.

    Source: Ho et al. 2020, arXiv:2006.11239, eq. 14; Ho and Salimans 2022, arXiv:2207.12598, algorithm 1.
    """
    generator = torch.Generator().manual_seed(seed)
    network = model.network.train()
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        rows = torch.randint(len(data), (batch_size,), generator=generator)
        x_0, cond = data.images[rows], data.labels[rows]
        if model.null_cond is not None:
            dropped = torch.rand(batch_size, generator=generator) < label_dropout
            cond = torch.where(dropped, model.null_cond, cond)
        t = torch.rand(batch_size, generator=generator, dtype=torch.float64).clamp(min=1e-3)
        x_t = add_noise(x_0, torch.randn(x_0.shape, generator=generator), t, model.schedule)
        wanted = from_x0(x_0, x_t, t, prediction=model.prediction, schedule=model.schedule)
        output = network(x_t, model.schedule.network_time(t), cond, torch.zeros(batch_size))
        loss = (output - wanted).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        on_step(step + 1, float(loss.detach()))
    trained = model.with_network(average.module)
    trained.network.eval().requires_grad_(False)
    return trained
