"""A network that takes the time of a large one and computes next to nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddil_ray.diffusion.prediction import Prediction
from ddil_ray.diffusion.schedule import CosineVP
from ddil_ray.models.model import DiffusionModel
from ddil_ray.simulation.device import spend

__all__ = ["PassTimes", "SimulatedNetwork", "simulated_model"]


@dataclass(frozen=True)
class PassTimes:
    """Seconds of the device per row."""

    inference: float
    """A forward pass that nothing is learnt from."""
    forward: float
    """A forward pass of training."""
    backward: float
    """Its way back."""

    def scaled(self, by: float) -> PassTimes:
        """All of them, times `by`."""
        return PassTimes(self.inference * by, self.forward * by, self.backward * by)


class SimulatedNetwork(nn.Module):
    """Says (1 + weights[0]) x_t, after the time that `times` give.

    Half of it passes before `middle`, so that a discriminator which reads `middle` can leave the rest out.
    """

    def __init__(self, times: PassTimes, *, weights: int) -> None:
        super().__init__()
        self.times = times
        self.weights = nn.Parameter(torch.zeros(weights))
        self.middle = nn.Identity()

    def forward(self, x_t: Tensor, time: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        """Raw prediction shaped as `x_t`."""
        return self._half(self.middle(self._half(x_t, self.weights)), self.weights.detach())

    def _half(self, x: Tensor, weights: Tensor) -> Tensor:
        learns = torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)
        rows, times = len(x) / 2, self.times
        spend(rows * (times.forward if learns else times.inference))
        result: Tensor = _Pass.apply(x, weights, rows * times.backward)  # type: ignore[no-untyped-call]
        return result


class _Pass(torch.autograd.Function):
    """(1 + weights[0]) x, whose way back takes `seconds`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, seconds: float) -> Tensor:
        ctx.save_for_backward(x, weights)
        ctx.seconds = seconds
        return x * (1 + weights[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,), (x, weights) = gradients, ctx.saved_tensors
        spend(ctx.seconds)
        of_weights = None
        if ctx.needs_input_grad[1]:
            of_weights = torch.zeros_like(weights)
            of_weights[0] = (gradient * x).sum()
        return gradient * (1 + weights[0]), of_weights, None


def simulated_model(shape: tuple[int, ...], times: PassTimes, *, weights: int) -> DiffusionModel:
    """A teacher of samples of `shape` that can be guided: conditions are 0, and 1 for none."""
    return DiffusionModel(
        SimulatedNetwork(times, weights=weights),
        Prediction.V,
        CosineVP(),
        shape,
        num_conditions=2,
        null_cond=1,
        bottleneck="middle",
    )
