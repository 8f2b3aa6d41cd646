"""The config of `ddil-ray train-teacher`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, StrictInt, model_validator

from ddil_ray.config.groups import Data
from ddil_ray.config.kinds import Count, Depth, Fraction, Group, NonNegative, Positive, Seed, Width
from ddil_ray.config.places import Place

__all__ = ["Fit", "Schedule", "TeacherConfig", "TeacherTrainer", "check_at_most_last"]


def check_at_most_last(name: str, number: int, channels: Sequence[int]) -> None:
    """Check a setting of attention, which is where channels are the last.

    Raises:
        ValueError: more than these.
    """
    if number > channels[-1]:
        raise ValueError(f"{name} must be at most the last of block_out_channels, {channels[-1]}, but is {number}")


class Network(Group):
    """A `UNet2DModel`."""

    block_out_channels: tuple[Width, ...] = Field((32, 64), min_length=1)
    layers_per_block: Depth = 1
    attention_head_dim: Width = 8
    norm_num_groups: Width = 8

    @model_validator(mode="after")
    def _has_a_head(self) -> Network:
        check_at_most_last("attention_head_dim", self.attention_head_dim, self.block_out_channels)
        return self


class Schedule(Group):
    """The noise schedule, in the terms of diffusers' schedulers."""

    num_train_timesteps: Annotated[StrictInt, Field(ge=2, le=100_000)] = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "v_prediction"
    rescale_betas_zero_snr: bool = True

    @model_validator(mode="after")
    def _determines_x0(self) -> Schedule:
        if self.prediction_type == "epsilon" and self.rescale_betas_zero_snr:
            raise ValueError(
                "prediction_type must be v_prediction or sample where rescale_betas_zero_snr is true, as at t = 1 the "
                "noise says nothing of the image, but is epsilon"
            )
        if self.prediction_type == "epsilon" and self.beta_schedule == "squaredcos_cap_v2":
            raise ValueError(
                "prediction_type must be v_prediction or sample where beta_schedule is squaredcos_cap_v2, which leaves "
                "next to no image at t = 1, but is epsilon"
            )
        return self


class Fit(Group):
    """How a network is fitted."""

    steps: Count = 3000
    batch_size: Count = 128
    lr: Positive = 2e-3
    weight_decay: NonNegative = 0.0
    ema_decay: Fraction = 0.998


class TeacherTrainer(Fit):
    """The optimisation."""

    label_dropout: Fraction = Field(0.1, description="chance of training a row unconditionally")


class TeacherConfig(Group):
    """Everything `ddil-ray train-teacher` reads."""

    kind: Literal["image"] = Field("image", description="of pixels, and of classes where the data has some; see below")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    output: Place = "runs"
    seed: Seed = 0
    data: Data
    model: Network = Network()
    schedule: Schedule = Schedule()
    trainer: TeacherTrainer = TeacherTrainer()
