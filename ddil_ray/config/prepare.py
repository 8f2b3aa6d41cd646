"""The config of `ddil-ray prepare`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ddil_ray.config.groups import Role
from ddil_ray.config.kinds import Count, Group, Side
from ddil_ray.config.places import Place

__all__ = ["PrepareConfig", "PrepareData"]

Size = tuple[Side, Side]


class PrepareTeacher(Group):
    """The model whose autoencoder and text encoders are used."""

    model: Place = Field(description="pipeline folder, fsspec URL, hub id or builtin:NAME")


class PrepareData(Group):
    """Images with captions or classes, or prompts alone."""

    source: Place = Field(description="folder or file, by path or fsspec URL, or `emoji`")
    format: Literal["auto", "folder", "parquet", "webdataset", "text"] = Field(
        "auto", description="folder: metadata.jsonl, or a folder per class; text: prompts without images"
    )
    image_column: str = Field("image", description="Parquet column with the image")
    caption_column: str | None = Field(
        None, description="column or key of the caption; default: the first of txt, text, caption, prompt that is there"
    )
    label_column: str | None = Field(
        None, description="column or key of the class id; default: the first of cls, label, class that is there"
    )


class EncodeImages(Role):
    """The actors that read, cut and encode images."""

    batch_size: Count = Field(8, description="images per pass of the autoencoder")


class EncodePrompts(Role):
    """The actors that encode prompts."""

    batch_size: Count = Field(64, description="prompts per pass of the text encoders")


class PrepareConfig(Group):
    """Everything `ddil-ray prepare` reads."""

    output: Place = Field(description="folder or fsspec URL for the prepared data")
    teacher: PrepareTeacher
    data: PrepareData
    resolution: Side | None = Field(None, description="pixels of a square's side; default: the teacher's own")
    buckets: Literal["square", "aspect"] | tuple[Size, ...] = Field(
        "square",
        description="one square, its area at aspects of 1:2 to 2:1, or a list of [height, width] in pixels",
    )
    bucket_step: Side = Field(64, description="pixels that the sides of `aspect` buckets are multiples of")
    center_crop: bool = Field(True, description="or anywhere, drawn by the row's name")
    dtype: Literal["fp16", "fp32"] = Field("fp16", description="of latents and embeddings as they are stored")
    rows_per_file: Count = Field(1000, description="at most, and what is done again after a crash")
    limit: Count | None = Field(None, description="only the first rows, this many")
    encode_images: EncodeImages = EncodeImages()
    encode_prompts: EncodePrompts = EncodePrompts()

    @model_validator(mode="after")
    def _sizes_are_given_once(self) -> PrepareConfig:
        if isinstance(self.buckets, tuple) and not self.buckets:
            raise ValueError("buckets must hold a size, but are empty; use square")
        if isinstance(self.buckets, tuple) and self.resolution is not None:
            raise ValueError("resolution must be left out where buckets are listed")
        return self
