"""Images in a folder: one subfolder per class, or all in one without classes."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import torch

from ddil_ray.data.images import ImageData
from ddil_ray.data.pixels import decode_image, stack_images
from ddil_ray.errors import DataError, first_line
from ddil_ray.places import check_links
from ddil_ray.storage import open_url

__all__ = ["IMAGE_SUFFIXES", "load_folder"]

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def load_folder(source: str, *, image_size: int | None) -> ImageData:
    """Read every image under `source` (a path or fsspec URL); classes are the subfolders in alphabetical order.

    Raises:
        DataError: no such folder, no image in it, or one that cannot be read.
    """
    try:
        fs, root = open_url(source)
        found = fs.find(root)
    except Exception as error:  # every filesystem has errors of its own
        raise DataError(
            f"`data.source` must be a readable folder, but {source!r} failed: {first_line(error)}. Check the address "
            "and the credentials."
        ) from None
    check_links(fs, root, found)
    paths = sorted(p for p in found if PurePosixPath(p).suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise DataError(
            f"`data.source` must be a folder with images ({', '.join(IMAGE_SUFFIXES)}), but {source!r} "
            f"{'holds none' if fs.exists(root) else 'does not exist'}."
        )
    images = [decode_image(_read(fs, p), name=p, image_size=image_size) for p in paths]
    below = [PurePosixPath(p).relative_to(PurePosixPath(root)).parts[:-1] for p in paths]
    classes = sorted({parts[0] for parts in below if parts})
    flat = any(not parts for parts in below)
    if flat and classes:
        raise DataError(
            f"`data.source` must hold its images either all in class folders or all in one folder, but {source!r} has "
            f"both (class folders {', '.join(classes[:3])}). Move them."
        )
    labels = [-1 if flat else classes.index(parts[0]) for parts in below]
    return ImageData(stack_images(images, paths), torch.tensor(labels), source)


def _read(fs: Any, path: str) -> bytes:
    try:
        content: bytes = fs.cat_file(path)
    except Exception as error:  # every filesystem has errors of its own
        raise DataError(f"`data.source` must hold readable files, but {path} failed: {first_line(error)}.") from None
    return content
