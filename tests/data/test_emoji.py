"""Pins the emoji that ship: what they are, that they load like any data, and how they were made."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ddil_ray.data import check_against_teacher, load_images
from ddil_ray.data.emoji import PARQUET
from ddil_ray.data.emoji.pack import on_white, pack
from ddil_ray.errors import DataError

COUNTS = {
    "Activities": 85,
    "Animals & Nature": 159,
    "Flags": 261,
    "Food & Drink": 131,
    "Objects": 264,
    "People & Body": 381,
    "Smileys & Emotion": 169,
    "Symbols": 224,
    "Travel & Places": 218,
}


@pytest.fixture(scope="module")
def emoji():
    return load_images("emoji")


def test_emoji_are_colour_images_in_range(emoji):
    assert emoji.images.shape == (sum(COUNTS.values()), 3, 32, 32)
    assert emoji.images.dtype == torch.float32
    assert (float(emoji.images.min()), float(emoji.images.max())) == (-1.0, 1.0)
    greyness = (emoji.images - emoji.images.mean(1, keepdim=True)).abs().amax((1, 2, 3))
    assert float((greyness > 0.2).double().mean()) > 0.8


def test_classes_are_the_categories_in_alphabetical_order(emoji):
    table = pq.read_table(PARQUET)
    categories = table["category"].to_pylist()
    assert emoji.labels.tolist() == [sorted(COUNTS).index(name) for name in categories]
    assert {name: categories.count(name) for name in COUNTS} == COUNTS
    assert emoji.num_classes == 9


def test_no_two_emoji_are_the_same(emoji):
    assert len(emoji.images.flatten(1).unique(dim=0)) == len(emoji)


def test_most_corners_are_the_white_background(emoji):
    corners = emoji.images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert float((corners == 1).double().mean()) > 0.9


def test_every_emoji_has_a_caption(emoji):
    captions = dict(zip(pq.read_table(PARQUET)["caption"].to_pylist(), emoji.images, strict=True))
    red, green, blue = captions["heavy black heart"][:, 16, 16]
    assert red > 0 > max(green, blue)
    assert all(caption and caption == caption.lower() for caption in captions)
    assert "bouvet island flag; norway flag; svalbard & jan mayen flag" in captions


def test_emoji_fit_a_teacher_of_their_shape(emoji):
    kind = {"sample_shape": (3, 32, 32), "prompted": False, "prepared_for": None}
    check_against_teacher(emoji, num_classes=9, **kind)
    with pytest.raises(DataError, match=r"class ids below 8"):
        check_against_teacher(emoji, num_classes=8, **kind)


def test_loading_twice_gives_the_same(emoji):
    assert torch.equal(load_images("emoji", format="builtin").images, emoji.images)


def test_licences_lie_beside_the_data():
    assert "Apache License" in (PARQUET.parent / "LICENSE-images").read_text()
    assert "Cal Henderson" in (PARQUET.parent / "LICENSE-names").read_text()
    assert PARQUET.stat().st_size < 3e6


def test_transparent_colours_do_not_reach_the_picture():
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)  # black and transparent, which must look white
    pixels[:2, :2] = (255, 0, 0, 255)  # one opaque red square
    pixels[2, 2] = (0, 0, 0, 255)  # a black pixel among three white ones
    shrunk = np.asarray(on_white(Image.fromarray(pixels, "RGBA"), size=2))
    assert shrunk[0, 0].tolist() == [255, 0, 0]
    assert shrunk[0, 1].tolist() == [255, 255, 255]
    assert shrunk[1, 1].tolist() == [191, 191, 191]  # 3/4 of 255


def test_pictures_that_cannot_be_halved_evenly_are_refused():
    with pytest.raises(ValueError, match=r"multiple of 32, but is 48 x 48"):
        on_white(Image.new("RGBA", (48, 48)))


def test_packing_drops_small_categories_and_joins_equal_pictures(tmp_path):
    folder, rng = tmp_path / "img" / "google" / "64", np.random.default_rng(0)
    folder.mkdir(parents=True)
    entries = [
        {"name": f"E{i}", "image": f"{i}.png", "category": "B" if i < 20 else "A", "sort_order": -i} for i in range(21)
    ]
    for entry in entries:
        pixels = rng.integers(0, 256, (64, 64, 4), dtype=np.uint8)
        Image.fromarray(pixels, "RGBA").save(folder / entry["image"])
    (folder / "7.png").write_bytes((folder / "8.png").read_bytes())
    (tmp_path / "emoji.json").write_text(json.dumps(entries))
    assert pack(tmp_path, tmp_path / "out.parquet") == 19
    table = pq.read_table(tmp_path / "out.parquet")
    assert set(table["category"].to_pylist()) == {"B"}
    assert set(table["label"].to_pylist()) == {0}
    assert table["caption"].to_pylist()[10:13] == ["e9", "e8; e7", "e6"]
