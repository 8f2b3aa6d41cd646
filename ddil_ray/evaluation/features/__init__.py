"""Feature networks. To add a kind: a module with a loader, and a branch in `load_features`.

Distances by `auto` compare samplers of one data set; they are no figures to publish: use `inception`, or the folder of
a CLIP or DINO model, for those. Data without classes and prompts gives `auto` random weights, and a name that says so.

| `evaluation.features` | module | network |
| --- | --- | --- |
| `auto` | `classifier` | trained on the spot to tell the data's classes, or the words of its prompts |
| `inception` | `inception` | InceptionV3 of published scores, through torchmetrics and torch-fidelity |
| `module.path:factory` | - | an nn.Module of the user's: (N, C, H, W) in [-1, 1] to (N, D) |
| a folder | `folder` | a transformers vision model |
"""

from __future__ import annotations

from torch import nn

from ddil_ray.data import ImageData
from ddil_ray.errors import ConfigError
from ddil_ray.evaluation.features.classifier import train_features
from ddil_ray.evaluation.features.network import FeatureNetwork, checked_network
from ddil_ray.factory import call_factory, is_factory

__all__ = ["FeatureNetwork", "load_features", "train_features"]


def load_features(spec: str, data: ImageData, *, weights: str | None = None) -> FeatureNetwork:
    """The network that `evaluation.features` names, tried on two images of `data`.

    Args:
        spec: see the table above.
        data: pixels, what `auto` trains on, and what others must accept.
        weights: file with the weights of `inception`.

    Raises:
        ConfigError: it is not there, not installed, or does not give rows of features.
    """
    if spec == "auto":
        return train_features(data)
    body, size = _load(spec, weights)
    return checked_network(body, origin=spec, size=size, data=data)


def _load(spec: str, weights: str | None) -> tuple[nn.Module, int | None]:
    if spec == "inception":
        from ddil_ray.evaluation.features.inception import INCEPTION_PIXELS, load_inception

        return load_inception(weights), INCEPTION_PIXELS
    if not is_factory(spec):
        from ddil_ray.evaluation.features.folder import load_folder

        return load_folder(spec)
    body = call_factory(spec, field="evaluation.features")
    if not isinstance(body, nn.Module):
        raise ConfigError(
            f"`evaluation.features` factory {spec!r} must return a torch.nn.Module, but returned "
            f"{type(body).__name__} instead."
        )
    return body, None
