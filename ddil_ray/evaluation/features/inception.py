"""Kind `inception`: the network of published Frechet distances, for users who have its package and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddil_ray.errors import ConfigError, first_line
from ddil_ray.evaluation.preprocess import to_three_channels

__all__ = ["INCEPTION_PIXELS", "load_inception"]

INCEPTION_PIXELS = 299
"""What the network itself resizes images to."""
_FEATURES = 2048


class _EightBit(nn.Module):
    """The network, fed as published scores were: 8-bit RGB."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        features: Tensor = self.network(to_three_channels(pixels))
        return features


def load_inception(weights: str | None) -> nn.Module:
    """InceptionV3 as torch-fidelity has it: (N, C, H, W) images in [-1, 1] to (N, 2048).

    Args:
        weights: its `pt_inception-2015-12-05` file; None lets torch-fidelity fetch it.

    Raises:
        ConfigError: the package or the weights are not there.

    Source: Heusel et al. 2017, arXiv:1706.08500; the "compat" network of the original TensorFlow scores.
    """
    if weights is not None and not Path(weights).is_file():
        raise ConfigError(
            f"`evaluation.feature_weights` must be a file, but is {weights!r} instead. Name the InceptionV3 weights of "
            "torch-fidelity (pt_inception-2015-12-05-6726825d.pth)."
        )
    from torchmetrics.image.fid import NoTrainInceptionV3

    settings: dict[str, Any] = {"name": "inception-v3-compat", "features_list": [str(_FEATURES)]}
    try:
        network = NoTrainInceptionV3(**settings, feature_extractor_weights_path=weights)
    except ModuleNotFoundError as error:
        raise ConfigError(
            "`evaluation.features` must be a network that is installed, but inception needs torch-fidelity, which is "
            "missing. Run `pip install torch-fidelity` (it brings torchvision), or choose auto, a folder or a factory."
        ) from error
    except Exception as error:  # a download or an unpickling, each with errors of its own
        raise ConfigError(
            f"`evaluation.feature_weights` must be the InceptionV3 weights of torch-fidelity, but {weights or 'none'} "
            f"could not be loaded or fetched: {first_line(error)}"
        ) from error
    return _EightBit(network)
