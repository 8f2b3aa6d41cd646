"""The loop that small teachers, and their autoencoders, are fitted by."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddil_ray.config.teacher import Fit
from ddil_ray.errors import RunFailedError
from ddil_ray.training.optimizer import OptimizerSettings

__all__ = ["OnRecord", "fit"]

_RECORD_EVERY = 50

OnRecord = Callable[[dict[str, float]], None]
"""Gets metrics now and then."""


def fit(network: nn.Module, loss: Callable[[], Tensor], settings: Fit, on_record: OnRecord) -> nn.Module:
    """Train `network` on what `loss` returns at each call, a scalar; gives the averaged network, frozen.

    The learning rate warms up over a twentieth of the steps and decays by a cosine.

    Raises:
        RunFailedError: the loss is not finite.
    """
    network.train().requires_grad_(True)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    factor = OptimizerSettings(steps=settings.steps, warmup_steps=settings.steps // 20, decay="cosine").factor
    schedule = LambdaLR(optimizer, factor)
    losses, started = [], time.perf_counter()
    for step in range(1, settings.steps + 1):
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        losses.append(float(value.detach()))
        if not math.isfinite(losses[-1]):
            raise RunFailedError(f"The loss must stay finite, but is {losses[-1]} at step {step}. Lower `lr`.")
        if step % _RECORD_EVERY == 0 or step == settings.steps:
            seconds = time.perf_counter() - started
            on_record(
                {
                    "step": step,
                    "total_steps": settings.steps,
                    "loss": sum(losses) / len(losses),
                    "throughput/samples_per_s": len(losses) * settings.batch_size / seconds,
                }
            )
            losses, started = [], time.perf_counter()
    fitted: nn.Module = average.module
    return fitted.eval().requires_grad_(False)
