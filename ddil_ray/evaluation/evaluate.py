"""Measuring few-step samplers against data and against the teacher.

Two references, since a guided teacher is itself far from the data: the data, and held-out samples of the teacher. All
noises come from a seed of their own and are never those of training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddil_ray.data import ImageData
from ddil_ray.evaluation.features import FeatureNetwork, train_features
from ddil_ray.evaluation.metrics import frechet_distance, paired_error, prdc
from ddil_ray.evaluation.samplers import Sampler

__all__ = ["Benchmark"]

_PRDC_ROWS = 2000
"""Samples used for neighbour counts, whose cost grows with the square."""


class Benchmark:
    """Fixed noises, conditions, references and features, against which samplers are measured.

    Args:
        data: real images.
        reference: sampler of the teacher with many steps.
        num_samples: samples per measurement.
        seed: of all noises here.
        batch_size: samples per network pass.
        features: trained on `data` unless given.
    """

    def __init__(
        self,
        data: ImageData,
        *,
        reference: Sampler,
        num_samples: int,
        seed: int,
        batch_size: int = 256,
        features: FeatureNetwork | None = None,
    ) -> None:
        self.batch_size, self.seed = batch_size, seed
        self.features = features or train_features(data)
        generator = torch.Generator().manual_seed(seed)
        # Both sets have the same conditions, as frequent as in the data: a distance between them is not about classes.
        rows = torch.randperm(len(data), generator=generator).repeat(-(-num_samples // len(data)))[:num_samples]
        self.cond = data.labels[rows]
        self.noise, other = torch.randn(2, num_samples, *data.images.shape[1:], generator=generator)
        self.teacher_paired = self.samples(reference)
        self.teacher_held_out = reference(other, self.cond, seed=seed + 1, batch_size=batch_size)
        self._data_features = self.features(data.images)
        self._teacher_features = self.features(self.teacher_held_out)

    def samples(self, sampler: Sampler) -> Tensor:
        """(N, C, H, W) samples from the fixed noises."""
        return sampler(self.noise, self.cond, seed=self.seed, batch_size=self.batch_size)

    def measure(self, samples: Tensor) -> dict[str, float]:
        """Scores of samples made from the fixed noises; `*_data` against data, `*_teacher` against held-out teacher.

        Keys: frechet_data, frechet_teacher, precision, recall, density, coverage, paired_error, spread.
        """
        features = self.features(samples)
        return {
            "frechet_data": frechet_distance(self._data_features, features),
            "frechet_teacher": frechet_distance(self._teacher_features, features),
            **prdc(self._data_features, features[:_PRDC_ROWS]),
            "paired_error": paired_error(samples, self.teacher_paired),
            "spread": float(samples.std(0).mean()),
        }

    def describe(self) -> dict[str, Any]:
        """What a reader must know beside a score."""
        return {"features": self.features.name, "num_samples": len(self.noise), "k": 5, "seed": self.seed}
