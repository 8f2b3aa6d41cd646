"""Measuring few-step samplers against data and against the teacher.

Two references, since a guided teacher is itself far from the data: the data, and held-out samples of the teacher. All
noises come from a seed of their own and are never those of training (`blocks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ddil_ray.data import ImageData
from ddil_ray.evaluation.blocks import Blocks
from ddil_ray.evaluation.features import train_features
from ddil_ray.evaluation.instruments import Instruments
from ddil_ray.evaluation.maker import SHOWN, BlockMaker, BlockRows, SampleRows, Samplers, TeacherBlock
from ddil_ray.evaluation.neighbours import NEIGHBOURS
from ddil_ray.evaluation.samplers import Sampler
from ddil_ray.evaluation.scoring import MANIFOLD_ROWS, Measured, Scorer

__all__ = ["Benchmark", "Measurements"]


@dataclass(frozen=True)
class Measurements:
    """What was measured of several samplers."""

    measured: dict[str, dict[int, Measured]]
    """By model and number of steps."""
    reference: Tensor
    """(F, C, H, W) first samples of the teacher's reference, from the same noises."""
    prompts: tuple[str, ...] = ()
    """Of these samples; empty where conditions are no prompts."""


class Benchmark:
    """Fixed noises, conditions, references and instruments, against which samplers are measured.

    Measures in this process (`measure`), where the teacher's samples are made once and kept; or lets others make the
    blocks with `maker`, and puts them together (`collect`).

    Args:
        data: real images, or the latents of some; without any, samples are compared with the teacher's alone.
        reference: sampler of the teacher with many steps.
        num_samples: samples per measurement.
        seed: of all noises here.
        batch_size: samples per block, which is a network pass.
        instruments: the network that gives features, and more; by default a classifier trained on `data`.
        sample_shape: (C, H, W) of the noise; by default that of `data`.
    """

    def __init__(
        self,
        data: ImageData,
        *,
        reference: Sampler,
        num_samples: int,
        seed: int,
        batch_size: int = 256,
        instruments: Instruments | None = None,
        sample_shape: tuple[int, ...] | None = None,
    ) -> None:
        self.data, self._instruments = data, instruments or Instruments(train_features(data))
        blocks = Blocks(data.labels, sample_shape or tuple(data.images.shape[1:]), num_samples, batch_size, seed)
        parts = self._instruments
        self.maker = BlockMaker(blocks, reference, parts.features, parts.distance, parts.clip)

    def measure(self, samplers: Samplers) -> Measurements:
        """Measure every sampler in this process."""
        blocks = [self.maker.block(b, samplers, teacher) for b, teacher in enumerate(self._teacher)]
        return self.collect(blocks, self._data_features)

    def collect(self, blocks: Sequence[BlockRows], data_features: Sequence[Tensor]) -> Measurements:
        """Measurements from all blocks, in order, and the features of all data, (M, D) in parts."""
        held_out = torch.cat([b.held_out for b in blocks])
        of_data = torch.cat([held_out[:0], *data_features])
        labels = self.data.labels if self.data.labelled else torch.full((len(of_data),), -1)
        score = Scorer(of_data, labels, held_out, self._instruments.prompts)
        return Measurements(
            {
                model: {n: score(SampleRows.cat([b.samples[model][n] for b in blocks])) for n in by_steps}
                for model, by_steps in blocks[0].samples.items()
            },
            reference=torch.cat([b.reference for b in blocks]),
            prompts=self._first_prompts(),
        )

    def _pixels_of_samples(self) -> int:
        codec = self.maker.reference.codec
        return self.maker.blocks.sample_shape[-1] * (codec.pixels if codec is not None else 1)

    def _first_prompts(self) -> tuple[str, ...]:
        prompts, blocks = self._instruments.prompts, self.maker.blocks
        if self.data.prompts is None or prompts is None:
            return ()
        cond = torch.cat([blocks.conditions(b) for b in range(len(blocks)) if blocks.rows(b).start < SHOWN])
        return tuple(prompts[c] for c in cond[:SHOWN].tolist())

    def describe(self) -> dict[str, Any]:
        """What a reader must know beside a score."""
        parts, blocks = self._instruments, self.maker.blocks
        return {
            "features": parts.features.name,
            "num_samples": blocks.num_samples,
            "image_size": parts.features.size or self._pixels_of_samples(),
            "resized": parts.features.size is not None,
            "k": NEIGHBOURS,
            "neighbour_rows": MANIFOLD_ROWS,
            "seed": blocks.seed,
            **({"clip": parts.clip.name} if parts.clip is not None else {}),
        }

    @cached_property
    def _teacher(self) -> list[TeacherBlock]:
        return [self.maker.teacher(b) for b in range(len(self.maker.blocks))]

    @cached_property
    def _data_features(self) -> list[Tensor]:
        parts = self.data.images.split(self.maker.blocks.batch_size) if len(self.data) else ()
        return [self.maker.of_data(part) for part in parts]
