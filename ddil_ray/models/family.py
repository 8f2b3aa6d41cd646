"""What a model family is: how pipelines of one kind become a `DiffusionModel`, and a student becomes a pipeline again.

To add a family: a module with a subclass of `Family` and a subclass of `FamilyNetwork`, and a row in
`ddil_ray.models.FAMILIES`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ddil_ray.diffusion.denoiser import guidance_scale_from_w
from ddil_ray.diffusion.prediction import Prediction
from ddil_ray.diffusion.schedule import NoiseSchedule
from ddil_ray.errors import ConfigError, first_line
from ddil_ray.models.latents import LatentCodec, load_codec, variant_of
from ddil_ray.prompts import Embeddings

if TYPE_CHECKING:
    from ddil_ray.models.model import DiffusionModel

__all__ = [
    "Family",
    "TextEncoder",
    "absent_components",
    "check_reads_latents",
    "checked_prediction",
    "load_component",
    "read_config",
    "unreadable",
]


_LEAST_SIGNAL = 1e-3
"""Least alpha(1) of schedules that epsilon prediction is distilled on: Stable Diffusion's is .068, DDPM's .006, but
that of squaredcos_cap_v2 is 5e-5."""


class TextEncoder(ABC):
    """The text encoders of a pipeline, as one: texts to the embeddings that the family's network reads."""

    @abstractmethod
    def __call__(self, prompts: Sequence[str]) -> Embeddings:
        """Embeddings (B, ...) of `prompts`, float32 on the CPU."""

    def negative(self, prompt: str | None) -> Embeddings:
        """Embeddings (1, ...) of the negative prompt; None is what the family's own pipeline takes for none."""
        return self([prompt or ""])


class Family(ABC):
    """One kind of pipeline."""

    name: ClassVar[str]
    """As messages and model cards call it."""
    component: ClassVar[str]
    """The pipeline's name of its denoiser: `unet` or `transformer`."""
    latent: ClassVar[bool] = True
    """Whether samples are latents of an autoencoder."""
    channels_per_sample: ClassVar[int] = 1
    """Channels that the denoiser reads for each of a sample's."""

    @property
    def prompted(self) -> bool:
        """Whether conditions are prompts: whether it has text encoders."""
        return type(self).text_encoder is not Family.text_encoder

    @abstractmethod
    def load(self, folder: Path) -> DiffusionModel:
        """The denoiser of the pipeline in `folder`, in eval mode on the CPU.

        Raises:
            ConfigError: it cannot be read, or cannot be distilled.
        """

    def codec(self, folder: Path) -> LatentCodec | None:
        """The autoencoder, None where samples are pixels."""
        return load_codec(folder) if self.latent else None

    def text_encoder(self, folder: Path, device: torch.device | str = "cpu") -> TextEncoder | None:
        """The text encoders on `device`, None where conditions are no texts."""
        return None

    def with_guidance_embedding(self, model: DiffusionModel) -> DiffusionModel:
        """`model` around a network that is also told w, and does not yet heed it.

        Raises:
            ConfigError: the family's network cannot be.
        """
        raise ConfigError(
            f"`objective.guidance_embedding` must be false for the {self.name} family, whose networks and pipelines "
            "have no place for it. Set `teacher.guidance` to one number."
        )

    def resized(self, model: DiffusionModel, size: tuple[int, int]) -> DiffusionModel:
        """`model` for samples (latents, where it has any) of another height and width.

        Raises:
            ConfigError: the family's network cannot make them.
        """
        return replace(model, sample_shape=(model.sample_shape[0], *size))

    def pipeline(self, model: DiffusionModel, scheduler: Any, *, w: float) -> Any:
        """The diffusers pipeline that samples `model` with `scheduler`; its other components are those of the teacher.

        Args:
            model: a student or teacher of this family.
            scheduler: of diffusers.
            w: guidance of a student that its pipeline cannot be told of.
        """
        from diffusers import DiffusionPipeline

        assert model.folder is not None
        parts = {self.component: self.plain(model.network, w), "scheduler": scheduler}
        absent, variant = absent_components(model.folder), variant_of(model.folder / self.component)
        return DiffusionPipeline.from_pretrained(model.folder, variant=variant, use_safetensors=True, **absent | parts)

    def example(self, model: DiffusionModel, *, times: Tensor) -> str:
        """Arguments of a call of the pipeline that samples a student, but for guidance, for the model card.

        Args:
            model: the student.
            times: (N + 1,) from 1 to 0, at which it samples.
        """
        return f'prompt="a photo", num_inference_steps={len(times) - 1}'

    def guidance_scale(self, model: DiffusionModel, w: float) -> float | None:
        """`guidance_scale` that the pipeline of a student at guidance `w` must be called with: 1 where w is in the
        weights already, None where it takes none."""
        return guidance_scale_from_w(w) if model.reads_guidance else 1.0

    @abstractmethod
    def plain(self, network: nn.Module, w: float) -> nn.Module:
        """The diffusers denoiser that computes what `network` computes, at guidance `w` where its pipeline cannot be
        told of it."""


def read_config(folder: Path, component: str) -> dict[str, Any]:
    """The config of a component of the pipeline in `folder`.

    Raises:
        ConfigError: not readable.
    """
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    try:
        config = json.loads((folder / component / name).read_text())
    except (OSError, ValueError) as error:
        raise unreadable(folder, error) from error
    if not isinstance(config, dict):
        raise unreadable(folder, TypeError(f"{component}/{name} holds no settings"))
    return config


def check_reads_latents(family: Family, folder: Path) -> None:
    """Check by their configs that the denoiser of a pipeline reads what its autoencoder makes.

    Raises:
        ConfigError: latents of another number of channels.
    """
    if not family.latent or not (folder / "vae" / "config.json").exists():
        return
    denoiser, vae = read_config(folder, family.component), read_config(folder, "vae")
    read, made = denoiser.get("in_channels"), vae.get("latent_channels")
    more = denoiser.get("out_channels") not in (None, read)  # reads or makes something else besides, see `Family.load`
    if not isinstance(read, int) or not isinstance(made, int) or more:
        return
    if read == made * family.channels_per_sample:
        return
    raise ConfigError(
        f"`teacher.model` must be a pipeline whose {family.component} reads what its autoencoder makes, latents of "
        f"{made} channels, but that of {folder} reads {read // family.channels_per_sample} instead. Save it with the "
        "autoencoder that it was trained with."
    )


def absent_components(folder: Path) -> dict[str, None]:
    """The components that the pipeline in `folder` was saved without; diffusers wants to be told of them again."""
    index = json.loads((folder / "model_index.json").read_text())
    return {name: None for name, entry in index.items() if isinstance(entry, list) and entry[0] is None}


def load_component(kind: Any, folder: Path, component: str) -> Any:
    """A network of diffusers class `kind` from the pipeline in `folder`, float32 and in eval mode.

    Raises:
        ConfigError: not readable.
    """
    place = folder / component
    try:
        network = kind.from_pretrained(
            place,
            low_cpu_mem_usage=False,
            variant=variant_of(place),
            torch_dtype=torch.float32,
            use_safetensors=True,  # never a pickle
        )
    except (OSError, ValueError) as error:
        raise unreadable(folder, error) from error
    return network.eval()


def unreadable(folder: Path, error: Exception) -> ConfigError:
    """What to raise where a component of the pipeline in `folder` cannot be read."""
    return ConfigError(
        f"`teacher.model` must be a readable diffusers pipeline folder, but {folder} failed to load: "
        f"{first_line(error)}. Save the pipeline again with `save_pretrained`."
    )


def checked_prediction(scheduler_config: dict[str, Any], schedule: NoiseSchedule) -> Prediction:
    """The prediction type of a scheduler config.

    Raises:
        ConfigError: epsilon prediction over a schedule with next to no signal at t = 1, where all sampling begins: x_0
            is not determined there, or errors of the network are multiplied by thousands (Lin et al. 2024,
            arXiv:2305.08891, section 3.1).
    """
    kind = scheduler_config.get("prediction_type", "epsilon")
    if kind not in {prediction.value for prediction in Prediction}:
        raise ConfigError(
            f"`prediction_type` of the teacher's scheduler must be one of {', '.join(p.value for p in Prediction)}, "
            f"but is {kind!r} instead. Use another teacher."
        )
    prediction = Prediction(kind)
    signal = float(schedule.alpha(torch.ones(1)))
    if prediction is Prediction.EPSILON and signal < _LEAST_SIGNAL:
        raise ConfigError(
            "`prediction_type` of a teacher with zero terminal SNR must be `v_prediction` or `sample`, but is "
            f"`epsilon` instead: at t = 1 the noise says nothing of the image, as alpha is {signal:.1g} there. Use "
            "another teacher, or one trained on a schedule that ends in some signal, as scaled_linear without "
            "`rescale_betas_zero_snr`."
        )
    return prediction
