"""Sizes that images are brought to, and how an image is cut to one.

An image goes to the bucket of the nearest aspect ratio, is resized to just cover it, and cropped; so an image is never
distorted and loses along one side only. Where a cut began is kept, since SDXL is told of it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

__all__ = ["Bucket", "Cut", "aspect_buckets", "cut_to", "nearest"]

_MAX_ASPECT = 2.0


class Bucket(NamedTuple):
    """A size in pixels."""

    height: int
    width: int

    @property
    def name(self) -> str:
        """As folders and `data.bucket` call it."""
        return f"{self.height}x{self.width}"


class Cut(NamedTuple):
    """A picture of a bucket's size, and where its corner was in the resized picture."""

    picture: Image.Image
    top: int
    left: int


def aspect_buckets(resolution: int, step: int) -> tuple[Bucket, ...]:
    """The square of `resolution`, and for each side that is a multiple of `step` the largest rectangle within its area;
    aspects from 1:2 to 2:1, by height (after SDXL, arXiv:2307.01952, section 2.3; the range of aspects is ours)."""
    found = {Bucket(resolution, resolution)}
    for side in range(step, int(resolution * math.sqrt(_MAX_ASPECT)) + 1, step):
        other = resolution**2 // side // step * step
        if other and max(side, other) <= _MAX_ASPECT * min(side, other):
            found |= {Bucket(side, other), Bucket(other, side)}
    return tuple(sorted(found))


def nearest(buckets: Sequence[Bucket], height: int, width: int) -> Bucket:
    """The bucket for an image of that size: of those with the nearest aspect the largest that it fills, or else the
    smallest."""

    def rank(bucket: Bucket) -> tuple[float, bool, int]:
        distance = abs(math.log(height / width) - math.log(bucket.height / bucket.width))
        enlarged = bucket.height > height or bucket.width > width
        area = bucket.height * bucket.width
        return round(distance, 6), enlarged, area if enlarged else -area

    return min(buckets, key=rank)


def cut_to(picture: Image.Image, bucket: Bucket, *, center: bool, name: str) -> Cut:
    """`picture` resized to cover `bucket`, and cropped.

    Args:
        picture: of any size.
        bucket: the size that is wanted.
        center: crop the centre; otherwise anywhere, the same at every call for the same `name`.
        name: of the row.
    """
    scale = max(bucket.height / picture.height, bucket.width / picture.width)
    height = max(bucket.height, round(picture.height * scale))
    width = max(bucket.width, round(picture.width * scale))
    spare = (height - bucket.height, width - bucket.width)
    if center:
        top, left = (part // 2 for part in spare)
    else:
        chance = random.Random(name)
        top, left = (chance.randint(0, part) for part in spare)
    if (height, width) == (picture.height, picture.width):
        return Cut(picture.crop((left, top, left + bucket.width, top + bucket.height)), top, left)
    # Only what is kept is resized: of a very thin image the whole would fill the memory.
    down, across = picture.height / height, picture.width / width
    box = (left * across, top * down, (left + bucket.width) * across, (top + bucket.height) * down)
    cut = picture.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box)
    return Cut(cut, top, left)
