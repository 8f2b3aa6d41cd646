"""Pins seeds that are made of several numbers."""

from __future__ import annotations

import torch

from ddil_ray.seeded import seed_of


def test_every_key_gives_numbers_of_its_own():
    """Torch's generator of the CPU heeds 32 bits of a seed: ranks told apart by higher ones would drop the same."""
    seeds = {seed_of(7, rank) for rank in range(100)} | {seed_of(8, rank) for rank in range(100)}
    assert len(seeds) == 200
    assert max(seeds) < 2**32
    drawn = {tuple(torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist()) for seed in seeds}
    assert len(drawn) == 200
