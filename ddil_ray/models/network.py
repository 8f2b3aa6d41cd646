"""What the network wrappers of all families share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ddil_ray.prompts import Embeddings, PromptBank

__all__ = ["FamilyNetwork", "sinusoid"]


def sinusoid(w: Tensor, channels: int) -> Tensor:
    """(B, channels) embedding of guidance `w` (B,): sines, then cosines, of 1000 w over geometric frequencies.

    Source: Meng et al. 2023, arXiv:2210.03142, section 3.1; the values are those of diffusers' LCM pipelines.
    """
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=w.device))
    angles = 1000 * w[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class FamilyNetwork(nn.Module):
    """A denoiser of diffusers with this library's network signature; a family's subclass writes `forward`.

    Args:
        denoiser: the diffusers network; used, not copied.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.bank: PromptBank | None = None
        """Where a text-conditioned network finds the embeddings of the prompt ids it gets; shared by its copies."""

    def embeddings(self, cond: Tensor, x_t: Tensor) -> Embeddings:
        """Embeddings (B, ...) of the prompt ids `cond` (B,), with device and dtype of `x_t`."""
        assert self.bank is not None, "a text-conditioned model must be given its prompts, see `DiffusionModel.bind`"
        return self.bank(cond, x_t)

    def forward(self, x_t: Tensor, time: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        """Raw prediction shaped as `x_t` (B, C, H, W), at network times `time` (B,), `cond` (B,) and `w` (B,)."""
        raise NotImplementedError
