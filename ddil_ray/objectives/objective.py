"""What a distillation method is, seen from outside: phases, an expert label, a loss.

The trainer, the rollouts and the runtime know methods only through `Objective`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ddil_ray.diffusion.denoiser import Denoiser, NetworkDenoiser
from ddil_ray.states.batch import StateBatch
from ddil_ray.states.source import Phase

__all__ = ["LossOutput", "Metrics", "Objective", "Parallel", "RealData", "spread"]


class Parallel(Protocol):
    """How networks are spread over the processes that train together."""

    ends_early: bool
    """Whether an exception may end a pass of a wrapped network."""
    dtype: torch.dtype | None
    """Of weights while a network is called, which is then to be under autocast; None for their own."""

    def wrap(self, network: nn.Module) -> nn.Module:
        """`network` made to be trained by all processes together; to be called in its place."""

    def twin(self, network: nn.Module) -> nn.Module:
        """A copy of the student's network, kept as that is, with trained weights of its own; not wrapped yet."""


Metrics = dict[str, float | Tensor]
"""Numbers by name; tensors are scalars on the device, so that no step waits for them."""


def spread(x: Tensor) -> Tensor:
    """Standard deviation over the rows of `x` (B, ...), mean over the rest; 0 of one row. Scalar, without gradient.

    Written out: torch's own `std` over the first axis takes 20 times as long on a CPU.
    """
    x = x.detach()
    return (x - x.mean(0)).square().sum(0).div(max(1, len(x) - 1)).sqrt().mean()


@dataclass(frozen=True)
class LossOutput:
    """What is minimised on one batch, the student's loss of every row for bookkeeping, and further metrics."""

    loss: Tensor | None
    """Scalar for the student; None where it rests."""
    per_row: Tensor | None
    """(B,) detached; None where the student rests."""
    metrics: Metrics
    critic_loss: Tensor | None = None
    """Scalar for `Objective.critic`; its gradient must not reach the student, nor `loss` the critic."""


@dataclass(frozen=True)
class RealData:
    """Clean samples with their own conditions."""

    images: Tensor
    """(N, ...) float32, on the CPU."""
    cond: Tensor
    """(N,) int64."""

    def draw(self, rows: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """(x_0, cond) of `rows` rows drawn with replacement."""
        chosen = torch.randint(len(self.images), (rows,), generator=generator)
        return self.images[chosen], self.cond[chosen]


class Objective(Protocol):
    """One distillation method. It owns its time grids and whatever it learns besides the student."""

    phases: tuple[Phase, ...]
    """In order of training; each starts from the student of the one before."""
    student_becomes_teacher: bool
    """Whether each phase after the first is taught by the student of the one before, without guidance."""
    fixed_steps: bool
    """Whether a student samples well only with the number of steps that its phase was trained for."""
    most_steps: int | None
    """Steps that a student can sample with at most; None for no limit."""
    asks_in_trainer: bool
    """Whether the expert is asked in the trainer, about what the student says there; it is then given by `equip`."""
    critic: nn.Module | None
    """What learns beside the student by a loss and an optimizer of its own; made by `start`."""
    critic_lr: float | None
    """Peak learning rate of the critic; None for the student's."""
    lcm_scheduler: dict[str, Any] | None
    """Settings of the diffusers LCMScheduler that samples a student as this method does; None for DDIM, trailing."""

    def sampling_times(self, steps: int) -> Tensor:
        """(steps + 1,) times from 1 to 0 at which a student of this method samples."""

    def student_denoiser(self, network: NetworkDenoiser) -> Denoiser:
        """The student as this method parameterises it."""

    def label(self, teacher: Denoiser, states: StateBatch, phase: Phase) -> Tensor:
        """The expert's answer (B, ...) at `states`, made beside the states and shipped with them."""

    def equip(self, expert: Denoiser, data: RealData) -> None:
        """Called in the trainer before the first `start` where `asks_in_trainer`."""

    def start(self, student: nn.Module, phase: Phase, parallel: Parallel) -> None:
        """Called in the trainer before the first step of every phase."""

    def loss(
        self, student: NetworkDenoiser, batch: StateBatch, phase: Phase, generator: torch.Generator | None = None
    ) -> LossOutput:
        """The loss on labelled states of any origin; `generator` (CPU) is the source of all its noise."""

    def after_update(self, student: nn.Module) -> None:
        """Called after every update of the student, the critic or both."""

    def state_dict(self) -> dict[str, Any]:
        """What the method itself learns or averages."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; `start` has been called."""
