"""Large models and clusters that are not there, to measure orchestration with.

A simulated model has samples of the real shape, so that real bytes move through Ray, and sleeps for the time that an
accelerator would take. It is given as a factory, `teacher.model=ddil_ray.simulation:sd15` with
`data.source=ddil_ray.simulation:sd15_latents`; students, targets and critics made of it sleep likewise. To add one: its
figures in `MODELS`, and two functions.

| teacher.model | data.source | samples |
| --- | --- | --- |
| ddil_ray.simulation:sd15 | ddil_ray.simulation:sd15_latents | 4 x 64 x 64 |
| ddil_ray.simulation:ssd1b | ddil_ray.simulation:sdxl_latents | 4 x 128 x 128 |
| ddil_ray.simulation:sdxl | ddil_ray.simulation:sdxl_latents | 4 x 128 x 128 |

`ddil_ray.simulation.cluster` gives a cluster of many nodes on one machine. The environment variable that `World` reads
sets how fast the simulated accelerator is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ddil_ray.data import ImageData
from ddil_ray.models.model import DiffusionModel
from ddil_ray.simulation.device import World
from ddil_ray.simulation.network import PassTimes, simulated_model

__all__ = ["MODELS", "Figures", "sd15", "sd15_latents", "sdxl", "sdxl_latents", "ssd1b"]

_TRAINING, _INFERENCE = 87e12, 125e12
"""FLOP/s that an A100 is taken to reach: 28 % and 40 % of its dense half-precision peak of 312."""
_ROWS = 256


@dataclass(frozen=True)
class Figures:
    """Of one network, counted by `torch.utils.flop_counter` at batch 1."""

    shape: tuple[int, int, int]
    forward_tflop: float
    both_tflop: float
    """Forward and backward."""

    @property
    def times(self) -> PassTimes:
        """Seconds per row on the accelerator."""
        forward, backward = self.forward_tflop * 1e12, (self.both_tflop - self.forward_tflop) * 1e12
        return PassTimes(forward / _INFERENCE, forward / _TRAINING, backward / _TRAINING)


MODELS = {
    "sd15": Figures((4, 64, 64), 0.80, 2.41),
    "ssd1b": Figures((4, 128, 128), 4.21, 12.6),
    "sdxl": Figures((4, 128, 128), 6.76, 20.2),
}


def sd15() -> DiffusionModel:
    """Stable Diffusion 1.5 at 512 x 512 pixels."""
    return _model("sd15")


def ssd1b() -> DiffusionModel:
    """SSD-1B at 1024 x 1024 pixels."""
    return _model("ssd1b")


def sdxl() -> DiffusionModel:
    """Stable Diffusion XL at 1024 x 1024 pixels."""
    return _model("sdxl")


def sd15_latents() -> ImageData:
    """Noise in the shape of its latents."""
    return _latents("sd15")


def sdxl_latents() -> ImageData:
    """Noise in the shape of its latents, which are SSD-1B's too."""
    return _latents("sdxl")


def _model(name: str) -> DiffusionModel:
    figures, world = MODELS[name], World.here()
    return simulated_model(figures.shape, figures.times.scaled(world.scale), weights=world.weights)


def _latents(name: str) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_ROWS, *MODELS[name].shape, generator=generator)
    return ImageData(images, torch.zeros(_ROWS, dtype=torch.int64), f"simulated {name} latents")
