"""Makes emoji.parquet: `python -m ddil_ray.data.emoji.pack PACKAGE OUT`.

PACKAGE is the unpacked npm package that README.md names, OUT the file to write.
"""

from __future__ import annotations

import argparse
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

__all__ = ["on_white", "pack"]

_SIZE = 32
_LEAST_IMAGES = 20
"""Categories with fewer images are left out."""


def on_white(picture: Image.Image, size: int = _SIZE) -> Image.Image:
    """`picture` over white, then shrunk to (size, size) by the mean of each square of pixels.

    Composited first, so that the colours of transparent pixels do not bleed into the edges.

    Raises:
        ValueError: not a square whose side is a multiple of `size`.
    """
    width, height = picture.size
    if width != height or width % size:
        raise ValueError(
            f"`picture` must be a square with a side that is a multiple of {size}, but is {width} x {height} instead."
        )
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture.convert("RGBA"))
    return white.convert("RGB").reduce(width // size)


def pack(package: Path, out: Path) -> int:
    """Write the base emoji (no skin-tone variants) of `package` to `out`, in Unicode's order; returns how many.

    Emoji that look the same, such as the flags of a country and of its territory, become one image whose caption has
    all their names, with semicolons between. Small categories are left out.
    """
    entries = sorted(json.loads((package / "emoji.json").read_text()), key=lambda entry: entry["sort_order"])
    sizes = Counter(entry["category"] for entry in entries)
    categories = sorted(name for name, images in sizes.items() if images >= _LEAST_IMAGES)
    rows: dict[bytes, dict[str, Any]] = {}
    for entry in entries:
        if entry["category"] not in categories:
            continue
        with Image.open(package / "img" / "google" / "64" / entry["image"]) as opened:
            picture = on_white(opened)
        name = entry["name"].lower()
        same = rows.setdefault(
            picture.tobytes(),
            {
                "image": _encode(picture),
                "label": categories.index(entry["category"]),
                "category": entry["category"],
                "caption": name,
            },
        )
        if name != same["caption"]:
            same["caption"] += f"; {name}"
    pq.write_table(pa.Table.from_pylist(list(rows.values())), out, compression="zstd")
    return len(rows)


def _encode(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True, quality=100, method=6)
    return buffer.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path, help="folder of the unpacked npm package")
    parser.add_argument("out", type=Path, help="Parquet file to write")
    arguments = parser.parse_args()
    pack(arguments.package, arguments.out)
