"""Pins which size an image is brought to, and what of it is kept."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ddil_ray.prepare.buckets import Bucket, aspect_buckets, cut_to, nearest


def test_aspect_buckets_have_the_area_of_the_square_at_every_aspect():
    buckets = aspect_buckets(1024, 64)
    assert Bucket(1024, 1024) in buckets
    assert {Bucket(width, height) for height, width in buckets} == set(buckets)
    for height, width in buckets:
        assert height % 64 == width % 64 == 0
        assert 1024**2 - 64 * max(height, width) < height * width <= 1024**2
        assert 0.5 <= height / width <= 2
    # sizes that SDXL was trained on (arXiv:2307.01952, appendix I)
    assert {(832, 1216), (896, 1152), (1216, 832), (768, 1344)} <= set(buckets)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (1000, 1000, (512, 512)),
        (100, 100, (256, 256)),
        (300, 700, (256, 512)),
        (700, 300, (512, 256)),
        (10, 1000, (256, 512)),
        (720, 540, (512, 512)),  # 4:3 is nearer to 1:1 than to 2:1
        (600, 400, (512, 256)),
    ],
)
def test_an_image_goes_to_the_nearest_aspect_and_the_largest_size_that_it_fills(height, width, expected):
    buckets = [Bucket(256, 256), Bucket(512, 512), Bucket(256, 512), Bucket(512, 256)]
    assert nearest(buckets, height, width) == expected


def _ramp(height, width):
    """Red is the row, green the column."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([rows, columns, rows], axis=-1))


def test_the_centre_is_cut():
    cut = cut_to(_ramp(20, 50), Bucket(20, 30), center=True, name="a")
    assert (cut.top, cut.left) == (0, 10)
    assert cut.picture.size == (30, 20)
    assert cut.picture.getpixel((0, 0)) == (0, 10, 0)


def test_an_image_is_resized_until_it_covers_its_bucket():
    cut = cut_to(_ramp(100, 120), Bucket(50, 50), center=True, name="a")
    assert (cut.top, cut.left, cut.picture.size) == (0, 5, (50, 50))
    assert cut_to(_ramp(3, 5), Bucket(7, 7), center=True, name="a").picture.size == (7, 7)


def test_a_cut_anywhere_is_the_same_each_time_and_another_for_another_row():
    picture = _ramp(20, 200)
    cuts = {name: cut_to(picture, Bucket(20, 20), center=False, name=name) for name in "abcdefgh"}
    assert len({cut.left for cut in cuts.values()}) > 4
    for name, cut in cuts.items():
        assert cut_to(picture, Bucket(20, 20), center=False, name=name).left == cut.left
        assert cut.picture.getpixel((0, 0)) == (0, cut.left, 0)
