"""Noto's emoji: colour images of 32 x 32 pixels in nine classes; README.md beside this file says where from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ddil_ray.data.images import ImageData
from ddil_ray.data.parquet import load_parquet

__all__ = ["PARQUET", "load_emoji"]

PARQUET = Path(__file__).parent / "emoji.parquet"
"""Columns `image` (WebP without loss), `label`, `category` and `caption`; made by `ddil_ray.data.emoji.pack`."""


def load_emoji() -> ImageData:
    """1,892 images (3, 32, 32) on white; class ids follow the alphabetical order of the categories."""
    images = load_parquet(str(PARQUET), image_column="image", label_column="label", image_size=None)
    return replace(images, name="emoji")
