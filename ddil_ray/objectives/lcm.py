"""Latent consistency distillation: f(x_t, t) = f_target(x_s, s), with x_s one guided solver step of the teacher.

Source: Luo et al. 2023, arXiv:2310.04378, algorithm 1; values as in diffusers' LCM training scripts. The teacher's
step is the expert label and travels with the state; only the average target network stays with the trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ddil_ray.diffusion.denoiser import BoundaryConditioned, Denoiser, NetworkDenoiser, Thresholded
from ddil_ray.diffusion.schedule import NoiseSchedule
from ddil_ray.diffusion.solver import ddim_step
from ddil_ray.diffusion.threshold import NoThreshold, Threshold
from ddil_ray.diffusion.timegrid import consistency_grid, uniform_grid
from ddil_ray.objectives.objective import LossOutput, Parallel, RealData, spread
from ddil_ray.shards import local
from ddil_ray.states.batch import StateBatch
from ddil_ray.states.law import TimeLaw
from ddil_ray.states.source import Phase
from ddil_ray.trained import load_trained_state, trained_parameters, trained_state

__all__ = ["LCM_LOSSES", "LatentConsistency"]

LCM_LOSSES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "huber": lambda difference, c: (difference.square() + c**2).sqrt() - c,
    "l2": lambda difference, c: difference.square(),
}
"""Elementwise losses by name; pseudo-Huber is |d| for |d| >> c and d^2 / 2c for |d| << c."""


class LatentConsistency:
    """One phase on the `solver_steps` grid; the student samples with `student_steps` of those times.

    Args:
        schedule: of teacher and student.
        solver_steps: DDIM grid that labels are made on.
        student_steps: stages of the student's own rollouts.
        skip: grid steps between a state and its label.
        teacher_substeps: DDIM steps of a teacher rollout per stage.
        loss: a key of `LCM_LOSSES`; `huber_c` its constant.
        ema_decay: of the target network, per update.
        sigma_data, timestep_scaling: see `BoundaryConditioned`.
        threshold: of the target network's x_0 estimates. It compounds a bias through the bootstrap: off by default.
    """

    student_becomes_teacher = False
    fixed_steps = False
    asks_in_trainer = False
    critic: nn.Module | None = None
    critic_lr: float | None = None

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        solver_steps: int = 50,
        student_steps: int = 4,
        skip: int = 1,
        teacher_substeps: int = 2,
        loss: str = "huber",
        huber_c: float = 1e-3,
        ema_decay: float = 0.95,
        sigma_data: float = 0.5,
        timestep_scaling: float = 10.0,
        threshold: Threshold | None = None,
    ) -> None:
        self.schedule, self.solver_steps, self.step = schedule, solver_steps, skip / solver_steps
        self.elementwise, self.huber_c = LCM_LOSSES[loss], huber_c
        self.sigma_data, self.timestep_scaling = sigma_data, timestep_scaling
        self.threshold = threshold or NoThreshold()
        self.most_steps: int | None = solver_steps
        self.lcm_scheduler: dict[str, Any] | None = {
            "original_inference_steps": solver_steps,
            "timestep_scaling": timestep_scaling,
        }
        self._average = get_ema_multi_avg_fn(ema_decay)
        self._target: nn.Module | None = None
        self.phases: tuple[Phase, ...] = (
            Phase(
                index=0,
                student_steps=student_steps,
                stages=consistency_grid(solver_steps, student_steps),
                law=TimeLaw.over(uniform_grid(solver_steps)),
                transition="renoise",
                teacher_substeps=teacher_substeps,
            ),
        )

    def sampling_times(self, steps: int) -> Tensor:
        """Times of diffusers' LCMScheduler on this solver grid."""
        return consistency_grid(self.solver_steps, steps)

    def student_denoiser(self, network: NetworkDenoiser) -> Denoiser:
        """The consistency function f."""
        return self._consistent(network)

    def _consistent(self, denoiser: Denoiser) -> BoundaryConditioned:
        return BoundaryConditioned(denoiser, self.schedule, self.sigma_data, self.timestep_scaling)

    def _earlier(self, t: Tensor) -> Tensor:
        return (t - self.step).clamp(min=0)

    def label(self, teacher: Denoiser, states: StateBatch, phase: Phase) -> Tensor:
        """x_s (B, ...): one DDIM step of the guided teacher, `skip` grid steps down."""
        x_0 = teacher(states.x_t, states.t, states.cond, states.w)
        return ddim_step(states.x_t, x_0, states.t, self._earlier(states.t), self.schedule)

    def equip(self, expert: Denoiser, data: RealData) -> None:
        """Nothing: the teacher's steps come with the states."""

    def start(self, student: nn.Module, phase: Phase, parallel: Parallel) -> None:
        """Start the target network from the student."""
        self._target = parallel.twin(student).requires_grad_(False).eval()

    def loss(
        self, student: NetworkDenoiser, batch: StateBatch, phase: Phase, generator: torch.Generator | None = None
    ) -> LossOutput:
        """Mean distance of f(x_t, t) to f_target(x_s, s); at s = 0 the target is x_s itself."""
        assert self._target is not None
        predicted = self.student_denoiser(student)(batch.x_t, batch.t, batch.cond, batch.w)
        with torch.no_grad():
            average = self._consistent(Thresholded(replace(student, network=self._target), self.threshold))
            target = average(batch.label, self._earlier(batch.t), batch.cond, batch.w)
        per_row = self.elementwise(predicted - target, self.huber_c).flatten(1).mean(1)
        return LossOutput(per_row.mean(), per_row.detach(), {"student/spread": spread(predicted)})

    def after_update(self, student: nn.Module) -> None:
        """Move the target network towards the student."""
        assert self._target is not None
        with torch.no_grad():
            parts = ([local(p) for p in trained_parameters(network)] for network in (self._target, student))
            self._average(*parts, 0)

    def state_dict(self) -> dict[str, Any]:
        """The target network."""
        assert self._target is not None
        return {"target": trained_state(self._target)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the target network."""
        assert self._target is not None
        load_trained_state(self._target, state["target"])
