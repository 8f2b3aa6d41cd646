"""Progressive distillation: in each round a student of N steps learns the teacher's 2N (or more) DDIM steps.

Source: Salimans and Ho 2022, arXiv:2202.00512, algorithm 2; with states from any source (DDIL) and the target as the
rho-weighted mean of the teacher's estimates (`mean_x0`), so that the trainer needs no teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddil_ray.diffusion.denoiser import Denoiser, NetworkDenoiser
from ddil_ray.diffusion.schedule import NoiseSchedule, snr
from ddil_ray.diffusion.solver import mean_x0
from ddil_ray.diffusion.threshold import NoThreshold, Threshold
from ddil_ray.diffusion.timegrid import uniform_grid
from ddil_ray.objectives.objective import LossOutput, Parallel, RealData
from ddil_ray.states.batch import StateBatch
from ddil_ray.states.law import TimeLaw
from ddil_ray.states.source import Phase

__all__ = ["PD_LOSSES", "ProgressiveDistillation"]

PD_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "snr_trunc": lambda ratio: ratio.clamp(min=1),
    "v": lambda ratio: 1 + ratio,
    "x": torch.ones_like,
}
"""Weight of the squared x_0 error by SNR: max(SNR, 1), the error in v, and none. Source: section 4 of the paper.
For flow matching `v` is between a half of the error in its own v and all of it: 1 + SNR for (1 + rho)^2."""


class ProgressiveDistillation:
    """Rounds over `student_steps`, the first taught by the guided teacher with `teacher_steps`.

    Args:
        schedule: of teacher and student.
        teacher_steps: DDIM steps of the first teacher.
        student_steps: steps of the student per round, each dividing the one before it.
        loss: a key of `PD_LOSSES`.
        threshold: of the target, beside the teacher's own of each of its estimates.
    """

    student_becomes_teacher = True
    fixed_steps = True
    most_steps: int | None = None
    asks_in_trainer = False
    critic: nn.Module | None = None
    critic_lr: float | None = None
    lcm_scheduler: dict[str, Any] | None = None

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        teacher_steps: int,
        student_steps: Sequence[int],
        loss: str = "snr_trunc",
        threshold: Threshold | None = None,
    ) -> None:
        self.schedule, self.weight = schedule, PD_LOSSES[loss]
        self.threshold = threshold or NoThreshold()
        teachers = [teacher_steps, *student_steps]
        self.phases = tuple(
            Phase(
                index=round_,
                student_steps=steps,
                stages=uniform_grid(steps),
                law=TimeLaw.over(uniform_grid(steps)),
                transition="ddim",
                teacher_substeps=teachers[round_] // steps,
            )
            for round_, steps in enumerate(student_steps)
        )

    def sampling_times(self, steps: int) -> Tensor:
        """The uniform grid of a round."""
        return uniform_grid(steps)

    def student_denoiser(self, network: NetworkDenoiser) -> Denoiser:
        """The network as it is."""
        return network

    def label(self, teacher: Denoiser, states: StateBatch, phase: Phase) -> Tensor:
        """x_target (B, ...): with it, one student step lands where the teacher's substeps land."""
        target = mean_x0(
            teacher,
            states.x_t,
            states.t,
            (states.t - 1 / phase.student_steps).clamp(min=0),
            cond=states.cond,
            w=states.w,
            schedule=self.schedule,
            substeps=phase.teacher_substeps,
        )
        return self.threshold(target)

    def equip(self, expert: Denoiser, data: RealData) -> None:
        """Nothing: labels come with the states."""

    def start(self, student: nn.Module, phase: Phase, parallel: Parallel) -> None:
        """Nothing: the round starts from the student as it is."""

    def loss(
        self, student: NetworkDenoiser, batch: StateBatch, phase: Phase, generator: torch.Generator | None = None
    ) -> LossOutput:
        """Mean over rows of weight(SNR) * mean |x_0 - x_target|^2.

        Where SNR is infinite or 0 (the ends of a zero-terminal-SNR schedule) the weight is finite: states have t > 0.
        """
        x_0 = student(batch.x_t, batch.t, batch.cond, batch.w)
        error = (x_0 - batch.label).square().flatten(1).mean(1)
        per_row = self.weight(snr(self.schedule, batch.t)).to(error.dtype) * error
        return LossOutput(per_row.mean(), per_row.detach(), {})

    def after_update(self, student: nn.Module) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is kept."""
