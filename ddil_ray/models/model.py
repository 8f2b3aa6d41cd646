"""A diffusion model as distillation sees it: a network with its parameterisation, schedule and conditions."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ddil_ray.diffusion.denoiser import Denoiser, Guided, NetworkDenoiser, Thresholded
from ddil_ray.diffusion.prediction import Prediction
from ddil_ray.diffusion.schedule import NoiseSchedule
from ddil_ray.diffusion.threshold import NoThreshold, Threshold

__all__ = ["DiffusionModel"]


@dataclass
class DiffusionModel:
    """A network of any family, ready to be a teacher or a student."""

    network: nn.Module
    """`network(x_t (B, C, H, W), network_time (B,), cond (B,), w (B,))` gives a raw prediction shaped as x_t."""
    prediction: Prediction
    schedule: NoiseSchedule
    sample_shape: tuple[int, ...]
    """(C, H, W) of one sample."""
    num_conditions: int | None = None
    """Number of condition ids, the unconditional one included; None for an unconditional model."""
    null_cond: int | None = None
    """Id of the unconditional embedding; None where there is none, and then guidance is impossible."""
    bottleneck: str | None = None
    """Name of the network's submodule with its most condensed features (which a discriminator reads), if known."""
    family: str = "module"
    scheduler_config: dict[str, Any] = field(default_factory=dict)
    """The diffusers scheduler config that `schedule` was read from; empty for models from a factory."""

    def with_network(self, network: nn.Module) -> DiffusionModel:
        """The same model around another network."""
        return replace(self, network=network)

    def copy(self) -> DiffusionModel:
        """The same model with weights of its own."""
        return self.with_network(copy.deepcopy(self.network))

    def denoiser(self, *, autocast: torch.dtype | None = None) -> NetworkDenoiser:
        """The network as x_0 estimator, neither guided nor thresholded."""
        return NetworkDenoiser(self.network, self.prediction, self.schedule, autocast)

    def expert(
        self,
        *,
        guided: bool,
        threshold: Threshold | None = None,
        autocast: torch.dtype | None = None,
    ) -> Denoiser:
        """The network as a teacher: guided where the condition's w is not 0, then thresholded."""
        denoiser: Denoiser = self.denoiser(autocast=autocast)
        if guided and self.null_cond is not None:
            denoiser = Guided(denoiser, self.null_cond)
        if threshold is None or isinstance(threshold, NoThreshold):
            return denoiser
        return Thresholded(denoiser, threshold)
