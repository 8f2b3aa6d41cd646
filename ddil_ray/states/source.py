"""The sources of states, and the producer that makes one labelled batch per request.

A request names a phase and an index; everything random about its rows comes from (seed, phase, source, index), so
any process can make them, twice the same. To add a source: a member of `Origin`, a function here, a row in `SOURCES`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ddil_ray.diffusion.denoiser import Denoiser
from ddil_ray.diffusion.schedule import NoiseSchedule, add_noise
from ddil_ray.states.batch import Origin, StateBatch
from ddil_ray.states.law import TimeLaw
from ddil_ray.states.mixing import Mixing
from ddil_ray.states.rollout import Policy, rollout

__all__ = ["SOURCES", "Conditions", "Phase", "SourceContext", "StateRequest", "States", "make_states"]


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one student grid: the whole run, or one round of progressive distillation."""

    index: int
    student_steps: int
    stages: Tensor
    """(K + 1,) float64: the times of the student's own sampler, from 1 to 0."""
    law: TimeLaw
    """Law of t shared by every source."""
    transition: str
    """How the student's sampler moves: a key of `TRANSITIONS`."""
    teacher_substeps: int
    """DDIM steps a teacher rollout takes per stage."""
    pure_noise: bool = False
    """Whether states at t = 1 are noise alone, where the schedule would leave some signal."""


@dataclass(frozen=True)
class StateRequest:
    """One block of rows to make."""

    origin: Origin
    phase: int
    index: int
    rows: int
    seed: int
    progress: float = 0.0
    """Where in its phase, from 0 to 1, the block is first needed; no part of the key of `generator`."""

    def generator(self) -> torch.Generator:
        """CPU generator of this request alone."""
        key = (self.seed, self.phase, int(self.origin), self.index)
        (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(seed) >> 1)


@dataclass(frozen=True)
class Conditions:
    """What states are conditioned on: ids drawn from the data's own labels, and guidance from a range."""

    pool: Tensor
    """(N,) int64 condition ids, drawn with equal chance."""
    guidance: tuple[float, float]
    """Range of w; equal ends fix it."""

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(cond, w), (rows,) each."""
        cond = self.pool[torch.randint(len(self.pool), (rows,), generator=generator)]
        return cond, self.draw_guidance(rows, generator)

    def draw_guidance(self, rows: int, generator: torch.Generator) -> Tensor:
        """(rows,) float32 w."""
        low, high = self.guidance
        return low + (high - low) * torch.rand(rows, generator=generator)


@dataclass(frozen=True)
class SourceContext:
    """What sources read; those that a source does not use may be None."""

    schedule: NoiseSchedule
    sample_shape: tuple[int, ...]
    conditions: Conditions
    images: Tensor | None = None
    """(N, ...) float32 clean data, row i conditioned on `conditions.pool[i]`; forward states only."""
    student: Denoiser | None = None
    teacher: Denoiser | None = None
    mixing: Mixing = field(default_factory=Mixing)
    device: torch.device | str = "cpu"


States = tuple[Tensor, Tensor, Tensor, Tensor]
"""(x_t, t, cond, w), all with the same first axis."""


def forward_states(context: SourceContext, phase: Phase, request: StateRequest) -> States:
    """Forward-diffused data: x_t = alpha x_0 + sigma eps, walking the data in a new order each epoch and phase."""
    assert context.images is not None
    generator, size = request.generator(), len(context.images)
    position = request.index * request.rows + np.arange(request.rows)
    rows = torch.from_numpy(_epoch_order(request, position, size))
    x_0 = context.images.index_select(0, rows)
    t = phase.law.quantile(torch.rand(request.rows, generator=generator, dtype=torch.float64))
    eps = torch.randn(x_0.shape, generator=generator)
    w = context.conditions.draw_guidance(request.rows, generator)
    x_t = add_noise(x_0, eps, t, context.schedule)
    if phase.pure_noise:
        x_t[t >= 1] = eps[t >= 1]
    return x_t, t, context.conditions.pool[rows], w


def _epoch_order(request: StateRequest, position: np.ndarray, size: int) -> np.ndarray:
    """Row of the data at each position of a phase's endless walk that visits every row once per epoch."""
    rows = np.empty_like(position)
    for epoch in np.unique(position // size):
        inside = position // size == epoch
        rows[inside] = _order_of(request.seed, int(epoch), request.phase, size)[position[inside] % size]
    return rows


@functools.lru_cache(maxsize=2)
def _order_of(seed: int, epoch: int, phase: int, size: int) -> np.ndarray:
    """The order of one epoch; kept, since an epoch is many blocks, and two of them may meet in one."""
    order = np.random.default_rng((seed, epoch, phase)).permutation(size)
    order.flags.writeable = False
    return order


def student_rollouts(context: SourceContext, phase: Phase, request: StateRequest) -> States:
    """States on the student's own sampling path."""
    return _rollout_states(context, phase, request, policies=(_student(context, phase),))


def teacher_rollouts(context: SourceContext, phase: Phase, request: StateRequest) -> States:
    """States on the teacher's sampling path, DDIM with `phase.teacher_substeps` per stage."""
    return _rollout_states(context, phase, request, policies=(_teacher(context, phase),))


def mixed_rollouts(context: SourceContext, phase: Phase, request: StateRequest) -> States:
    """States of trajectories whose steps student and teacher share by `context.mixing`."""
    policies = (_student(context, phase), _teacher(context, phase))
    return _rollout_states(context, phase, request, policies=policies, mixing=context.mixing)


def _student(context: SourceContext, phase: Phase) -> Policy:
    assert context.student is not None
    return Policy(context.student, context.schedule, phase.transition)


def _teacher(context: SourceContext, phase: Phase) -> Policy:
    assert context.teacher is not None
    return Policy(context.teacher, context.schedule, "ddim", phase.teacher_substeps)


def _rollout_states(
    context: SourceContext,
    phase: Phase,
    request: StateRequest,
    *,
    policies: tuple[Policy] | tuple[Policy, Policy],
    mixing: Mixing | None = None,
) -> States:
    generator = request.generator()
    per_row = min(phase.student_steps, request.rows)
    trajectories = -(-request.rows // per_row)
    wanted = phase.law.stratified(trajectories, per_row, generator)
    cond, w = context.conditions.draw(trajectories, generator)
    noise = torch.randn(trajectories, *context.sample_shape, generator=generator)
    x_t = rollout(
        policies,
        noise.to(context.device),
        stages=phase.stages,
        wanted=wanted,
        cond=cond.to(context.device),
        w=w.to(context.device),
        generator=generator,
        choose=mixing.rule(request.progress, generator) if mixing else None,
    )
    # Shuffled, so that any part of the block has the same law of t as the whole.
    order = torch.randperm(wanted.numel(), generator=generator)[: request.rows]
    trajectory = order // per_row
    return x_t.cpu().flatten(0, 1)[order], wanted.flatten()[order], cond[trajectory], w[trajectory]


SOURCES: dict[Origin, Callable[[SourceContext, Phase, StateRequest], States]] = {
    Origin.FORWARD: forward_states,
    Origin.STUDENT: student_rollouts,
    Origin.TEACHER: teacher_rollouts,
    Origin.MIXED: mixed_rollouts,
}
"""Every source by the origin it marks its states with."""


def make_states(context: SourceContext, phase: Phase, request: StateRequest, *, version: int) -> StateBatch:
    """The rows of `request`, not yet labelled, on the CPU. `version` is -1 where no student weights are used."""
    x_t, t, cond, w = SOURCES[request.origin](context, phase, request)
    rows = len(t)
    return StateBatch(
        x_t=x_t,
        t=t,
        cond=cond,
        w=w,
        origin=torch.full((rows,), int(request.origin), dtype=torch.int8),
        version=torch.full((rows,), version),
        phase=torch.full((rows,), phase.index),
        label=torch.zeros(rows, 0),
    )
