"""The noises and conditions of a measurement, block by block.

Everything random about block b comes from (evaluation seed, b), so that any process can make it and figures do not
depend on how many do. The keys are in a namespace of `SeedSequence` that training never uses: no trajectory that a
student was trained on starts from an evaluation noise, whatever the seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

__all__ = ["Blocks", "Use"]

_NAMESPACE = 0x6576616C
"""Of all keys here ("eval"); training's keys have no spawn key."""


class Use(IntEnum):
    """What random numbers of a block are for."""

    PAIRED = 0
    """Noises that every sampler starts from, the teacher's reference too."""
    HELD_OUT = 1
    """Noises of the teacher samples that others are measured against."""
    STEPS = 2
    """Fresh noise within a sampler; the same for all of them."""
    PAIRS = 3
    """Pairs of samples that are compared with each other."""
    CONDITIONS = 4


@dataclass(frozen=True)
class Blocks:
    """`num_samples` rows in blocks of `batch_size`, the last one shorter."""

    labels: Tensor
    """(M,) int64 conditions of the data; those of the samples are as frequent."""
    sample_shape: tuple[int, ...]
    num_samples: int
    batch_size: int
    seed: int

    def __len__(self) -> int:
        """Number of blocks."""
        return -(-self.num_samples // self.batch_size)

    def rows(self, block: int) -> range:
        """Places of the block's rows among all."""
        start = block * self.batch_size
        return range(start, min(start + self.batch_size, self.num_samples))

    def key(self, block: int, use: Use) -> int:
        """Seed of a torch generator for one use in one block."""
        sequence = np.random.SeedSequence(self.seed, spawn_key=(_NAMESPACE, int(use), block))
        return int(sequence.generate_state(1, np.uint64)[0]) >> 1

    def generator(self, block: int, use: Use) -> torch.Generator:
        """CPU generator for one use in one block."""
        return torch.Generator().manual_seed(self.key(block, use))

    def noise(self, block: int, use: Use) -> Tensor:
        """(R, C, H, W) float32 standard normal noise."""
        return torch.randn(len(self.rows(block)), *self.sample_shape, generator=self.generator(block, use))

    def conditions(self, block: int) -> Tensor:
        """(R,) int64 conditions: a walk over the data's, in a new order each time it has seen all."""
        places, size = np.asarray(self.rows(block)), len(self.labels)
        order = [torch.randperm(size, generator=self.generator(int(e), Use.CONDITIONS)) for e in _epochs(places, size)]
        return self.labels[torch.cat(order)[places - places[0] // size * size]]


def _epochs(places: np.ndarray, size: int) -> range:
    """Walks over `size` rows that `places` fall into."""
    return range(places[0] // size, places[-1] // size + 1)
