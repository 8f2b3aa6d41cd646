"""Labelled images in memory, and the checks that they fit a teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddil_ray.errors import DataError

__all__ = ["ImageData", "check_against_teacher", "check_fills_batch"]


@dataclass(frozen=True)
class ImageData:
    """Images that fit in memory, shared between processes once."""

    images: Tensor
    """(N, C, H, W) float32 in [-1, 1]."""
    labels: Tensor
    """(N,) int64 class ids from 0; all -1 where there are none."""
    name: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labelled(self) -> bool:
        """Whether there are classes."""
        return bool((self.labels >= 0).all())

    @property
    def num_classes(self) -> int | None:
        """Classes, None where there are none."""
        return int(self.labels.max()) + 1 if self.labelled else None

    def split(self, fraction: float, *, seed: int) -> tuple[ImageData, ImageData]:
        """Two disjoint parts, the first with `fraction` of the rows; the same for the same seed."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        cut = int(len(self) * fraction)
        first, second = order[:cut], order[cut:]
        return (
            ImageData(self.images[first], self.labels[first], self.name),
            ImageData(self.images[second], self.labels[second], self.name),
        )


def check_against_teacher(
    data: ImageData, *, sample_shape: tuple[int, ...], num_classes: int | None, batch_size: int
) -> None:
    """Check that a teacher of `sample_shape` and `num_classes` can be distilled on `data`.

    Raises:
        DataError: another shape, classes the teacher does not know or none where it needs one, too few rows.
    """
    found = tuple(data.images.shape[1:])
    if found != tuple(sample_shape):
        raise DataError(
            f"`data.source` must hold images of the teacher's shape {tuple(sample_shape)} (channels, height, width), "
            f"but {data.name} has {found} instead. Set `data.image_size={sample_shape[-1]}`, or use data the teacher "
            "was trained on."
        )
    if num_classes is not None and not data.labelled:
        raise DataError(
            f"`data.label_column` must give a class id per image for a class-conditional teacher, but {data.name} "
            "has none. Name the column, or put images into one folder per class."
        )
    if num_classes is not None and int(data.labels.max()) >= num_classes:
        raise DataError(
            f"`data.source` must hold class ids below {num_classes}, the teacher's number of classes, but {data.name} "
            f"has {int(data.labels.max())}. Use the labels that the teacher was trained with."
        )
    check_fills_batch(data, batch_size)


def check_fills_batch(data: ImageData, batch_size: int) -> None:
    """Check that there is at least one batch of images.

    Raises:
        DataError: too few rows.
    """
    if len(data) < batch_size:
        raise DataError(
            f"`data.source` must hold at least one batch of {batch_size} images, but {data.name} holds {len(data)} "
            "instead. Add data, or lower `trainer.batch_size`."
        )
