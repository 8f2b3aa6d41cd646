"""The denoiser of the colour benchmark: a mixer of patches of 32 x 32 emoji, cosine schedule, v-prediction.

8 x 8 patches of 4 x 4 pixels are few and wide enough for a CPU: a batch of 64 takes about 20 ms on one core.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle, silu

from ddil_ray.diffusion.prediction import Prediction
from ddil_ray.diffusion.schedule import CosineVP
from ddil_ray.models.model import DiffusionModel

__all__ = ["new_model"]

CHANNELS, SIZE, CLASSES = 3, 32, 9
PATCH = 4
FINE, COARSE = 64, 192
"""Widths of the 8 x 8 and of the 4 x 4 tokens."""
EMBEDDING = 128


class AdaptiveNorm(nn.Module):
    """norm(x) (1 + scale) + shift, with scale and shift read from the embedding, both 0 at first.

    Source: Peebles and Xie 2023, arXiv:2212.09748, section 3.2 (adaLN-Zero, without its gate).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(EMBEDDING, 2 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, N, width) from the same and (B, EMBEDDING)."""
        scale, shift = self.modulation(embedding)[:, None].chunk(2, dim=2)
        normed: Tensor = self.norm(x) * (1 + scale) + shift
        return normed


class Mixer(nn.Module):
    """A perceptron over the tokens, then one over the channels, each on a residual branch.

    Source: Tolstikhin et al. 2021, arXiv:2105.01601, eq. 1, with adaptive norms.
    """

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.before_tokens, self.before_channels = AdaptiveNorm(width), AdaptiveNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, tokens), nn.SiLU(), nn.Linear(tokens, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, tokens, width) from the same and (B, EMBEDDING)."""
        x = x + self.tokens(self.before_tokens(x, embedding).mT).mT
        mixed: Tensor = x + self.channels(self.before_channels(x, embedding))
        return mixed


class Middle(nn.Module):
    """The mixers of the 4 x 4 tokens; its output (B, 16, COARSE) is the network's bottleneck."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        tokens = (SIZE // PATCH // 2) ** 2
        self.position = nn.Parameter(0.02 * torch.randn(tokens, COARSE))
        self.blocks = nn.ModuleList(Mixer(tokens, COARSE) for _ in range(blocks))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, 16, COARSE) from the same and (B, EMBEDDING)."""
        x = x + self.position
        for block in self.blocks:
            x = block(x, embedding)
        return x


def tokens_of(maps: Tensor, side: int) -> Tensor:
    """(B, N, C side^2) of maps (B, C, H, W): one token per square of `side` x `side` positions."""
    return pixel_unshuffle(maps, side).flatten(2).mT


def maps_of(tokens: Tensor, side: int) -> Tensor:
    """(B, C, H, W) of tokens (B, N, C side^2) that fill a square; the inverse of `tokens_of`."""
    across = math.isqrt(tokens.shape[1])
    return pixel_shuffle(tokens.mT.unflatten(2, (across, across)), side)


class PatchUNet(nn.Module):
    """Mixers on 8 x 8, 4 x 4 and again 8 x 8 tokens, with a skip between; about 770,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        tokens, pixels = (SIZE // PATCH) ** 2, CHANNELS * PATCH**2
        self.time = nn.Sequential(nn.Linear(64, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
        self.classes = nn.Embedding(CLASSES + 1, EMBEDDING)
        self.enter, self.position = nn.Linear(pixels, FINE), nn.Parameter(0.02 * torch.randn(tokens, FINE))
        self.first, self.middle, self.last = Mixer(tokens, FINE), Middle(), Mixer(tokens, FINE)
        self.coarser, self.finer = nn.Linear(4 * FINE, COARSE), nn.Linear(COARSE, 4 * FINE)
        self.join = nn.Linear(2 * FINE, FINE)
        self.before_leave, self.leave = AdaptiveNorm(FINE), nn.Linear(FINE, pixels)
        nn.init.zeros_(self.leave.weight)
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, 6, 32)), persistent=False)

    def forward(self, x_t: Tensor, time: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        """Raw prediction (B, 3, 32, 32)."""
        angles = time[:, None] / 1000 * self.frequencies
        embedding = silu(self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.classes(cond))
        fine = self.first(self.enter(tokens_of(x_t, PATCH)) + self.position, embedding)
        coarse = self.middle(self.coarser(tokens_of(maps_of(fine, 1), 2)), embedding)
        returned = tokens_of(maps_of(self.finer(coarse), 2), 1)
        fine = self.last(self.join(torch.cat([fine, returned], 2)), embedding)
        return maps_of(self.leave(self.before_leave(fine, embedding)), PATCH)


def new_model() -> DiffusionModel:
    """An untrained model, weights from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = PatchUNet()
    shape = (CHANNELS, SIZE, SIZE)
    return DiffusionModel(
        network,
        Prediction.V,
        CosineVP(),
        shape,
        num_conditions=CLASSES + 1,
        null_cond=CLASSES,
        bottleneck="middle",
    )
