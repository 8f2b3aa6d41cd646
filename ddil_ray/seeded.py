"""Weights that are made of a seed, without a trace in anyone's random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["seeded"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within, torch's random numbers of the CPU follow `seed`; after it they are what they were.

    Those of other devices are left alone: `torch.manual_seed` would set them too, and nothing would set them back.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
