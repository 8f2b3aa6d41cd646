"""A preparation with everything that is checked and found out before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddil_ray.config import flatten
from ddil_ray.config.prepare import PrepareConfig
from ddil_ray.errors import ConfigError
from ddil_ray.models import Family, find_pipeline
from ddil_ray.models.family import read_config, unreadable
from ddil_ray.models.latents import vae_scale
from ddil_ray.prepare.buckets import Bucket, aspect_buckets
from ddil_ray.prepare.rows import Reader, Shard
from ddil_ray.prepare.sources import located, open_source
from ddil_ray.prepare.store import Store

__all__ = ["Job", "new_job"]

_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
_NO_CONTENT = ("output", "encode_images", "encode_prompts")
"""Settings that do not change what is made."""


@dataclass(frozen=True)
class Job:
    """What every process of a preparation is given."""

    config: PrepareConfig
    family: str
    prompted: bool
    """Whether conditions are prompts."""
    reader: Reader
    shards: tuple[Shard, ...]
    buckets: tuple[Bucket, ...]
    scale: int
    """Pixels per latent along one side."""
    channels: int
    """Of latents."""
    grey: bool
    """Whether the autoencoder reads one channel."""

    @property
    def store(self) -> Store:
        """Where it is prepared to."""
        return Store(self.config.output)

    @property
    def dtype(self) -> torch.dtype:
        """Of latents and embeddings as they are stored."""
        return _DTYPES[self.config.dtype]

    @property
    def content(self) -> dict[str, Any]:
        """All that decides what the output holds; credentials inside URLs are left out."""
        settings = {k: v for k, v in flatten(self.config).items() if k.partition(".")[0] not in _NO_CONTENT}
        return {**settings, "files of data.source": [list(shard) for shard in self.shards]}

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int]:
        """(C, H, W) of latents of `bucket`."""
        return self.channels, bucket.height // self.scale, bucket.width // self.scale


def new_job(config: PrepareConfig) -> Job:
    """The job of `config`, with local paths made absolute.

    Raises:
        ConfigError: the teacher has no latents, a bucket does not fit its autoencoder, or the output is in the source.
        DataError: see `open_source`.
    """
    family, folder = find_pipeline(config.teacher.model)
    if not family.latent:
        raise ConfigError(
            f"`teacher.model` must be a teacher of latents, but {config.teacher.model} is of pixels. Distil it on the "
            "images as they are."
        )
    config = _absolute(config)
    if f"{config.output.rstrip('/')}/".startswith(f"{config.data.source.rstrip('/')}/"):
        raise ConfigError(
            f"`output` must lie outside `data.source`, whose files are all read, but is {config.output!r} inside "
            f"{config.data.source!r}. Choose another `output`."
        )
    channels, grey, scale = _autoencoder(folder)
    reader, shards = open_source(config.data, classes=not family.prompted)
    return Job(
        config=config,
        family=family.name,
        prompted=family.prompted,
        reader=reader,
        shards=tuple(shards),
        buckets=_buckets(config, family, folder, scale),
        scale=scale,
        channels=channels,
        grey=grey,
    )


def _autoencoder(folder: Path) -> tuple[int, bool, int]:
    """Channels of its latents, whether it reads one channel, and pixels per latent along one side."""
    config = read_config(folder, "vae")
    try:
        return int(config["latent_channels"]), config.get("in_channels", 3) == 1, vae_scale(folder)
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable(folder, error) from error


def _absolute(config: PrepareConfig) -> PrepareConfig:
    """Other processes may have another working directory."""

    def path(url: str) -> str:
        return url if "://" in url else str(Path(url).resolve())

    data = config.data.model_copy(update={"source": path(located(config.data.source))})
    model = config.teacher.model
    teacher = config.teacher.model_copy(update={"model": path(model) if Path(model).exists() else model})
    return config.model_copy(update={"data": data, "output": path(config.output), "teacher": teacher})


def _buckets(config: PrepareConfig, family: Family, folder: Path, scale: int) -> tuple[Bucket, ...]:
    if isinstance(config.buckets, tuple):
        buckets = tuple(Bucket(*size) for size in dict.fromkeys(config.buckets))
    elif config.buckets == "aspect":
        buckets = aspect_buckets(_resolution(config, family, folder, scale), config.bucket_step)
    else:
        side = _resolution(config, family, folder, scale)
        buckets = (Bucket(side, side),)
    wrong = next((b for b in buckets if b.height % scale or b.width % scale), None)
    if wrong is not None:
        raise ConfigError(
            f"`buckets` must have sides that are multiples of {scale}, the pixels per latent of the autoencoder, but "
            f"one is {wrong.name}. Change `buckets`, `resolution` or `bucket_step`."
        )
    return buckets


def _resolution(config: PrepareConfig, family: Family, folder: Path, scale: int) -> int:
    """The side of a square: as set, or what the denoiser, or else the autoencoder, was trained on."""
    if config.resolution is not None:
        return config.resolution
    latents = read_config(folder, family.component).get("sample_size")
    own = read_config(folder, "vae").get("sample_size") if latents is None else latents
    sides = {*own} if isinstance(own, list) else {own}
    side = sides.pop()
    if sides or side is None:
        raise ConfigError("`resolution` must be given, or `buckets` listed, as the teacher's own size is no square.")
    return int(side) * (scale if latents is not None else 1)
