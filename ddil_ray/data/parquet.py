"""Images in Parquet: encoded bytes, {bytes, path} structs, or arrays of numbers in [-1, 1]."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ddil_ray.data.footers import IDS, IMAGES, check_column, read_footers, unreadable
from ddil_ray.data.images import MOST_CLASSES, ImageData
from ddil_ray.data.pixels import decode_image, stack_images
from ddil_ray.errors import DataError, first_line
from ddil_ray.places import check_links
from ddil_ray.storage import open_url

__all__ = ["image_array", "load_parquet"]

_NO_CLASSES = "Set `data.label_column=null` if the images have no classes."


def load_parquet(source: str, *, image_column: str, label_column: str | None, image_size: int | None) -> ImageData:
    """Read a Parquet file or a folder of them (a path or fsspec URL).

    The footers of all files are checked before data is read. Where pages have checksums, they are verified.

    Raises:
        DataError: unreadable file, missing column, wrong type, NaN, values out of range; names file and column.
    """
    fs, files = _files(source)
    footers = read_footers(fs, {path: path for path in files})
    if not sum(footer.rows for footer in footers):
        raise DataError(
            f"`data.source` must hold at least one image, but the {len(files)} Parquet files of {source!r} have no "
            "row. Check the path."
        )
    check_column(footers, image_column, "data.image_column", IMAGES, "Name the column with the images.")
    if label_column is not None:
        check_column(footers, label_column, "data.label_column", IDS, _NO_CLASSES)
    images: list[Tensor] = []
    names: list[str] = []
    labels: list[int] = []
    for path, _, rows in footers:
        if rows:
            table = _read(fs, path, list(dict.fromkeys(filter(None, (image_column, label_column)))))
            for row, value in enumerate(_values(table, image_column, path)):
                name = f"{path} row {row}"
                images.append(_image(value, image_column, name, image_size))
                names.append(name)
            labels += _labels(table, label_column, path)
    return ImageData(stack_images(images, names), torch.tensor(labels, dtype=torch.int64), source)


def _files(source: str) -> tuple[Any, list[str]]:
    try:
        fs, root = open_url(source)
        files = [root] if fs.isfile(root) else sorted(p for p in fs.find(root) if p.endswith(".parquet"))
    except Exception as error:  # every filesystem has errors of its own
        raise DataError(
            f"`data.source` must be readable, but {source!r} failed: {first_line(error)}. Check the address and the "
            "credentials."
        ) from None
    check_links(fs, root, files)
    if not files:
        raise DataError(f"`data.source` must be a Parquet file or a folder with some, but {source!r} has none.")
    return fs, files


def _read(fs: Any, path: str, columns: list[str]) -> pa.Table:
    try:
        with fs.open(path, "rb") as file:
            return pq.read_table(file, columns=columns, page_checksum_verification=True)
    except Exception as error:  # Arrow's, or the filesystem's own
        raise unreadable(path, error) from None


def _values(table: pa.Table, column: str, path: str) -> list[Any]:
    try:
        values: list[Any] = table[column].to_pylist()
    except Exception as error:  # what Arrow or Python meets in values that a broken file has
        raise unreadable(path, error) from None
    return values


def _image(value: Any, column: str, name: str, image_size: int | None) -> Tensor:
    content = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(content, bytes):
        return decode_image(content, name=name, image_size=image_size)
    array = image_array(content, column, name)
    if image_size is not None:
        raise DataError(
            f"`data.image_size` must be left out for arrays of numbers, which are taken as they are, but is "
            f"{image_size} where `data.image_column` {column!r} of {name} holds one. Set `data.image_size=null`, and "
            "resize the data."
        )
    return torch.from_numpy(array)


def image_array(content: Any, column: str, name: str) -> np.ndarray[Any, Any]:
    """(C, H, W) float32 of an array of numbers in `column`.

    Raises:
        DataError: of another shape, NaN, or beyond [-1, 1].
    """
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
            array = np.asarray(content, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        array = np.zeros(0, dtype=np.float32)
    if array.ndim not in (2, 3) or array.size == 0:
        raise DataError(
            f"`data.image_column` {column!r} must hold encoded images or arrays of (H, W) or (C, H, W), but {name} "
            f"holds {type(content).__name__} of shape {array.shape} instead."
        )
    if not np.isfinite(array).all() or np.abs(array).max(initial=0) > 1 + 1e-4:
        raise DataError(
            f"`data.image_column` {column!r} must hold finite values in [-1, 1], but {name} has "
            f"{'NaN or infinity' if not np.isfinite(array).all() else f'{np.abs(array).max():g}'}. Rescale the data."
        )
    return array if array.ndim == 3 else array[None]


def _labels(table: pa.Table, column: str | None, path: str) -> list[int]:
    if column is None:
        return [-1] * len(table)
    values = _values(table, column, path)
    wrong = next((row for row, value in enumerate(values) if value is None or not 0 <= value < MOST_CLASSES), None)
    if wrong is not None:
        raise DataError(
            f"`data.label_column` {column!r} must hold class ids from 0 to {MOST_CLASSES - 1}, but {path} row {wrong} "
            f"has {values[wrong]!r}. {_NO_CLASSES}"
        )
    return values
