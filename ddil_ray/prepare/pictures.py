"""From what a reader finds in the place of an image to a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from ddil_ray.data.parquet import image_array
from ddil_ray.data.pixels import open_picture

__all__ = ["read_picture"]


def read_picture(content: Any, *, name: str, column: str, grey: bool = False) -> Image.Image:
    """A picture of mode RGB, or L where `grey`, from an encoded image, a {bytes, path} struct or an array.

    Args:
        content: see `Reader.contents`.
        name: of the row.
        column: that it was read from.
        grey: whether one channel is wanted.

    Raises:
        DataError: none of these.
    """
    encoded = content.get("bytes") if isinstance(content, dict) else content
    if isinstance(encoded, bytes):
        picture = open_picture(encoded, name=name)
    else:
        pixels = ((image_array(encoded, column, name) + 1) * 127.5).round().astype(np.uint8)
        picture = Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1))
    return picture.convert("L" if grey else "RGB")
