"""Denoisers D(x_t, t, cond, w) -> x_0, and the wrappers that turn one into another.

Guidance has one convention here, w: D = D_cond + w (D_cond - D_uncond), so w = 0 is no guidance. Imagen's and
diffusers' `guidance_scale` g is w + 1 (`w_from_guidance_scale`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ddil_ray.diffusion.prediction import Prediction, from_x0, to_x0
from ddil_ray.diffusion.schedule import NoiseSchedule, expand_to
from ddil_ray.diffusion.threshold import Threshold

__all__ = [
    "BoundaryConditioned",
    "Denoiser",
    "Guided",
    "NetworkDenoiser",
    "Rescale",
    "Thresholded",
    "guidance_scale_from_w",
    "w_from_guidance_scale",
]


class Denoiser(Protocol):
    """An estimate of the clean sample behind a state."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        """x_0 estimate (B, ...) for states `x_t` (B, ...), times `t` (B,), conditions (B,) and guidance `w` (B,)."""


@dataclass(frozen=True)
class NetworkDenoiser:
    """A network with its parameterisation and schedule: x_0 = to_x0(network(x_t, t)).

    `network(x_t, network_time, cond, w)` gives a raw prediction shaped as x_t. `autocast` runs it, and only it, in
    that dtype; conversions stay in float64.
    """

    network: nn.Module
    prediction: Prediction
    schedule: NoiseSchedule
    autocast: torch.dtype | None = None

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        """See `Denoiser`."""
        time = self.schedule.network_time(t).to(x_t.device)
        with torch.autocast(x_t.device.type, self.autocast, enabled=self.autocast is not None):
            output = self.network(x_t, time, cond, w)
        return to_x0(output, x_t, t, prediction=self.prediction, schedule=self.schedule)


@dataclass(frozen=True)
class Rescale:
    """Brings a guided estimate towards the spread of the conditional one, by the share `phi` in [0, 1].

    As diffusers' pipelines do, it is the network's own prediction that is scaled: by
    phi std(conditional) / std(guided) + 1 - phi, standard deviations per sample.

    Source: Lin et al. 2023, arXiv:2305.08891, eq. 14 to 16.
    """

    phi: float
    prediction: Prediction
    schedule: NoiseSchedule

    def __call__(self, guided: Tensor, conditional: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x_0 (B, ...) from the x_0 estimates `guided` and `conditional` (B, ...) at `x_t`."""
        x = x_t.double()
        kind: Any = {"prediction": self.prediction, "schedule": self.schedule}
        raw, aim = (from_x0(x_0.double(), x, t, **kind) for x_0 in (guided, conditional))
        spread, aimed = (part.flatten(1).std(1) for part in (raw, aim))
        scale = self.phi * aimed / spread + 1 - self.phi
        return to_x0(raw * expand_to(scale, raw), x, t, **kind).to(x_t.dtype)


@dataclass(frozen=True)
class Guided:
    """Classifier-free guidance in x_0: D_cond + w (D_cond - D_uncond). One pass where every w is 0, else two in one.

    Source: Ho and Salimans 2022, arXiv:2207.12598, eq. 6, in w.
    """

    denoiser: Denoiser
    null_cond: int
    rescale: Rescale | None = None

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        """See `Denoiser`."""
        if not bool(w.any()):
            return self.denoiser(x_t, t, cond, w)
        both = torch.cat([cond, torch.full_like(cond, self.null_cond)])
        x_0, x_0_null = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both, torch.cat([w, w])).chunk(2)
        guided = x_0 + expand_to(w, x_0).to(x_0.dtype) * (x_0 - x_0_null)
        return guided if self.rescale is None else self.rescale(guided, x_0, x_t, t)


@dataclass(frozen=True)
class Thresholded:
    """A denoiser whose estimates are brought into the data's range; goes outside `Guided`, which causes the excess."""

    denoiser: Denoiser
    threshold: Threshold

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        """See `Denoiser`."""
        return self.threshold(self.denoiser(x_t, t, cond, w))


@dataclass(frozen=True)
class BoundaryConditioned:
    """The consistency parameterisation f(x, t) = c_skip x + c_out D(x, t), with f(x, 0) = x.

    c_skip = d^2 / (u^2 + d^2), c_out = u / sqrt(u^2 + d^2), u = timestep_scaling * network time, d = sigma_data.

    Source: Luo et al. 2023, arXiv:2310.04378, eq. 9; the values are those of diffusers' LCMScheduler.
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    sigma_data: float = 0.5
    timestep_scaling: float = 10.0

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out) at `t` (B,), float64."""
        u = self.timestep_scaling * self.schedule.network_time(t).double()
        norm = u**2 + self.sigma_data**2
        return self.sigma_data**2 / norm, u / norm.sqrt()

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        """See `Denoiser`."""
        c_skip, c_out = (expand_to(c, x_t).to(x_t) for c in self.coefficients(t))
        return c_skip * x_t + c_out * self.denoiser(x_t, t, cond, w)


def w_from_guidance_scale(guidance_scale: float) -> float:
    """w of a diffusers / Imagen `guidance_scale` g: w = g - 1."""
    return guidance_scale - 1


def guidance_scale_from_w(w: float) -> float:
    """diffusers / Imagen `guidance_scale` of a w: g = w + 1."""
    return w + 1
