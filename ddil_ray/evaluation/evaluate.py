"""Measuring few-step samplers against data and against the teacher.

Two references, since a guided teacher is itself far from the data: the data, and held-out samples of the teacher. All
noises come from a seed of their own and are never those of training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddil_ray.data import ImageData
from ddil_ray.diffusion.denoiser import Denoiser
from ddil_ray.diffusion.schedule import NoiseSchedule
from ddil_ray.diffusion.solver import sample
from ddil_ray.diffusion.timegrid import uniform_grid
from ddil_ray.evaluation.features import FeatureNetwork, train_features
from ddil_ray.evaluation.metrics import frechet_distance, paired_error, prdc

__all__ = ["Benchmark", "Sampler"]


@dataclass(frozen=True)
class Sampler:
    """A few-step sampler to be measured."""

    denoiser: Denoiser
    times: Tensor
    transition: str
    w: float = 0.0


class Benchmark:
    """Fixed noises, conditions, references and features, against which samplers are measured.

    Args:
        data: real images.
        teacher: the guided, thresholded teacher.
        schedule: of the teacher.
        num_samples: samples per measurement.
        teacher_steps: DDIM steps of the reference samples.
        seed: of all noises here.
        batch_size: samples per network pass.
        w: guidance of the teacher's references.
        features: trained on `data` unless given.
    """

    def __init__(
        self,
        data: ImageData,
        *,
        teacher: Denoiser,
        schedule: NoiseSchedule,
        num_samples: int,
        teacher_steps: int,
        seed: int,
        batch_size: int = 256,
        w: float = 0.0,
        features: FeatureNetwork | None = None,
    ) -> None:
        self.schedule, self.batch_size, self.seed = schedule, batch_size, seed
        self.features = features or train_features(data)
        self._generator = torch.Generator().manual_seed(seed)
        self.noise, self.cond = self._draw(data, num_samples)
        other_noise, other_cond = self._draw(data, num_samples)
        reference = Sampler(teacher, uniform_grid(teacher_steps), "ddim", w)
        self.teacher_paired = self._sample(reference, self.noise, self.cond)
        self.teacher_held_out = self._sample(reference, other_noise, other_cond)
        self._data_features = self.features(data.images)
        self._teacher_features = self.features(self.teacher_held_out)

    def _draw(self, data: ImageData, rows: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(rows, *data.images.shape[1:], generator=self._generator)
        return noise, data.labels[torch.randint(len(data), (rows,), generator=self._generator)]

    def _sample(self, sampler: Sampler, noise: Tensor, cond: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        parts = [
            sample(
                sampler.denoiser,
                z,
                times=sampler.times,
                cond=c,
                w=torch.full((len(z),), sampler.w),
                schedule=self.schedule,
                transition=sampler.transition,
                generator=generator,
            )
            for z, c in zip(noise.split(self.batch_size), cond.split(self.batch_size), strict=True)
        ]
        return torch.cat(parts).clamp(-1, 1)

    def samples(self, sampler: Sampler) -> Tensor:
        """(N, C, H, W) samples from the fixed noises."""
        return self._sample(sampler, self.noise, self.cond)

    def measure(self, samples: Tensor) -> dict[str, float]:
        """Scores of samples made from the fixed noises; `*_data` against data, `*_teacher` against held-out teacher.

        Keys: frechet_data, frechet_teacher, precision, recall, density, coverage, paired_error, spread.
        """
        features = self.features(samples)
        return {
            "frechet_data": frechet_distance(self._data_features, features),
            "frechet_teacher": frechet_distance(self._teacher_features, features),
            **prdc(self._data_features, features),
            "paired_error": paired_error(samples, self.teacher_paired),
            "spread": float(samples.std(0).mean()),
        }

    def describe(self) -> dict[str, Any]:
        """What a reader must know beside a score."""
        return {"features": self.features.name, "num_samples": len(self.noise), "k": 5, "seed": self.seed}
