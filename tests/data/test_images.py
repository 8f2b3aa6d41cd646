"""Pins the readers: the same images from every format and filesystem, and one message for each thing wrong."""

from __future__ import annotations

import io

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ddil_ray.data import check_against_teacher, check_fills_batch, load_images
from ddil_ray.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
EXPECTED = torch.from_numpy(PIXELS.astype(np.float32))[:, None] / 127.5 - 1


def _png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    """A folder on disk and one on another filesystem."""
    if request.param == "local":
        return str(tmp_path)
    url = f"memory://{tmp_path.name}-{id(request)}"
    fsspec.filesystem("memory").makedirs(url, exist_ok=True)
    return url


def _write(url, content):
    fs, path = fsspec.core.url_to_fs(url)
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    fs.pipe_file(path, content)


def _write_parquet(url, **columns):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    _write(url, buffer.getvalue())


def test_a_folder_of_class_folders(root):
    for i, pixels in enumerate(PIXELS):
        _write(f"{root}/class-{i % 3}/{i:02}.png", _png(pixels))
    data = load_images(root)
    order = [i for c in range(3) for i in range(12) if i % 3 == c]
    torch.testing.assert_close(data.images, EXPECTED[order])
    assert data.labels.tolist() == [i % 3 for i in order]


def test_a_folder_without_classes(root):
    for i, pixels in enumerate(PIXELS):
        _write(f"{root}/{i:02}.png", _png(pixels))
    data = load_images(root)
    torch.testing.assert_close(data.images, EXPECTED)
    assert not data.labelled


def _column(kind):
    if kind == "bytes":
        return [_png(p) for p in PIXELS]
    if kind == "struct":
        return [{"bytes": _png(p), "path": None} for p in PIXELS]
    return EXPECTED[:, 0].numpy().tolist()


@pytest.mark.parametrize("kind", ["bytes", "struct", "arrays"])
def test_parquet(root, kind):
    labels = list(range(12))
    _write_parquet(f"{root}/a.parquet", image=_column(kind)[:5], label=labels[:5])
    _write_parquet(f"{root}/b.parquet", image=_column(kind)[5:], label=labels[5:])
    data = load_images(root)
    torch.testing.assert_close(data.images, EXPECTED)
    assert data.labels.tolist() == labels


def test_colour_and_size():
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8)).save(f"{folder}/a.png")
        assert load_images(folder, image_size=16).images.shape == (1, 3, 16, 16)


def test_sixteen_bit_greys_keep_their_shades(tmp_path):
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    expected = torch.from_numpy(ramp.astype(np.float32)) / 32767.5 - 1
    torch.testing.assert_close(load_images(str(tmp_path)).images[0, 0], expected, rtol=0, atol=1 / 127)


def test_grey_images_among_coloured_ones_are_named_with_a_remedy_that_helps(tmp_path):
    colour = np.stack([PIXELS[0], PIXELS[1], PIXELS[2]], axis=-1)
    for name, pixels in (("0", PIXELS[0]), ("1", colour)):
        (tmp_path / f"{name}.png").write_bytes(_png(pixels))
    with pytest.raises(DataError, match=r"of one shape, but .*0.png is \(1, 8, 8\) and .*1.png .*make all of them one"):
        load_images(str(tmp_path), image_size=8)


def test_a_size_for_images_that_are_never_resized_is_refused(tmp_path):
    pq.write_table(pa.table({"image": [np.zeros((8, 8)).tolist()], "label": [0]}), tmp_path / "a.parquet")
    for source, kind in (("digits", "builtin"), ("ddil_ray.testing:tiny_model", "factory")):
        with pytest.raises(DataError, match=rf"`data.image_size` must be left out for {kind} data.* but is 16"):
            load_images(source, image_size=16)
    with pytest.raises(DataError, match=r"`data.image_size` must be left out for arrays of numbers.*a.parquet row 0"):
        load_images(str(tmp_path / "a.parquet"), image_size=4)


def test_digits_are_in_range_with_ten_classes():
    data = load_images("digits")
    assert data.images.shape == (1797, 1, 8, 8)
    assert (float(data.images.min()), float(data.images.max())) == (-1.0, 1.0)
    assert data.num_classes == 10


def test_bad_data_is_refused_by_name(tmp_path):
    cases = {
        "missing column": ({"picture": [b""], "label": [0]}, r"`data.image_column`.*picture, label and not 'image'"),
        "missing label": ({"image": [_png(PIXELS[0])]}, r"`data.label_column`.*not 'label'"),
        "not an image": ({"image": [b"abc"], "label": [0]}, r"`data.source`.*row 0 is not one"),
        "NaN": ({"image": [[[0.0, float("nan")]]], "label": [0]}, r"`data.image_column`.*NaN or infinity"),
        "out of range": ({"image": [[[0.0, 200.0]]], "label": [0]}, r"values in \[-1, 1\].*200"),
        "wrong type": ({"image": ["text"], "label": [0]}, r"encoded images, structs .* or arrays, but is string"),
        "negative label": ({"image": [_png(PIXELS[0])], "label": [-1]}, r"class ids from 0.*-1"),
        "missing class": ({"image": [_png(p) for p in PIXELS[:2]], "label": [0, None]}, r"class ids from 0"),
        "two shapes": (
            {"image": [_png(PIXELS[0]), _png(PIXELS[0][:4])], "label": [0, 1]},
            r"one shape.*\(1, 8, 8\).*\(1, 4, 8\).*data.image_size",
        ),
        "no rows": ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "at least one image"),
    }
    for name, (columns, expected) in cases.items():
        path = tmp_path / f"{name}.parquet"
        _write_parquet(str(path), **columns)
        with pytest.raises(DataError, match=expected) as caught:
            load_images(str(path))
        assert caught.value.exit_code == 2, name


def test_unreadable_sources_are_refused(tmp_path):
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"not a picture")
    for source, expected in {
        str(tmp_path / "torn.parquet"): "cannot be read",
        str(tmp_path / "nowhere"): "does not exist",
        str(tmp_path / "empty"): "holds none",
        str(tmp_path / "bad"): r"a.png is not one",
        "nosuch://bucket/data": "Protocol not known",
    }.items():
        with pytest.raises(DataError, match=expected):
            load_images(source)


def test_data_that_does_not_fit_the_teacher_is_refused():
    data = load_images("digits")
    for settings, expected in (
        ({"sample_shape": (3, 8, 8)}, r"\(3, 8, 8\).*\(1, 8, 8\) instead.*Grey images have one channel"),
        ({"sample_shape": (1, 16, 16)}, r"\(1, 16, 16\).*\(1, 8, 8\) instead.*data.image_size=16"),
        ({"num_classes": 5}, r"class ids below 5.*has 9"),
        ({"prompted": True, "prepared_for": "sdxl"}, r"prepared for a sdxl teacher of prompts.*`ddil-ray prepare`"),
        ({"prepared_for": "dit"}, r"prepared for a dit teacher of classes.*`ddil-ray prepare`"),
    ):
        kind = {"sample_shape": (1, 8, 8), "num_classes": 10, "prompted": False, "prepared_for": None}
        with pytest.raises(DataError, match=expected):
            check_against_teacher(data, **(kind | settings))
    with pytest.raises(DataError, match=r"at least one batch of 4000 images.*1797"):
        check_fills_batch(data, 4000)


def test_parts_of_a_split_are_disjoint_and_whole():
    data = load_images("digits")
    first, second = data.split(0.8, seed=1)
    assert (len(first), len(second)) == (1437, 360)
    assert sorted(first.labels.tolist() + second.labels.tolist()) == sorted(data.labels.tolist())


def test_data_of_a_factory_is_what_it_returns():
    data = load_images("ddil_ray.simulation:sd15_latents")
    assert data.images.shape == (256, 4, 64, 64)
    assert data.num_classes == 1


def test_a_factory_must_return_data():
    with pytest.raises(DataError, match=r"must return a .*ImageData, but returned DiffusionModel"):
        load_images("ddil_ray.testing:tiny_model")
