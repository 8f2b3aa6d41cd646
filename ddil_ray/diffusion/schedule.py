"""Noise schedules: the perturbation kernel x_t = alpha(t) x_0 + sigma(t) eps for t in [0, 1].

One clock serves every family: t = 0 is data, t = 1 is noise, and the grid of N steps is n / N. A discrete schedule of
T timesteps has its timestep i at t = (i + 1) / T, so that n / N is the "trailing" spacing of diffusers. To add a
schedule: write the three methods of `NoiseSchedule`, and a row in `_FROM_SCHEDULER_CLASS` if diffusers has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ddil_ray.errors import ConfigError, ShapeError

__all__ = [
    "CosineVP",
    "DiscreteVP",
    "NoiseSchedule",
    "RectifiedFlow",
    "add_noise",
    "expand_to",
    "levels",
    "rho",
    "schedule_from_diffusers",
    "snr",
]


class NoiseSchedule(Protocol):
    """The two coefficients of the kernel, and what the network is told of the time."""

    @property
    def earliest(self) -> float:
        """Least t > 0 that a network is trained at; sigma is positive there."""

    def alpha(self, t: Tensor) -> Tensor:
        """Signal coefficient at times `t` (B,), float64."""

    def sigma(self, t: Tensor) -> Tensor:
        """Noise coefficient at times `t` (B,), float64."""

    def network_time(self, t: Tensor) -> Tensor:
        """What a network of this schedule is fed for times `t` (B,), float32, 0 to about 1000."""


class DiscreteVP:
    """Variance preserving over T timesteps: alpha^2 = alphas_cumprod[i], sigma^2 = 1 - alpha^2.

    Timestep i lies at t = (i + 1) / T; every t is rounded to the nearest timestep, and t = 0 is the clean end whose
    alpha^2 is `final_alpha_cumprod` (1, or alphas_cumprod[0] where a scheduler sets `set_alpha_to_one=False`).

    Source: Ho et al. 2020, arXiv:2006.11239, eq. 4.
    """

    def __init__(self, alphas_cumprod: Tensor, *, final_alpha_cumprod: float = 1.0) -> None:
        table = torch.cat([torch.tensor([final_alpha_cumprod]).double(), alphas_cumprod.double()])
        self._alpha = table.sqrt()
        self._sigma = (1 - table).clamp(min=0).sqrt()
        self.num_timesteps = len(alphas_cumprod)

    @property
    def earliest(self) -> float:
        """The first timestep."""
        return 1 / self.num_timesteps

    def _index(self, t: Tensor) -> Tensor:
        return (t.double() * self.num_timesteps).round().long().clamp(0, self.num_timesteps)

    def alpha(self, t: Tensor) -> Tensor:
        """See `NoiseSchedule.alpha`."""
        return self._alpha.to(t.device)[self._index(t)]

    def sigma(self, t: Tensor) -> Tensor:
        """See `NoiseSchedule.sigma`."""
        return self._sigma.to(t.device)[self._index(t)]

    def network_time(self, t: Tensor) -> Tensor:
        """Timestep index, clamped to 0 at the clean end as diffusers' LCM training does."""
        return (self._index(t) - 1).clamp(min=0).float()


class CosineVP:
    """Continuous cosine schedule: alpha = cos(pi t / 2), sigma = sin(pi t / 2).

    Source: Salimans and Ho 2022, arXiv:2202.00512, section 2 (Nichol and Dhariwal's schedule without its offset).
    """

    earliest = 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        """See `NoiseSchedule.alpha`; exactly 0 at t = 1."""
        return torch.where(t >= 1, 0.0, torch.cos(t.double() * (math.pi / 2)))

    def sigma(self, t: Tensor) -> Tensor:
        """See `NoiseSchedule.sigma`."""
        return torch.sin(t.double() * (math.pi / 2))

    def network_time(self, t: Tensor) -> Tensor:
        """1000 t, the range that diffusers' sinusoidal embedding is made for."""
        return (t * 1000).float()


@dataclass(frozen=True)
class RectifiedFlow:
    """Straight path alpha = 1 - sigma, with sigma = m t / (1 - t + m t) for a shift m > 0.

    Both coefficients are exact at the ends: t = 1 is noise alone, t = 0 the clean sample. t is the time before the
    shift, so that a law uniform in t, and a grid n / N, are the shifted ones in sigma.

    Source: Esser et al. 2024, arXiv:2403.03206, section 3.1 and eq. 23 (shift).
    """

    shift: float = 1.0
    earliest: ClassVar[float] = 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        """See `NoiseSchedule.alpha`."""
        t = t.double()
        return (1 - t) / (1 - t + self.shift * t)

    def sigma(self, t: Tensor) -> Tensor:
        """See `NoiseSchedule.sigma`."""
        t = t.double()
        return self.shift * t / (1 - t + self.shift * t)

    def network_time(self, t: Tensor) -> Tensor:
        """1000 sigma, as diffusers' flow-matching schedulers pass it."""
        return (self.sigma(t) * 1000).float()


def expand_to(coefficient: Tensor, x: Tensor) -> Tensor:
    """Reshape a (B,) coefficient so that it broadcasts over `x` (B, ...)."""
    if coefficient.ndim != 1 or len(coefficient) != len(x):
        raise ShapeError(
            f"`t` must have one time per row of x, shape ({len(x)},), but is {tuple(coefficient.shape)} instead."
        )
    return coefficient.reshape(-1, *([1] * (x.ndim - 1)))


def levels(schedule: NoiseSchedule, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) at `t` (B,), float64, shaped to broadcast over `x` (B, ...)."""
    return expand_to(schedule.alpha(t), x), expand_to(schedule.sigma(t), x)


def add_noise(x_0: Tensor, eps: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Forward diffusion x_t = alpha x_0 + sigma eps, computed in float64, returned in the dtype of `x_0`."""
    alpha, sigma = levels(schedule, t, x_0)
    # Each product in place of its factor: fresh memory for every intermediate takes five times as long on a CPU.
    signal, noise = (part.to(torch.float64, copy=True) for part in (x_0, eps))
    return signal.mul_(alpha).add_(noise.mul_(sigma)).to(x_0.dtype)


def rho(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Signal-to-noise amplitude alpha / sigma at `t` (B,), float64; +inf where sigma is 0."""
    return schedule.alpha(t) / schedule.sigma(t)


def snr(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Signal-to-noise ratio alpha^2 / sigma^2 at `t` (B,), float64."""
    return rho(schedule, t) ** 2


def _betas_linear(config: Mapping[str, Any], n: int) -> Tensor:
    return torch.linspace(config["beta_start"], config["beta_end"], n, dtype=torch.float32)


def _betas_scaled_linear(config: Mapping[str, Any], n: int) -> Tensor:
    ends = config["beta_start"] ** 0.5, config["beta_end"] ** 0.5
    return torch.linspace(*ends, n, dtype=torch.float32) ** 2


def _betas_cosine(config: Mapping[str, Any], n: int) -> Tensor:
    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), 0.999) for i in range(n)]
    return torch.tensor(betas, dtype=torch.float32)


_BETAS: dict[str, Callable[[Mapping[str, Any], int], Tensor]] = {
    "linear": _betas_linear,
    "scaled_linear": _betas_scaled_linear,
    "squaredcos_cap_v2": _betas_cosine,
}


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alphas_cumprod) so that the last is 0 (Lin et al. 2023, arXiv:2305.08891, alg. 1)."""
    root = (1 - betas).cumprod(0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    alpha_bar = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def _discrete_vp(config: Mapping[str, Any], image_seq_len: int | None) -> NoiseSchedule:
    if config.get("sigma_max") is not None and config.get("trained_betas") is None and "beta_start" not in config:
        raise ConfigError(
            f"`scheduler` of the teacher must be one of betas or of flow matching, but is {config.get('_class_name')} "
            "instead, whose noise schedule is not known here. Use another teacher, or save the pipeline with the "
            "scheduler that it was trained with."
        )
    config = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", **config}
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
    else:
        kind = config["beta_schedule"]
        if kind not in _BETAS:
            raise ConfigError(
                f"`beta_schedule` of the teacher's scheduler must be one of {', '.join(_BETAS)}, "
                f"but is {kind!r} instead."
            )
        betas = _BETAS[kind](config, config.get("num_train_timesteps", 1000))
    if config.get("rescale_betas_zero_snr", False):
        betas = _zero_terminal_snr(betas)
    alphas_cumprod = (1 - betas).cumprod(0)
    final = 1.0 if config.get("set_alpha_to_one", True) else float(alphas_cumprod[0])
    return DiscreteVP(alphas_cumprod, final_alpha_cumprod=final)


def _flow(config: Mapping[str, Any], image_seq_len: int | None) -> NoiseSchedule:
    if not config.get("use_dynamic_shifting", False):
        return RectifiedFlow(shift=float(config.get("shift", 1.0)))
    if image_seq_len is None:
        raise ConfigError(
            "`use_dynamic_shifting` of the teacher's scheduler must be false for a teacher that makes no tokens of its "
            "samples: the shift depends on their number. Set a fixed `shift` in scheduler_config.json."
        )
    mu = _dynamic_mu(config, image_seq_len)
    return RectifiedFlow(shift=mu if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu))


def _dynamic_mu(config: Mapping[str, Any], image_seq_len: int) -> float:
    """Linear in the number of tokens, through two given points; the defaults are those of diffusers."""
    settings = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15, **config}
    base, most = settings["base_image_seq_len"], settings["max_image_seq_len"]
    slope = (settings["max_shift"] - settings["base_shift"]) / (most - base)
    return float(settings["base_shift"] + slope * (image_seq_len - base))


_FROM_SCHEDULER_CLASS: dict[str, Callable[[Mapping[str, Any], int | None], NoiseSchedule]] = {
    "FlowMatchEulerDiscreteScheduler": _flow,
    "FlowMatchLCMScheduler": _flow,
}


def schedule_from_diffusers(config: Mapping[str, Any], image_seq_len: int | None = None) -> NoiseSchedule:
    """The schedule behind a diffusers scheduler config (the content of scheduler_config.json).

    Flow-matching classes give `RectifiedFlow`; every other class with betas gives `DiscreteVP`.

    Args:
        config: of the scheduler.
        image_seq_len: tokens that the network makes of one sample. A dynamic shift (`use_dynamic_shifting`) is constant
            for samples of one size: m = exp(mu), or mu where `time_shift_type` is linear.

    Raises:
        ConfigError: the config's betas are of a kind not known here, or a dynamic shift without `image_seq_len`.
    """
    return _FROM_SCHEDULER_CLASS.get(config.get("_class_name", ""), _discrete_vp)(config, image_seq_len)
