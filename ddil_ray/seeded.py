"""Weights that are made of a seed, without a trace in anyone's random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["seed_of", "seeded"]


def seed_of(*key: int) -> int:
    """32 bits, all that torch's generator of the CPU heeds, that another key gives others of."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within, torch's random numbers of the CPU follow `seed`; after it they are what they were.

    Those of other devices are left alone: `torch.manual_seed` would set them too, and nothing would set them back.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
