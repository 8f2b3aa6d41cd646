"""Sample grids: writing them, and taking them apart again."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

__all__ = ["grid_tiles", "save_grid"]

_LEAST_PIXELS = 64
_MOST_PIXELS = 256


def save_grid(samples: Tensor, path: Path, *, columns: int | None = None) -> None:
    """Write samples (N, C, H, W) in [-1, 1] as one picture, small ones enlarged without smoothing.

    Args:
        samples: of 1 or 3 channels; of others the first is shown.
        path: a picture file; its folder is made.
        columns: samples per row; about square by default.
    """
    samples = samples[:, : 3 if samples.shape[1] >= 3 else 1].detach().cpu()
    n, channels, height, width = samples.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows, scale = -(-n // columns), max(1, _LEAST_PIXELS // max(height, width))
    pixels = ((samples.clamp(-1, 1) + 1) * 127.5).round().numpy().astype(np.uint8)
    sheet = np.zeros((rows, columns, channels, height + 1, width + 1), dtype=np.uint8)
    sheet.reshape(rows * columns, channels, height + 1, width + 1)[:n, :, :height, :width] = pixels
    whole = sheet.transpose(0, 3, 1, 4, 2).reshape(rows * (height + 1), columns * (width + 1), channels)
    picture = Image.fromarray(whole[..., 0] if channels == 1 else whole)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path)


def grid_tiles(path: Path, *, size: Sequence[int], count: int, first: int) -> list[bytes]:
    """The first samples of a picture that `save_grid` wrote of `count` of `size` (H, W), about square, as PNG files of
    at most 256 pixels."""
    columns = math.ceil(math.sqrt(count))
    tiles = []
    with Image.open(path, formats=("PNG",)) as sheet:
        scale = sheet.width // columns // (size[1] + 1)
        for n in range(min(first, count)):
            left, top = n % columns * (size[1] + 1) * scale, n // columns * (size[0] + 1) * scale
            tile = sheet.crop((left, top, left + size[1] * scale, top + size[0] * scale))
            tile.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
            buffer = io.BytesIO()
            tile.save(buffer, "PNG")
            tiles.append(buffer.getvalue())
    return tiles
