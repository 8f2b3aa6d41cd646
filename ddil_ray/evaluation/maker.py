"""Making a block: its samples, and the little that is kept of them.

One function, `BlockMaker.block`, is run in this process or by Ray's actors. Images live no longer than their block, but
for the first few, which are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ddil_ray.evaluation.blocks import Blocks, Use
from ddil_ray.evaluation.clip import ClipScore
from ddil_ray.evaluation.diversity import ImageDistance, pair_distances
from ddil_ray.evaluation.features import FeatureNetwork
from ddil_ray.evaluation.metrics import paired_errors
from ddil_ray.evaluation.samplers import Sampler

__all__ = ["SHOWN", "BlockMaker", "BlockRows", "SampleRows", "Samplers", "TeacherBlock"]

SHOWN = 64
"""Images kept of each sampler, the first ones."""

Samplers = Mapping[str, Mapping[int, Sampler]]
"""Samplers by model and number of steps."""


@dataclass(frozen=True)
class SampleRows:
    """What is kept of a sampler's samples; all on the CPU."""

    features: Tensor
    """(R, D) float32."""
    cond: Tensor
    """(R,) int64."""
    paired_error: Tensor
    """(R,) float64 mean squared difference to the teacher's sample from the same noise."""
    clip: Tensor
    """(R,) float32 CLIP scores; (0,) where none are asked for."""
    lpips: Tensor
    """(P,) float32 distances of pairs with one condition; (0,) where none are asked for."""
    first: Tensor
    """(F, C, H, W) images, those among the first `SHOWN` rows of all."""

    @staticmethod
    def cat(parts: Sequence[SampleRows]) -> SampleRows:
        """All rows, in order."""
        return SampleRows(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(SampleRows)))


@dataclass(frozen=True)
class TeacherBlock:
    """What the teacher made of a block."""

    paired: Tensor
    """(R, C, H, W) reference samples from the noises that samplers start from."""
    held_out: Tensor
    """(R, D) float32 features of samples from other noises, with the same conditions."""


@dataclass(frozen=True)
class BlockRows:
    """All that leaves the process that made a block."""

    block: int
    held_out: Tensor
    """See `TeacherBlock`."""
    reference: Tensor
    """(F, C, H, W) the teacher's paired images, as `SampleRows.first`."""
    samples: dict[str, dict[int, SampleRows]]
    """By model and number of steps."""


@dataclass(frozen=True)
class BlockMaker:
    """Makes any block of a measurement."""

    blocks: Blocks
    reference: Sampler
    """The teacher with many steps."""
    features: FeatureNetwork
    distance: ImageDistance | None = None
    clip: ClipScore | None = None

    def to(self, device: torch.device | str) -> BlockMaker:
        """This maker with all its networks on `device`."""
        return replace(
            self,
            reference=self.reference.to(device),
            features=self.features.to(device),
            distance=self.distance.to(device) if self.distance is not None else None,
            clip=self.clip.to(device) if self.clip is not None else None,
        )

    def of_data(self, data: Tensor) -> Tensor:
        """Features (R, D) of rows of the data, which are decoded where they are latents."""
        codec = self.reference.codec
        return self.features(data if codec is None else codec.decode(data.to(self.reference.device)).clamp(-1, 1))

    def teacher(self, block: int) -> TeacherBlock:
        """The teacher's samples of a block."""
        paired, held_out = (self._samples(self.reference, block, use) for use in (Use.PAIRED, Use.HELD_OUT))
        return TeacherBlock(paired, self.features(held_out))

    def block(self, block: int, samplers: Samplers, teacher: TeacherBlock | None = None) -> BlockRows:
        """What is kept of a block, from the teacher and from every sampler."""
        teacher = teacher or self.teacher(block)
        return BlockRows(
            block,
            held_out=teacher.held_out,
            reference=self._first(teacher.paired, block),
            samples={
                model: {steps: self.rows(block, sampler, teacher.paired) for steps, sampler in by_steps.items()}
                for model, by_steps in samplers.items()
            },
        )

    def rows(self, block: int, sampler: Sampler, paired: Tensor) -> SampleRows:
        """What is kept of a sampler's samples of a block, whose teacher samples are `paired`."""
        samples, cond = self._samples(sampler, block, Use.PAIRED), self.blocks.conditions(block)
        pairs = self.blocks.generator(block, Use.PAIRS)
        return SampleRows(
            features=self.features(samples),
            cond=cond,
            paired_error=paired_errors(samples, paired),
            clip=self.clip(samples, cond) if self.clip is not None else torch.zeros(0),
            lpips=pair_distances(samples, cond, self.distance, pairs) if self.distance is not None else torch.zeros(0),
            first=self._first(samples, block),
        )

    def _samples(self, sampler: Sampler, block: int, use: Use) -> Tensor:
        noise, cond = self.blocks.noise(block, use), self.blocks.conditions(block)
        return sampler(noise, cond, seed=self.blocks.key(block, Use.STEPS), batch_size=len(noise))

    def _first(self, samples: Tensor, block: int) -> Tensor:
        # A copy: a view would keep, and send, all of them.
        return samples[: max(0, SHOWN - self.blocks.rows(block).start)].clone()
