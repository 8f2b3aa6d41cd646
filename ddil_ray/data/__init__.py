"""Training images. To add a format: a module with a loader, and a row in `_LOADERS`.

Everything is held in memory once per node (shared through Ray's object store): fine up to some gigabytes of pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ddil_ray.data.emoji import load_emoji
from ddil_ray.data.folder import load_folder
from ddil_ray.data.images import ImageData, check_against_teacher, check_fills_batch
from ddil_ray.data.parquet import load_parquet
from ddil_ray.data.prepared import INDEX, load_prepared
from ddil_ray.errors import DataError
from ddil_ray.factory import call_factory, is_factory
from ddil_ray.redact import redact

__all__ = ["BUILTIN", "ImageData", "check_against_teacher", "check_fills_batch", "load_images"]


def _digits() -> ImageData:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels (UCI, CC BY 4.0)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy((bunch.images / 8 - 1).astype(np.float32))[:, None]
    return ImageData(images, torch.from_numpy(bunch.target.astype(np.int64)), "digits")


BUILTIN: dict[str, Callable[[], ImageData]] = {"digits": _digits, "emoji": load_emoji}
"""Data that comes with this package or those it needs."""


def _builtin(source: str, **_: Any) -> ImageData:
    if source not in BUILTIN:
        raise DataError(
            f"`data.source` must be one of {', '.join(BUILTIN)} for format builtin, but is {source!r} instead."
        )
    return BUILTIN[source]()


def _factory(source: str, **_: Any) -> ImageData:
    data = call_factory(source, field="data.source")
    if not isinstance(data, ImageData):
        raise DataError(
            f"`data.source` factory {source!r} must return a ddil_ray.data.ImageData, but returned "
            f"{type(data).__name__} instead."
        )
    images, labels = data.images, data.labels
    fits = images.ndim == 4 and images.dtype == torch.float32 and labels.dtype == torch.int64 and labels.ndim == 1
    if not fits or (data.prompts is None and len(labels) != len(images)):
        raise DataError(
            f"`data.source` factory {source!r} must return images (N, C, H, W) of float32 and labels (N,) of int64, "
            f"but returned {tuple(images.shape)} of {images.dtype} and {tuple(labels.shape)} of {labels.dtype} instead."
        )
    if not bool(images.isfinite().all()):
        raise DataError(
            f"`data.source` factory {source!r} must return finite values, but some are NaN or infinite. Mend the data."
        )
    return data


_LOADERS: dict[str, Callable[..., ImageData]] = {
    "builtin": _builtin,
    "factory": _factory,
    "folder": lambda source, image_size, **_: load_folder(source, image_size=image_size),
    "parquet": lambda source, bucket, **columns: load_parquet(source, **columns),
    "prepared": lambda source, bucket, **_: load_prepared(source, bucket=bucket),
}


_OF_ONE_SIZE = ("builtin", "factory", "prepared")
"""Formats whose images are never resized."""


def load_images(
    source: str,
    *,
    format: str = "auto",
    image_column: str = "image",
    label_column: str | None = "label",
    image_size: int | None = None,
    bucket: str | None = None,
) -> ImageData:
    """Read training images; see `ddil_ray.config.groups.Data`.

    Raises:
        DataError: anything wrong with them, in one message.
    """
    kind = _detect(source) if format == "auto" else format
    if image_size is not None and kind in _OF_ONE_SIZE:
        raise DataError(
            f"`data.image_size` must be left out for {kind} data, which have a size of their own, but is {image_size} "
            "instead. Set `data.image_size=null`, or use a folder of images."
        )
    data = _LOADERS[kind](
        source, image_column=image_column, label_column=label_column, image_size=image_size, bucket=bucket
    )
    return replace(data, name=redact(data.name))  # which reports and cards say


def _detect(source: str) -> str:
    if source in BUILTIN:
        return "builtin"
    if is_factory(source):
        return "factory"
    if source.rstrip("/").endswith(".parquet"):
        return "parquet"
    from ddil_ray.storage import open_url

    try:
        fs, root = open_url(source)
        if fs.exists(f"{root.rstrip('/')}/{INDEX}"):
            return "prepared"
        return "parquet" if any(p.endswith(".parquet") for p in fs.find(root)) else "folder"
    except Exception:  # the loader explains
        return "folder"
