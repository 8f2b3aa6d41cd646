"""What a config measures with: its feature network, and the distances and prompts that are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ddil_ray.config.groups import Evaluation
from ddil_ray.data import ImageData
from ddil_ray.errors import ConfigError
from ddil_ray.evaluation.clip import ClipScore, load_clip
from ddil_ray.evaluation.diversity import ImageDistance, load_lpips
from ddil_ray.evaluation.features import FeatureNetwork, load_features
from ddil_ray.evaluation.references import pictures_of
from ddil_ray.models import DiffusionModel

__all__ = ["Instruments", "check_instruments", "load_instruments"]


@dataclass(frozen=True)
class Instruments:
    """Networks that look at samples."""

    features: FeatureNetwork
    distance: ImageDistance | None = None
    clip: ClipScore | None = None
    prompts: Mapping[int, str] | None = None
    """By condition."""


def load_instruments(settings: Evaluation, data: ImageData) -> Instruments:
    """The instruments of `settings` for samples like `data`, which are pixels.

    Raises:
        ConfigError: one of them is not there or not installed, or there is not one prompt per class.
    """
    prompts = _prompts(settings, data)
    distance, clip = _asked_for(settings, prompts)
    features = load_features(settings.features, data, weights=settings.feature_weights)
    return Instruments(features, distance, clip, prompts)


def check_instruments(settings: Evaluation, data: ImageData, model: DiffusionModel) -> None:
    """Find at the start what `load_instruments` would refuse at the end; trains nothing.

    Args:
        settings: what to measure with.
        data: pixels, or latents of `model`.
        model: of what is measured.

    Raises:
        ConfigError: see `load_instruments`.
    """
    few = replace(data, images=data.images[:2], labels=data.labels[:2])
    _asked_for(settings, _prompts(settings, data if data.prompts is None else few))
    if settings.features != "auto":
        pictures = pictures_of(few, model.codec, model.sample_shape)
        load_features(settings.features, pictures, weights=settings.feature_weights)


def _prompts(settings: Evaluation, data: ImageData) -> Mapping[int, str] | None:
    """Prompts by condition: the data's own, or those given for its classes.

    Raises:
        ConfigError: prompts given for data that has its own, or not one per class; none where CLIP needs them.
    """
    if data.prompts is not None and settings.prompts is not None:
        raise ConfigError("`evaluation.prompts` must be left out for data of prompts, whose own are taken. Remove it.")
    if settings.prompts is not None and len(settings.prompts) != (data.num_classes or 0):
        raise ConfigError(
            f"`evaluation.prompts` must have one prompt per class id, {data.num_classes or 0} for {data.name}, but has "
            f"{len(settings.prompts)} instead."
        )
    texts = data.prompts.texts() if data.prompts is not None else ()
    prompts = {id_: texts[id_] for id_ in data.labels.unique().tolist()} if texts else None
    if settings.prompts is not None:
        prompts = dict(enumerate(settings.prompts))
    if settings.clip is not None and prompts is None:
        raise ConfigError(
            f"`evaluation.prompts` must be given, one per class id, where `evaluation.clip` is, but {data.name} has no "
            "prompts of its own either. Give them, or leave out `evaluation.clip`."
        )
    return prompts


def _asked_for(
    settings: Evaluation, prompts: Mapping[int, str] | None
) -> tuple[ImageDistance | None, ClipScore | None]:
    return (
        load_lpips(settings.lpips) if settings.lpips != "none" else None,
        load_clip(settings.clip, prompts) if settings.clip and prompts else None,
    )
