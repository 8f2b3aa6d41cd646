"""Pins that grids of samples can be taken apart again."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ddil_ray.report import grid_tiles, save_grid


@pytest.mark.parametrize(("size", "count"), [((8, 8), 7), ((20, 12), 16), ((80, 100), 5), ((7, 7), 1)])
def test_tiles_are_the_samples(tmp_path, size, count):
    samples = torch.randint(0, 256, (count, 3, *size)).float() / 127.5 - 1
    save_grid(samples, tmp_path / "grid.png")
    tiles = grid_tiles(tmp_path / "grid.png", size=size, count=count, first=6)
    assert len(tiles) == min(6, count)
    for tile, sample in zip(tiles, samples, strict=False):
        shown = Image.open(io.BytesIO(tile)).resize(size[::-1], Image.Resampling.NEAREST)
        expected = ((sample + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(np.asarray(shown), expected)


def test_large_tiles_are_shrunk(tmp_path):
    save_grid(torch.zeros(2, 3, 300, 600), tmp_path / "grid.png")
    (tile, _) = grid_tiles(tmp_path / "grid.png", size=(300, 600), count=2, first=9)
    assert Image.open(io.BytesIO(tile)).size == (256, 128)
