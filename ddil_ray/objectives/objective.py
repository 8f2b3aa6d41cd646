"""What a distillation method is, seen from outside: phases, an expert label, a loss.

The trainer, the rollouts and the runtime know methods only through `Objective`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ddil_ray.diffusion.denoiser import Denoiser, NetworkDenoiser
from ddil_ray.states.batch import StateBatch
from ddil_ray.states.source import Phase

__all__ = ["LossOutput", "Objective"]


@dataclass(frozen=True)
class LossOutput:
    """A scalar loss to minimise, the loss of every row for bookkeeping, and further metrics."""

    loss: Tensor
    per_row: Tensor
    """(B,) detached."""
    metrics: dict[str, float]


class Objective(Protocol):
    """One distillation method. It owns its time grids and whatever it learns besides the student."""

    phases: tuple[Phase, ...]
    """In order of training; each starts from the student of the one before."""
    student_becomes_teacher: bool
    """Whether each phase after the first is taught by the student of the one before, without guidance."""
    fixed_steps: bool
    """Whether a student samples well only with the number of steps that its phase was trained for."""

    def sampling_times(self, steps: int) -> Tensor:
        """(steps + 1,) times from 1 to 0 at which a student of this method samples."""

    def student_denoiser(self, network: NetworkDenoiser) -> Denoiser:
        """The student as this method parameterises it."""

    def label(self, teacher: Denoiser, states: StateBatch, phase: Phase) -> Tensor:
        """The expert's answer (B, ...) at `states`, made beside the states and shipped with them."""

    def start(self, student: nn.Module, phase: Phase) -> None:
        """Called in the trainer before the first step of every phase."""

    def loss(self, student: NetworkDenoiser, batch: StateBatch, phase: Phase) -> LossOutput:
        """The loss on labelled states of any origin; never reads clean data."""

    def after_update(self, student: nn.Module) -> None:
        """Called after every optimizer step."""

    def state_dict(self) -> dict[str, Any]:
        """What the method itself learns or averages."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; `start` has been called."""
