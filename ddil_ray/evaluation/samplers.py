"""Few-step samplers of teachers, of students in memory and of exported students, all in one form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddil_ray.diffusion.denoiser import BoundaryConditioned, Denoiser, NetworkDenoiser
from ddil_ray.diffusion.schedule import NoiseSchedule
from ddil_ray.diffusion.solver import Generators, sample
from ddil_ray.diffusion.timegrid import consistency_grid, uniform_grid
from ddil_ray.errors import ConfigError
from ddil_ray.models.latents import LatentCodec
from ddil_ray.models.model import DiffusionModel
from ddil_ray.objectives.objective import Objective

__all__ = ["Sampler", "draw", "exported_sampler", "most_steps", "student_samplers", "teacher_sampler"]

_CONSISTENCY = ("LCMScheduler", "FlowMatchLCMScheduler")
_ROWS, _LATENT_ROWS = 256, 8
"""Of a network pass, for pixels and for latents, which are large and decoded."""


@dataclass(frozen=True)
class Sampler:
    """How samples are made of noise."""

    denoiser: Denoiser
    schedule: NoiseSchedule
    times: Tensor
    """(steps + 1,) from 1 to 0."""
    transition: str
    """A key of `TRANSITIONS`."""
    w: float = 0.0
    device: torch.device | str = "cpu"
    codec: LatentCodec | None = None
    """What makes images of samples that are latents."""

    def to(self, device: torch.device | str) -> Sampler:
        """This sampler on `device`; its network is moved, not copied."""
        part: Any = self.denoiser
        while not isinstance(part, NetworkDenoiser) and hasattr(part, "denoiser"):
            part = part.denoiser
        if isinstance(part, NetworkDenoiser):
            part.network.to(device)
        return replace(self, device=device, codec=self.codec.to(device) if self.codec else None)

    def __call__(
        self,
        noise: Tensor,
        cond: Tensor,
        *,
        seed: int | torch.Generator | Sequence[torch.Generator] = 0,
        batch_size: int = 256,
    ) -> Tensor:
        """(N, C, H, W) images in [-1, 1], on the CPU, from `noise` (N, ...) and conditions `cond` (N,).

        The same for the same seed; a generator goes on where it is, as in diffusers' pipelines. A generator for each
        row makes it independent of the others.
        """
        generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
        starts = range(0, len(noise), batch_size)
        owns = [generator[i : i + batch_size] if isinstance(generator, Sequence) else generator for i in starts]
        parts = zip(noise.split(batch_size), cond.split(batch_size), owns, strict=True)
        return torch.cat([self._images(z, c, own).cpu() for z, c, own in parts]).clamp(-1, 1)

    def _images(self, noise: Tensor, cond: Tensor, generator: Generators) -> Tensor:
        samples = sample(
            self.denoiser,
            noise.to(self.device),
            times=self.times,
            cond=cond.to(self.device),
            w=torch.full((len(noise),), self.w, device=self.device),
            schedule=self.schedule,
            transition=self.transition,
            generator=generator,
        )
        return samples if self.codec is None else self.codec.decode(samples)


def teacher_sampler(teacher: Denoiser, model: DiffusionModel, steps: int, *, w: float) -> Sampler:
    """DDIM with `steps` steps of a (guided, thresholded) `teacher`, which `model` is asked as.

    Raises:
        ConfigError: more steps than its schedule has timesteps.
    """
    most = getattr(model.schedule, "num_timesteps", steps)
    if steps > most:
        raise ConfigError(
            f"Sampling steps must be at most the {most} timesteps of the model's schedule, but are {steps} instead."
        )
    return Sampler(teacher, model.schedule, uniform_grid(steps), "ddim", w, codec=model.codec)


def student_samplers(
    objective: Objective, rounds: Mapping[int, DiffusionModel], steps: Iterable[int], *, w: float
) -> dict[int, Sampler]:
    """A sampler for each of `steps` that some round's student serves: its own steps only, where those are fixed."""
    last = list(rounds.values())[-1]
    samplers = {}
    for n in steps:
        model = rounds.get(n) if objective.fixed_steps else last if n <= (objective.most_steps or n) else None
        if model is not None:
            denoiser = objective.student_denoiser(model.denoiser())
            times, transition = objective.sampling_times(n), objective.phases[-1].transition
            samplers[n] = Sampler(denoiser, model.schedule, times, transition, w, codec=model.codec)
    return samplers


def most_steps(model: DiffusionModel) -> int | None:
    """Steps that the own scheduler of a pipeline folder of consistency models takes at most; None for other models."""
    config = model.scheduler_config
    if config.get("_class_name") not in _CONSISTENCY or "original_inference_steps" not in config:
        return None
    return int(config["original_inference_steps"])


def exported_sampler(model: DiffusionModel, steps: int, *, w: float = 0.0) -> Sampler:
    """The sampler that a pipeline folder's own scheduler is: multistep consistency for those of LCM, else DDIM.

    FlowMatchLCMScheduler leaves the boundary condition out, whose c_skip is below 1e-5 wherever it samples. One that
    this library did not write says nothing of its grid, which then is n / N.

    Raises:
        ConfigError: guidance that the model cannot have, or more steps than its grid.
    """
    config, kind = model.scheduler_config, model.scheduler_config.get("_class_name")
    if w > 0 and model.null_cond is None and not model.reads_guidance:
        raise ConfigError(f"`--guidance` must be 0 for a model without an unconditional class, but is {w:g} instead.")
    if kind not in _CONSISTENCY:
        return teacher_sampler(model.expert(guided=True), model, steps, w=w)
    if w > 0 and not model.reads_guidance:
        raise ConfigError(
            f"`--guidance` must be 0 for this consistency student, which has its guidance in its weights, but is "
            f"{w:g} instead."
        )
    grid = most_steps(model) or steps
    if steps > grid:
        raise ConfigError(f"`--steps` must be at most {grid} for this consistency student, but is {steps} instead.")
    denoiser: Denoiser = model.denoiser()
    if kind == "LCMScheduler":
        scaling = float(config.get("timestep_scaling", 10.0))
        denoiser = BoundaryConditioned(denoiser, model.schedule, timestep_scaling=scaling)
    return Sampler(denoiser, model.schedule, consistency_grid(grid, steps), "renoise", w, codec=model.codec)


def draw(model: DiffusionModel, sampler: Sampler, cond: Tensor, *, seed: int) -> Tensor:
    """(N, C, H, W) images in [-1, 1] of conditions `cond` (N,), those that the pipeline of `model` makes of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(cond), *model.sample_shape, generator=generator)
    return sampler(noise, cond, seed=generator, batch_size=_LATENT_ROWS if model.latent else _ROWS)
