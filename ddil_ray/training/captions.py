"""Images with their captions, in memory: what a small text-to-image teacher is trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddil_ray.config.prepare import PrepareData
from ddil_ray.data.pixels import picture_tensor
from ddil_ray.errors import DataError, first_line
from ddil_ray.prepare.buckets import Bucket, cut_to
from ddil_ray.prepare.pictures import read_picture
from ddil_ray.prepare.rows import Row
from ddil_ray.prepare.sources import open_source
from ddil_ray.redact import redact

__all__ = ["CaptionedImages", "captioned_images"]


@dataclass(frozen=True)
class CaptionedImages:
    """Images and what they show."""

    images: Tensor
    """(N, 3, H, W) float32 in [-1, 1]."""
    captions: list[str]
    name: str

    def __len__(self) -> int:
        return len(self.captions)


def captioned_images(data: PrepareData, *, size: int) -> CaptionedImages:
    """All images of `data` as RGB squares of `size` pixels, in any format that `ddil-ray prepare` reads.

    Raises:
        DataError: not readable, or prompts alone.
    """
    reader, shards = open_source(data, classes=False)
    if not reader.images:
        raise DataError(f"`data.source` must hold images, but {data.source} holds prompts alone. Add their images.")
    images, captions = [], []
    for shard in shards:
        rows = [row for row in reader.scan(shard) if isinstance(row, Row)]
        for row, content in zip(rows, reader.contents(shard, rows), strict=True):
            picture = read_picture(_read(content, row.name), name=row.name, column=data.image_column)
            cut = cut_to(picture, Bucket(size, size), center=True, name=row.name)
            images.append(picture_tensor(cut.picture))
            captions.append(str(row.condition))
    if not images:
        raise DataError(
            f"`data.source` must hold an image with a caption, but {data.source} holds none. Check the path and "
            "`data.caption_column`."
        )
    return CaptionedImages(torch.stack(images), captions, redact(data.source))


def _read(content: Callable[[], Any], name: str) -> Any:
    try:
        return content()
    except Exception as error:  # every filesystem has errors of its own
        raise DataError(
            f"`data.source` must hold readable images, but {name} cannot be read ({first_line(error)}). Remove or "
            "replace it."
        ) from None
