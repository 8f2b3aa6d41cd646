"""Steps from a time t to an earlier time s, and the trajectory-averaged x_0 that expert labels are made of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddil_ray.diffusion.denoiser import Denoiser
from ddil_ray.diffusion.schedule import NoiseSchedule, add_noise, expand_to, levels, rho

__all__ = [
    "TRANSITIONS",
    "Generators",
    "Transition",
    "ddim_step",
    "fresh_noise",
    "mean_x0",
    "renoise_step",
    "sample",
    "times_between",
]

Generators = torch.Generator | Sequence[torch.Generator] | None
"""Of the noise of B rows: one for all of them, one for each, or torch's own."""

Transition = Callable[[Tensor, Tensor, Tensor, Tensor, NoiseSchedule, Generators], Tensor]
"""(x_t, x_0, t, s, schedule, generator) -> x_s: how a sampler uses an x_0 estimate to go from t to s."""


def ddim_step(x_t: Tensor, x_0: Tensor, t: Tensor, s: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Deterministic DDIM step from `t` to `s`: x_s = alpha_s x_0 + sigma_s eps(x_t, x_0).

    Written as (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) x_0, which needs no division by alpha and
    is exact at sigma_s = 0. `x_0` is not clipped here (see `Thresholded`).

    Args:
        x_t: (B, ...) state at `t`.
        x_0: (B, ...) estimate of the clean sample.
        t: (B,) times, sigma(t) > 0.
        s: (B,) times, s <= t.
        schedule: the kernel both states belong to.

    Returns:
        (B, ...) state at `s`, in the dtype of `x_t`.

    Source: Song et al. 2021, arXiv:2010.02502, eq. 12 with eta = 0.
    """
    alpha_t, sigma_t = levels(schedule, t, x_t)
    alpha_s, sigma_s = levels(schedule, s, x_t)
    ratio = sigma_s / sigma_t
    return (ratio * x_t.double() + (alpha_s - alpha_t * ratio) * x_0.double()).to(x_t.dtype)


def fresh_noise(shape: Sequence[int], generator: Generators, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise (B, ...), on the CPU: the same seed gives the same noise for every device.

    Of several generators each gives its own row, which is what it gives alone.
    """
    if isinstance(generator, Sequence):
        return torch.stack([torch.randn(*shape[1:], generator=own, dtype=dtype) for own in generator])
    return torch.randn(*shape, generator=generator, dtype=dtype)


def renoise_step(x_0: Tensor, s: Tensor, schedule: NoiseSchedule, generator: Generators) -> Tensor:
    """Multistep consistency step: x_s = alpha_s x_0 + sigma_s z with fresh z; x_0 itself where sigma_s = 0.

    Source: Luo et al. 2023, arXiv:2310.04378, algorithm 3.
    """
    z = fresh_noise(x_0.shape, generator, x_0.dtype).to(x_0.device)
    return torch.where(expand_to(s, x_0) == 0, x_0, add_noise(x_0, z, s, schedule))


TRANSITIONS: dict[str, Transition] = {
    "ddim": lambda x_t, x_0, t, s, schedule, generator: ddim_step(x_t, x_0, t, s, schedule),
    "renoise": lambda x_t, x_0, t, s, schedule, generator: renoise_step(x_0, s, schedule, generator),
}
"""The two ways a few-step sampler moves on, by name."""


def times_between(t: Tensor, s: Tensor, substeps: int) -> list[Tensor]:
    """`substeps + 1` times (B,) evenly spaced from `t` to `s`, both included."""
    return [t + (s - t) * (j / substeps) for j in range(substeps)] + [s]


def mean_x0(
    denoiser: Denoiser,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    *,
    cond: Tensor,
    w: Tensor,
    schedule: NoiseSchedule,
    substeps: int,
) -> Tensor:
    """The x_0 for which ONE DDIM step from `t` to `s` lands where `substeps` DDIM steps of `denoiser` land.

    With rho = alpha / sigma and the estimates x_1 .. x_n along t = t_0 > t_1 > ... > t_n = s,
    x_target = sum_j w_j x_j, w_j = (rho(t_j) - rho(t_{j-1})) / (rho(t_n) - rho(t_0)): the weights are non-negative and
    sum to 1 (telescoping of x_u / sigma_u = x_t / sigma_t + (rho_u - rho_t) x_0). Where sigma(s) = 0 the last estimate
    takes all the weight. Progressive distillation's target, without the subtraction that costs its usual form 2 to 3
    digits; a convex combination, so thresholded estimates give a thresholded target.

    Returns:
        (B, ...) in the dtype of `x_t`.

    Source: equal to Salimans and Ho 2022, arXiv:2202.00512, appendix G; the averaged form is this project's.
    """
    times = times_between(t, s, substeps)
    x, total, weights = x_t, torch.zeros_like(x_t, dtype=torch.float64), []
    whole = rho(schedule, s) - rho(schedule, t)
    for now, following in itertools.pairwise(times):
        x_0 = denoiser(x, now, cond, w)
        weight = (rho(schedule, following) - rho(schedule, now)) / whole
        weight = torch.where(whole.isinf(), (following == s).double(), weight)
        weights.append(weight)
        total = total + expand_to(weight, x_t) * x_0.double()
        if following is not s:
            x = ddim_step(x, x_0, now, following, schedule)
    return total.to(x_t.dtype)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    noise: Tensor,
    *,
    times: Tensor,
    cond: Tensor,
    w: Tensor,
    schedule: NoiseSchedule,
    transition: str = "ddim",
    generator: Generators = None,
) -> Tensor:
    """Run `denoiser` from `noise` (B, ...) down `times` (K + 1,), descending from 1 to 0.

    Returns:
        (B, ...) samples after K network evaluations.
    """
    move, x = TRANSITIONS[transition], noise
    for now, following in zip(times.tolist(), times.tolist()[1:], strict=False):
        t, s = (torch.full((len(x),), u, dtype=torch.float64, device=x.device) for u in (now, following))
        x = move(x, denoiser(x, t, cond, w), t, s, schedule, generator)
    return x
