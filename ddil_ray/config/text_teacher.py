"""The config of `ddil-ray train-teacher` for a small latent text-to-image teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, StrictInt, model_validator

from ddil_ray.config.kinds import Count, Depth, Fraction, Group, NonNegative, Positive, Seed, Side, Width
from ddil_ray.config.load import ConfigTree
from ddil_ray.config.places import Place
from ddil_ray.config.prepare import PrepareData
from ddil_ray.config.teacher import Fit, Schedule, TeacherConfig, TeacherTrainer, check_at_most_last

__all__ = ["Autoencoder", "Text", "TextTeacherConfig", "TextTeacherNetwork", "load_teacher_config", "teacher_config"]


class Autoencoder(Fit):
    """The `AutoencoderKL`, and its training, which comes first."""

    batch_size: Count = 32
    lr: Positive = 3e-3
    block_out_channels: tuple[Width, ...] = Field(
        (16, 32, 64), min_length=1, description="each after the first halves the images"
    )
    layers_per_block: Depth = 1
    latent_channels: Width = 8
    norm_num_groups: Width = 8
    kl_weight: NonNegative = Field(1e-3, description="of the divergence per latent value, beside the error per pixel")


class Text(Group):
    """The `CLIPTextModel`, trained with the denoiser, and its tokenizer, made of the captions."""

    vocabulary: Annotated[StrictInt, Field(ge=512, le=1_000_000)] = Field(
        4096, description="most tokens; frequent words are one"
    )
    length: Width = Field(24, description="tokens of a prompt, longer ones are cut")
    width: Width = 64
    layers: Depth = 2
    heads: Width = 4
    word_dropout: Fraction = Field(0.1, description="chance of a caption to lose words, each word's is a half then")

    @model_validator(mode="after")
    def _divides(self) -> Text:
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, {self.heads}, but is {self.width}")
        return self


class TextTeacherNetwork(Group):
    """The denoiser, a `UNet2DConditionModel` with cross-attention at its lowest resolution."""

    block_out_channels: tuple[Width, ...] = Field((64, 128), min_length=1)
    layers_per_block: Depth = 1
    attention_heads: Width = 4
    norm_num_groups: Width = 8

    @model_validator(mode="after")
    def _fills_heads(self) -> TextTeacherNetwork:
        check_at_most_last("attention_heads", self.attention_heads, self.block_out_channels)
        return self


class TextTeacherConfig(Group):
    """What `ddil-ray train-teacher` reads where `kind` is text-to-image."""

    kind: Literal["text-to-image"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    output: Place = "runs"
    seed: Seed = 0
    image_size: Side = Field(32, description="crop and resize to this many pixels")
    data: PrepareData
    autoencoder: Autoencoder = Autoencoder()
    text: Text = Text()
    model: TextTeacherNetwork = TextTeacherNetwork()
    schedule: Schedule = Schedule()
    trainer: TeacherTrainer = TeacherTrainer()


def load_teacher_config(source: str, overrides: Sequence[str] = ()) -> TeacherConfig | TextTeacherConfig:
    """The validated config of a teacher, of the class that its `kind` names; see `load_config`.

    Raises:
        ConfigError: unreadable, or invalid.
    """
    tree = ConfigTree.read(source)
    for override in overrides:
        tree.set(override)
    return teacher_config(tree)


def teacher_config(tree: ConfigTree) -> TeacherConfig | TextTeacherConfig:
    """The config of a teacher, of the class that its `kind` names.

    Raises:
        ConfigError: invalid.
    """
    if tree.settings.get("kind") == "text-to-image":
        return tree.validate(TextTeacherConfig)
    return tree.validate(TeacherConfig)
