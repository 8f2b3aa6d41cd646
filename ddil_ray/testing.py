"""Teachers that are known exactly, and a tiny network: for tests, and for trying things out in a notebook."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddil_ray.diffusion.prediction import Prediction
from ddil_ray.diffusion.schedule import CosineVP, NoiseSchedule, levels
from ddil_ray.models.model import DiffusionModel
from ddil_ray.seeded import seeded

__all__ = ["GaussianDenoiser", "MixtureDenoiser", "TinyNetwork", "tiny_model"]


@dataclass(frozen=True)
class GaussianDenoiser:
    """The exact posterior mean for data N(mean, std^2 I), with its exact probability flow.

    D = mean + alpha std^2 / V (x - alpha mean), V = alpha^2 std^2 + sigma^2.
    """

    schedule: NoiseSchedule
    mean: float = 0.7
    std: float = 0.4

    def _variance(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = levels(self.schedule, t, x)
        return alpha, alpha**2 * self.std**2 + sigma**2

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        """E[x_0 | x_t]."""
        alpha, variance = self._variance(t, x_t)
        return (self.mean + alpha * self.std**2 / variance * (x_t.double() - alpha * self.mean)).to(x_t.dtype)

    def flow(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Where the probability flow takes `x_t` from `t` to `s`."""
        alpha_t, variance_t = self._variance(t, x_t)
        alpha_s, variance_s = self._variance(s, x_t)
        moved = alpha_s * self.mean + (variance_s / variance_t).sqrt() * (x_t.double() - alpha_t * self.mean)
        return moved.to(x_t.dtype)


@dataclass(frozen=True)
class MixtureDenoiser:
    """The exact posterior mean for an equal mixture of N(means[k], std^2 I) over rows of `means` (K, D)."""

    schedule: NoiseSchedule
    means: Tensor
    std: float = 0.1

    def log_prob(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log p_t(x_t) (B,) up to a constant."""
        return torch.logsumexp(self._log_weights(x_t, t), dim=1)

    def _log_weights(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = levels(self.schedule, t, x_t)
        variance = alpha**2 * self.std**2 + sigma**2
        squares = (x_t[:, None] - alpha[:, None] * self.means).square().sum(-1)
        return -squares / (2 * variance) - x_t.shape[1] / 2 * variance.log()

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        """E[x_0 | x_t]."""
        alpha, sigma = levels(self.schedule, t, x_t)
        gain = (alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2))[:, None]
        x = x_t.double()
        each = self.means + gain * (x[:, None] - alpha[:, None] * self.means)
        weights = torch.softmax(self._log_weights(x, t), dim=1)
        return (weights[..., None] * each).sum(1).to(x_t.dtype)


class TinyNetwork(nn.Module):
    """A perceptron over flattened images, time and class; 1,000 times smaller than anything useful."""

    def __init__(self, shape: tuple[int, ...], conditions: int, width: int = 32) -> None:
        super().__init__()
        size = torch.Size(shape).numel()
        self.embedding = nn.Embedding(conditions, width)
        self.inside = nn.Linear(size + 1, width)
        self.outside = nn.Linear(width, size)

    def forward(self, x_t: Tensor, time: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        """Raw prediction shaped as `x_t`."""
        features = torch.cat([x_t.flatten(1), time[:, None] / 1000], dim=1)
        hidden = torch.tanh(self.inside(features) + self.embedding(cond))
        prediction: Tensor = self.outside(hidden).reshape(x_t.shape)
        return prediction


def tiny_model() -> DiffusionModel:
    """A class-conditional model of 8 x 8 digits with fixed random weights; give it as `ddil_ray.testing:tiny_model`."""
    with seeded(0):
        network = TinyNetwork((1, 8, 8), conditions=11)
    return DiffusionModel(network, Prediction.V, CosineVP(), (1, 8, 8), num_conditions=11, null_cond=10)
