"""What a config measures with: its feature network, and the distances and prompts that are asked for."""

from __future__ import annotations

from dataclasses import dataclass

from ddil_ray.config.groups import Evaluation
from ddil_ray.data import ImageData
from ddil_ray.errors import ConfigError
from ddil_ray.evaluation.clip import ClipScore, load_clip
from ddil_ray.evaluation.diversity import ImageDistance, load_lpips
from ddil_ray.evaluation.features import FeatureNetwork, load_features

__all__ = ["Instruments", "check_instruments", "load_instruments"]


@dataclass(frozen=True)
class Instruments:
    """Networks that look at samples."""

    features: FeatureNetwork
    distance: ImageDistance | None = None
    clip: ClipScore | None = None
    prompts: tuple[str, ...] | None = None


def load_instruments(settings: Evaluation, data: ImageData) -> Instruments:
    """The instruments of `settings` for samples like `data`.

    Raises:
        ConfigError: one of them is not there or not installed, or there is not one prompt per class.
    """
    distance, clip = _asked_for(settings, data)
    features = load_features(settings.features, data, weights=settings.feature_weights)
    return Instruments(features, distance, clip, settings.prompts)


def check_instruments(settings: Evaluation, data: ImageData) -> None:
    """Find at the start what `load_instruments` would refuse at the end; trains nothing.

    Raises:
        ConfigError: see `load_instruments`.
    """
    _asked_for(settings, data)
    if settings.features != "auto":
        load_features(settings.features, data, weights=settings.feature_weights)


def _asked_for(settings: Evaluation, data: ImageData) -> tuple[ImageDistance | None, ClipScore | None]:
    if settings.prompts is not None and len(settings.prompts) != (data.num_classes or 0):
        raise ConfigError(
            f"`evaluation.prompts` must have one prompt per class id, {data.num_classes or 0} for {data.name}, but has "
            f"{len(settings.prompts)} instead."
        )
    return (
        load_lpips(settings.lpips) if settings.lpips != "none" else None,
        load_clip(settings.clip, settings.prompts) if settings.clip and settings.prompts else None,
    )
