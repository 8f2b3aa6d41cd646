"""The groups of the distillation methods, one per `type`."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ddil_ray.config.kinds import Count, Fraction, Group, NonNegative, Positive, Steps

__all__ = ["Dmd2", "Lcm", "Objective", "Pd"]


class Pd(Group):
    """Progressive distillation."""

    type: Literal["pd"]
    teacher_steps: Steps = Field(16, description="DDIM steps of the first round's teacher")
    student_steps: tuple[Steps, ...] = Field((8, 4, 2, 1), min_length=1, description="steps per round")
    loss: Literal["snr_trunc", "v", "x"] = "snr_trunc"

    def serves(self, steps: int) -> bool:
        """Whether some round's student samples with `steps` steps."""
        return steps in self.student_steps

    @model_validator(mode="after")
    def _grids_divide(self) -> Pd:
        grids = [self.teacher_steps, *self.student_steps]
        for before, after in itertools.pairwise(grids):
            if after >= before or before % after:
                raise ValueError(
                    f"student_steps must each divide the steps before them and be fewer, but {after} follows "
                    f"{before}; use for example teacher_steps 16 and student_steps [8, 4, 2, 1]"
                )
        return self


class Lcm(Group):
    """Latent consistency distillation."""

    type: Literal["lcm"]
    solver_steps: Steps = Field(50, description="DDIM grid of the labels")
    student_steps: Steps = Field(4, description="stages of the student's own rollouts")
    skip: Steps = Field(1, description="grid steps between a state and its label")
    loss: Literal["huber", "l2"] = "huber"
    huber_c: Positive = 1e-3
    ema_decay: Fraction = Field(0.95, description="of the target network, per update")
    sigma_data: Positive = 0.5
    timestep_scaling: Positive = 10.0
    guidance_embedding: bool = Field(False, description="tell the student w; needed for a range of guidance")

    def serves(self, steps: int) -> bool:
        """Whether the student samples with `steps` steps."""
        return steps <= self.solver_steps

    @model_validator(mode="after")
    def _within_grid(self) -> Lcm:
        for name in ("student_steps", "skip"):
            if getattr(self, name) > self.solver_steps:
                raise ValueError(
                    f"{name} must be at most solver_steps ({self.solver_steps}), but is {getattr(self, name)}"
                )
        return self


class Dmd2(Group):
    """Distribution matching distillation (DMD2)."""

    type: Literal["dmd2"]
    student_steps: Steps = Field(4, description="steps of the student; 1 is one-step distillation")
    student_every: Count = Field(5, description="steps of the critic per update of the student")
    time_range: tuple[Fraction, Fraction] = Field((0.02, 0.98), description="t at which the scores are compared")
    critic_lr: Positive | None = Field(None, description="peak learning rate of the critic; default: trainer.lr")
    gan_weight: NonNegative = Field(1e-3, description="of the student's adversarial loss; 0: no discriminator")
    critic_gan_weight: NonNegative = Field(1e-2, description="of the discriminator's loss")
    gan_layer: str | None = Field(
        None, description="submodule whose output the discriminator reads; default: the family's bottleneck"
    )

    def serves(self, steps: int) -> bool:
        """Whether the student samples with `steps` steps."""
        return steps <= self.student_steps

    @model_validator(mode="after")
    def _ordered(self) -> Dmd2:
        if self.time_range[0] >= self.time_range[1]:
            raise ValueError(f"time_range must be [low, high] with low < high, but is {list(self.time_range)}")
        return self


Objective = Annotated[Pd | Lcm | Dmd2, Field(discriminator="type")]
