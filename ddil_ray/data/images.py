"""Images, or latents of them, in memory with their conditions, and the checks that they fit a teacher."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddil_ray.errors import DataError
from ddil_ray.prompts import EmbeddingSource

__all__ = ["MOST_CLASSES", "ImageData", "check_against_teacher", "check_fills_batch"]

_MEND_PIXELS = {
    True: "Set `data.image_size={size}` for files of images, or use data the teacher was trained on.",
    False: "Grey images have one channel, those in colour three: convert the images, or use another teacher.",
}
"""By whether the channels agree."""
MOST_CLASSES = 1_000_000
"""Networks have a row of weights for every class."""


@dataclass(frozen=True)
class ImageData:
    """Images that fit in memory, shared between processes once."""

    images: Tensor
    """(N, C, H, W) float32: pixels in [-1, 1], or latents. N is 0 where there are prompts alone."""
    labels: Tensor
    """(N,) int64 class ids from 0, all -1 where there are none; or prompt ids, one per image or of all prompts."""
    name: str
    prompts: EmbeddingSource | None = None
    """Embeddings of the prompts that `labels` are ids of."""
    prepared_for: str | None = None
    """Family of the models whose autoencoder and text encoders were used; None for pixels."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def latents(self) -> bool:
        """Whether `images` are latents."""
        return self.prepared_for is not None

    @property
    def labelled(self) -> bool:
        """Whether there are classes."""
        return self.prompts is None and bool((self.labels >= 0).all())

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
            replace(self, images=self.images[first], labels=self.labels[first]),
            replace(self, images=self.images[second], labels=self.labels[second]),
        )


def check_against_teacher(
    data: ImageData, *, sample_shape: tuple[int, ...], num_classes: int | None, prompted: bool, prepared_for: str | None
) -> None:
    """Check that a teacher can be distilled on `data`.

    Args:
        data: what is trained on.
        sample_shape: (C, H, W) of the teacher's samples.
        num_classes: that the teacher knows, None where it knows none.
        prompted: whether its conditions are prompts.
        prepared_for: its family where its samples are latents, else None.

    Raises:
        DataError: another shape, or conditions of another kind.
    """
    if prompted != (data.prompts is not None) or prepared_for != data.prepared_for:
        what = f"prepared for a {prepared_for} teacher of {'prompts' if prompted else 'classes'}"
        found = f"is for a {data.prepared_for} one" if data.prepared_for else "holds images alone"
        raise DataError(
            f"`data.source` must be {what if prepared_for else 'images, for a teacher of pixels'}, but {data.name} "
            f"{found}. " + ("Run `ddil-ray prepare` on it with this teacher." if prepared_for else "Use images.")
        )
    shape = tuple(data.images.shape[1:])
    if len(data.images) and shape != tuple(sample_shape):
        raise DataError(
            f"`data.source` must hold images of the teacher's shape {tuple(sample_shape)} (channels, height, width), "
            f"but {data.name} has {shape} instead. "
            + (
                f"Choose another `data.bucket`, prepare the images at the teacher's resolution, or set "
                f"`teacher.sample_size={list(shape[1:])}` if it can make such images."
                if data.latents
                else _MEND_PIXELS[shape[0] == sample_shape[0]].format(size=sample_shape[-1])
            )
        )
    if num_classes is not None:
        _check_classes(data, num_classes)


def _check_classes(data: ImageData, num_classes: int) -> None:
    if not data.labelled:
        raise DataError(
            f"`data.label_column` must give a class id per image for a class-conditional teacher, but {data.name} "
            "has none. Name the column, or put images into one folder per class."
        )
    if int(data.labels.max()) >= num_classes:
        raise DataError(
            f"`data.source` must hold class ids below {num_classes}, the teacher's number of classes, but {data.name} "
            f"has {int(data.labels.max())}. Use the labels that the teacher was trained with."
        )


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
