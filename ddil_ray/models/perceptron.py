"""A residual perceptron on 8 x 8 digits: the denoiser of the method benchmark and of the shipped ablations.

Not a family of its own: it is given as a factory, `ddil_ray.models.perceptron:digits_teacher`. An update takes
milliseconds on one core, so a grid of runs takes minutes.
"""

from __future__ import annotations

from importlib import resources

import torch
from safetensors.torch import load
from torch import Tensor, nn

from ddil_ray.diffusion.prediction import Prediction
from ddil_ray.diffusion.schedule import CosineVP
from ddil_ray.models.model import DiffusionModel
from ddil_ray.seeded import seeded

__all__ = ["digits_teacher", "new_model"]

WIDTH, BLOCKS, CLASSES = 128, 2, 10


class Block(nn.Module):
    """x + MLP(norm(x) + embedding)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inside, self.outside = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, WIDTH) from (B, WIDTH)."""
        changed: Tensor = self.outside(nn.functional.silu(self.inside(self.norm(x) + embedding)))
        return x + changed


class Perceptron(nn.Module):
    """175,000 parameters."""

    frequencies: Tensor
    """(32,) of the sinusoidal embedding of time."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 64)
        self.time = nn.Sequential(nn.Linear(64, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.classes = nn.Embedding(CLASSES + 1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, 6, 32)), persistent=False)

    def forward(self, x_t: Tensor, time: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        """Raw prediction (B, 1, 8, 8)."""
        angles = time[:, None] / 1000 * self.frequencies
        embedding = self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.classes(cond)
        hidden = self.enter(x_t.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, embedding)
        prediction: Tensor = self.leave(hidden).reshape(x_t.shape)
        return prediction


def new_model() -> DiffusionModel:
    """An untrained model, weights from a fixed seed."""
    with seeded(0):
        network = Perceptron()
    return DiffusionModel(
        network,
        Prediction.V,
        CosineVP(),
        (1, 8, 8),
        num_conditions=CLASSES + 1,
        null_cond=CLASSES,
        bottleneck=f"blocks.{BLOCKS - 1}",
    )


def digits_teacher() -> DiffusionModel:
    """The model trained for 8,000 updates of 128 digits, as `benchmarks/ddil.py` trains it; weights ship with us."""
    model = new_model()
    weights = resources.files("ddil_ray.presets") / "digits-perceptron" / "model.safetensors"
    model.network.load_state_dict(load(weights.read_bytes()))
    model.network.eval()
    return model
