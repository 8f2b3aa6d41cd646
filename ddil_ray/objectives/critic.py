"""A network that judges samples: a score network, and a discriminator on the features inside it.

Source: Yin et al. 2024, arXiv:2405.14867, sections 4.2 and 4.3: the fake score with a head on its bottleneck. The shape
of the head for features that are not 8 x 8 or larger, and stopping at the layer that is read, are this project's own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ddil_ray.seeded import seeded

__all__ = ["Critic", "DiscriminatorHead"]

_SMALLEST = 4
"""Side to which a head brings feature maps before it sums them up."""


class _ReachedError(Exception):
    """Raised from inside a forward pass once the features are there: what comes after would be thrown away."""


class DiscriminatorHead(nn.Module):
    """One logit from features (B, C, H, W), (B, N, C) tokens or (B, C).

    Maps: 4 x 4 convolutions of stride 2 with group norm and SiLU down to 4 x 4 (none where they are that small), one
    convolution over what is left, then 1 x 1. Tokens: the same as a perceptron per token, averaged.

    Args:
        shape: of one row's features, without the batch axis.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.maps = len(shape) == 3
        if not self.maps:
            width = shape[-1]
            self.layers = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, 1))
            return
        channels, side = shape[0], min(shape[1:])
        halvings = max(0, int(math.log2(max(side, 1) / _SMALLEST)))
        blocks: list[nn.Module] = []
        for _ in range(halvings):
            blocks += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), _norm(channels), nn.SiLU()]
        left = min(side // 2**halvings, _SMALLEST)
        blocks += [nn.Conv2d(channels, channels, left), _norm(channels), nn.SiLU(), nn.Conv2d(channels, 1, 1)]
        self.layers = nn.Sequential(*blocks)

    def forward(self, features: Tensor) -> Tensor:
        """(B,) logits: above 0 says real."""
        logits: Tensor = self.layers(features if self.maps else features.reshape(len(features), -1, features.shape[-1]))
        return logits.flatten(1).mean(1)


def _norm(channels: int) -> nn.GroupNorm:
    """Up to 32 groups of at least 8 channels: over a single position, groups of one would be zeros."""
    return nn.GroupNorm(math.gcd(max(1, channels // 8), 32) if channels % 8 == 0 else 1, channels)


class Critic(nn.Module):
    """A score network of the usual signature; with `layer`, also a discriminator that reads that submodule's output.

    Args:
        network: `network(x_t, time, cond, w)`; used, not copied.
        layer: dotted name of a submodule of `network`, or None for no discriminator.
        example: (x_t, time, cond, w) of one row, from which the features' shape is read; needed with `layer`.
        ends_early: whether an exception may end a pass of `network`.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        layer: str | None,
        example: tuple[Tensor, ...] | None = None,
        ends_early: bool = True,
    ) -> None:
        super().__init__()
        self.network, self.ends_early = network, ends_early
        self.head: nn.Module | None = None
        self._features: Tensor | None = None
        self._stop = False
        if layer is not None:
            assert example is not None
            network.get_submodule(layer).register_forward_hook(self._keep)
            with torch.no_grad(), seeded(0):  # the same head on every rank
                network(*example)
                self.head = DiscriminatorHead(tuple(self._taken().shape[1:])).to(example[0].device)

    def forward(
        self, x_t: Tensor, time: Tensor, cond: Tensor, w: Tensor, judged: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Raw prediction of all rows but the last `judged`, and (B,) logits where there is a discriminator.

        The pass of the last rows ends at the layer that is read, where it may: there is no more to know of them.
        """
        rows, whole = (x_t, time, cond, w), len(x_t) - judged
        prediction: Tensor
        if self.head is None:
            prediction = self.network(*rows)
            return prediction, None
        if judged == 0 or not self.ends_early:
            prediction = self.network(*rows)[:whole]
            return prediction, self.head(self._taken())
        prediction = self.network(*(part[:whole] for part in rows))
        features = torch.cat([self._taken(), self._features_of(*(part[whole:] for part in rows))])
        return prediction, self.head(features)

    def logits(self, x_t: Tensor, time: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        """(B,) logits alone, from a pass that ends at the layer which is read, where it may."""
        assert self.head is not None
        if not self.ends_early:
            prediction, seen = self.forward(x_t, time, cond, w)
            assert seen is not None
            return seen + 0 * prediction.mean()  # what is gathered for the way back hangs on it
        logits: Tensor = self.head(self._features_of(x_t, time, cond, w))
        return logits

    def _features_of(self, *rows: Tensor) -> Tensor:
        """What the discriminator reads, from a pass that ends there."""
        self._stop = True
        try:
            self.network(*rows)
        except _ReachedError:
            pass
        finally:
            self._stop = False
        return self._taken()

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._features = output[0] if isinstance(output, tuple) else output
        if self._stop:
            raise _ReachedError

    def _taken(self) -> Tensor:
        """The features of the last pass, which are then let go."""
        features, self._features = self._features, None
        assert features is not None
        return features
