"""Images in Parquet: encoded bytes, {bytes, path} structs, or arrays of numbers in [-1, 1]."""

from __future__ import annotations

import difflib
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ddil_ray.data.images import ImageData
from ddil_ray.data.pixels import decode_image, stack_images
from ddil_ray.errors import DataError
from ddil_ray.places import check_links

__all__ = ["image_array", "load_parquet"]


def load_parquet(source: str, *, image_column: str, label_column: str | None, image_size: int | None) -> ImageData:
    """Read a Parquet file or a folder of them (a path or fsspec URL).

    Raises:
        DataError: unreadable file, missing column, wrong type, NaN, values out of range; names file and column.
    """
    fs, files = _files(source)
    images: list[Tensor] = []
    names: list[str] = []
    labels: list[int] = []
    for path in files:
        table = _read(fs, path)
        column = _column(table, image_column, "data.image_column", path)
        for row, value in enumerate(column.to_pylist()):
            name = f"{path} row {row}"
            images.append(_image(value, image_column, name, image_size))
            names.append(name)
        labels += _labels(table, label_column, path, len(column))
    return ImageData(stack_images(images, names), torch.tensor(labels, dtype=torch.int64), source)


def _files(source: str) -> tuple[Any, list[str]]:
    try:
        fs, root = fsspec.core.url_to_fs(source)
        files = [root] if fs.isfile(root) else sorted(p for p in fs.find(root) if p.endswith(".parquet"))
    except Exception as error:  # every filesystem has errors of its own
        raise DataError(f"`data.source` must be readable, but {source!r} failed: {error}.") from None
    check_links(fs, root, files)
    if not files:
        raise DataError(f"`data.source` must be a Parquet file or a folder with some, but {source!r} has none.")
    return fs, files


def _read(fs: Any, path: str) -> pa.Table:
    try:
        with fs.open(path, "rb") as file:
            return pq.read_table(file)
    except Exception as error:  # Arrow's, or the filesystem's own
        raise DataError(
            f"`data.source` must hold whole Parquet files, but {path} cannot be read ({error}). Write it again."
        ) from None


def _column(table: pa.Table, name: str, setting: str, path: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        close = difflib.get_close_matches(name, table.column_names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise DataError(
            f"`{setting}` must be a column of every file, but {path} has {', '.join(table.column_names)} and not "
            f"{name!r}.{hint}"
        )
    return table[name]


def _image(value: Any, column: str, name: str, image_size: int | None) -> Tensor:
    content = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(content, bytes):
        return decode_image(content, name=name, image_size=image_size)
    return torch.from_numpy(image_array(content, column, name))


def image_array(content: Any, column: str, name: str) -> np.ndarray[Any, Any]:
    """(C, H, W) float32 of an array of numbers in `column`.

    Raises:
        DataError: of another shape, NaN, or beyond [-1, 1].
    """
    try:
        array = np.asarray(content, dtype=np.float32)
    except (TypeError, ValueError):
        array = np.zeros(0, dtype=np.float32)
    if array.ndim not in (2, 3):
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


def _labels(table: pa.Table, column: str | None, path: str, rows: int) -> list[int]:
    if column is None:
        return [-1] * rows
    values = _column(table, column, "data.label_column", path).to_pylist()
    wrong = next((v for v in values if not isinstance(v, int) or isinstance(v, bool) or v < 0), None)
    if wrong is not None or None in values:
        raise DataError(
            f"`data.label_column` {column!r} must hold class ids from 0, but {path} has {wrong!r}. Set "
            "`data.label_column=null` if the images have no classes."
        )
    return list(values)
