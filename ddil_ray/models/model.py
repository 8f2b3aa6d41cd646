"""A diffusion model as distillation sees it: a network with its parameterisation, schedule and conditions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ddil_ray.diffusion.denoiser import Denoiser, Guided, NetworkDenoiser, Rescale, Thresholded
from ddil_ray.diffusion.prediction import Prediction
from ddil_ray.diffusion.schedule import NoiseSchedule
from ddil_ray.diffusion.threshold import NoThreshold, Threshold
from ddil_ray.errors import ConfigError
from ddil_ray.models.latents import LatentCodec
from ddil_ray.prompts import HeldEmbeddings, PromptBank, Prompts
from ddil_ray.trained import copy_network

if TYPE_CHECKING:
    from ddil_ray.models.family import Family, TextEncoder

__all__ = ["DiffusionModel"]


@dataclass
class DiffusionModel:
    """A network of any family, ready to be a teacher or a student."""

    network: nn.Module
    """`network(x_t (B, C, H, W), network_time (B,), cond (B,), w (B,))` gives a raw prediction shaped as x_t."""
    prediction: Prediction
    schedule: NoiseSchedule
    sample_shape: tuple[int, ...]
    """(C, H, W) of one sample."""
    num_conditions: int | None = None
    """Number of class ids, the unconditional one included; None where conditions are no classes."""
    null_cond: int | None = None
    """Id of the unconditional embedding, that of the negative prompt; None where there is none to guide with."""
    prompted: bool = False
    """Whether conditions are prompt ids; the network then needs a bank, see `bind`."""
    reads_guidance: bool = False
    """Whether the network is told w, and guides itself in one pass."""
    guidance_rescale: float = 0.0
    """Share of `Rescale` where the model is guided."""
    bottleneck: str | None = None
    """Name of the network's submodule with its most condensed features (which a discriminator reads), if known."""
    family: Family | None = None
    """What it was loaded as; None for models from a factory."""
    folder: Path | None = None
    """The pipeline it was loaded from, where its other components lie."""
    scheduler_config: dict[str, Any] = field(default_factory=dict)
    """The diffusers scheduler config that `schedule` was read from; empty for models from a factory."""

    @property
    def latent(self) -> bool:
        """Whether samples are latents of an autoencoder."""
        return self.family is not None and self.family.latent

    @property
    def classes(self) -> int | None:
        """Number of class ids, without the unconditional one; None where conditions are no classes."""
        if self.prompted:
            return None
        return self.num_conditions if self.null_cond is None else self.null_cond

    @cached_property
    def codec(self) -> LatentCodec | None:
        """What makes latents of images and images of latents; None where samples are pixels."""
        if self.family is None or self.folder is None:
            return None
        return self.family.codec(self.folder)

    def with_network(self, network: nn.Module) -> DiffusionModel:
        """The same model around another network."""
        return replace(self, network=network)

    def resized(self, size: tuple[int, int]) -> DiffusionModel:
        """The same model for samples of another height and width.

        Raises:
            ConfigError: it cannot make them.
        """
        if self.family is None:
            raise ConfigError(
                "`teacher.sample_size` must be left out for a teacher given as a factory, but is "
                f"{list(size)} instead. Let the factory choose."
            )
        return self.family.resized(self, size)

    def copy(self) -> DiffusionModel:
        """The same model with trained weights of its own; what adapters sit on is shared."""
        return self.with_network(copy_network(self.network))

    def bind(self, bank: PromptBank | None) -> None:
        """Let the network, and every later copy of it, find embeddings of prompt ids in `bank`."""
        if bank is not None:
            network: Any = self.network
            network.bank = bank

    def text_encoder(self, device: torch.device | str = "cpu") -> TextEncoder:
        """The text encoders of a prompted model, loaded onto `device` from its folder."""
        assert self.family is not None
        assert self.folder is not None
        encoder = self.family.text_encoder(self.folder, device)
        assert encoder is not None
        return encoder

    def ask(self, prompts: Sequence[str], negative: str | None = None, *, encoder: TextEncoder | None = None) -> None:
        """Let the network find embeddings of `prompts`, made now by the model's own text encoders, by their places.

        Args:
            prompts: conditions 0, 1, ...
            negative: the negative prompt; None is what the family's own pipeline takes for none.
            encoder: what `text_encoder` gave, where it is kept; else it is loaded for this.
        """
        encoder = encoder or self.text_encoder()
        self.bind(Prompts(HeldEmbeddings(encoder(prompts), prompts), encoder.negative(negative)).bank())

    def denoiser(self, *, autocast: torch.dtype | None = None) -> NetworkDenoiser:
        """The network as x_0 estimator, neither guided nor thresholded."""
        return NetworkDenoiser(self.network, self.prediction, self.schedule, autocast)

    def expert(
        self,
        *,
        guided: bool,
        threshold: Threshold | None = None,
        autocast: torch.dtype | None = None,
    ) -> Denoiser:
        """The network as a teacher: guided where the condition's w is not 0, then thresholded."""
        denoiser: Denoiser = self.denoiser(autocast=autocast)
        if guided and self.null_cond is not None and not self.reads_guidance:
            phi = self.guidance_rescale
            denoiser = Guided(
                denoiser, self.null_cond, Rescale(phi, self.prediction, self.schedule) if phi > 0 else None
            )
        if threshold is None or isinstance(threshold, NoThreshold):
            return denoiser
        return Thresholded(denoiser, threshold)
