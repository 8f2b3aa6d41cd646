"""Sample grids."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

__all__ = ["save_grid"]

_LEAST_PIXELS = 64


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
