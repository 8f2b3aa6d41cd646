"""From encoded images to float tensors in [-1, 1]."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ddil_ray.errors import DataError, first_line

__all__ = ["decode_image", "open_picture", "picture_tensor", "stack_images"]

_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Not all that Pillow knows: for some, such as EPS, it starts another program."""
_GREY_MODES, _DEEP_GREY_MODES = {"1", "L"}, {"I", "I;16", "I;16B", "I;16L"}


def open_picture(content: bytes, *, name: str) -> Image.Image:
    """A picture of mode L or RGB from an encoded image, turned as its camera says.

    Raises:
        DataError: not an image.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as opened:
            if opened.mode in _DEEP_GREY_MODES:  # `convert` would clip 16 bits to 8
                deep = np.asarray(opened).clip(0, 65535).astype(np.uint16)
                return Image.fromarray(((deep.astype(np.uint32) + 128) // 257).astype(np.uint8))
            return ImageOps.exif_transpose(opened).convert("L" if opened.mode in _GREY_MODES else "RGB")
    except UnidentifiedImageError:
        raise _unreadable(name, "of no known format") from None
    except Exception as error:  # whatever a decoder meets in a broken file
        raise _unreadable(name, first_line(error)) from None


def _unreadable(name: str, problem: str) -> DataError:
    return DataError(
        f"`data.source` must hold readable images, but {name} is not one ({problem}). Remove or replace it."
    )


def picture_tensor(picture: Image.Image) -> Tensor:
    """(C, H, W) float32 in [-1, 1] of a picture of mode L or RGB."""
    pixels = np.asarray(picture, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(pixels.reshape(picture.height, picture.width, -1)).movedim(-1, 0).contiguous()


def decode_image(content: bytes, *, name: str, image_size: int | None) -> Tensor:
    """(C, H, W) float32 in [-1, 1] from an encoded image; grey images have one channel, others three.

    With `image_size` the centre square is cropped and resized to it.

    Raises:
        DataError: not an image.
    """
    picture = open_picture(content, name=name)
    if image_size is not None:
        picture = ImageOps.fit(picture, (image_size, image_size), Image.Resampling.LANCZOS)
    return picture_tensor(picture)


def stack_images(images: list[Tensor], names: list[str]) -> Tensor:
    """(N, C, H, W) of equal images.

    Raises:
        DataError: none, or of several shapes; names the first that differs.
    """
    if not images:
        raise DataError("`data.source` must hold at least one image, but holds none. Check the path and the format.")
    for image, name in zip(images, names, strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                f"`data.source` must hold images of one shape, but {names[0]} is {tuple(images[0].shape)} and {name} "
                f"is {tuple(image.shape)}. "
                + (
                    "Set `data.image_size` to resize them."
                    if len(image) == len(images[0])
                    else "Grey images have one channel, those in colour three: make all of them one or the other."
                )
            )
    return torch.stack(images)
