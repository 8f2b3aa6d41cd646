"""Covariate shift, measured while a student trains: where its own sampler takes it, against where it was taught.

Step k = 1 .. K of the student goes from stages[k-1] to stages[k], the last one to t = 0. The state before it is where
the student acts; the state after it is where it ends up. Everything is measured on the same rows of data, noises and
conditions at all times, so that figures of one run differ by the student alone.

| figure of step k | what it is |
| --- | --- |
| shift/energy/step_k | energy distance of forward and visited states at stages[k] (data and samples at the end) |
| shift/floor/step_k | what it exceeds in 5 % of cases where both have one law (`energy_test`) |
| shift/frechet/step_k | Frechet distance of the two, on the states or on a fixed random projection to 64 dimensions |
| shift/error_visited/step_k | mean squared difference of student and expert on visited states at stages[k-1] |
| shift/error_forward/step_k | the same on forward states at stages[k-1] |
| rollout/spread/step_k | standard deviation over the batch of visited states at stages[k], mean over entries |
| rollout/clip_share/step_k | share of the student's x_0 entries on visited states that lie beyond the data's range |
| rollout/nonfinite | NaN and infinite entries of all visited states; figures that are not finite are left out |

That visited states should have the marginals of forward states is DDIL's premise (arXiv:2410.11971, section 3); which
figures measure it, and how, is ours. The data's range is the ruler of `clip_share` whatever the run's threshold, so
that runs with different thresholds can be compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddil_ray.diffusion.denoiser import Denoiser
from ddil_ray.diffusion.schedule import NoiseSchedule, add_noise
from ddil_ray.diffusion.threshold import PerChannelThreshold, clip_fraction
from ddil_ray.evaluation.energy import energy_test
from ddil_ray.evaluation.metrics import frechet_distance
from ddil_ray.models.model import DiffusionModel
from ddil_ray.objectives.objective import Objective
from ddil_ray.states.rollout import Policy
from ddil_ray.states.source import Conditions, Phase
from ddil_ray.training.optimizer import PRECISIONS
from ddil_ray.training.producer import Expert
from ddil_ray.training.recipe import Recipe
from ddil_ray.training.wire import FlatWeights, load_weights

__all__ = ["ProbeRows", "ShiftMeter", "ShiftProbe"]

_EXCHANGES = 199
"""Of the permutation test: the least number that puts its 95 % quantile exactly and steadily."""
_FRECHET_SIZE = 64
_SEED_SPACE = 0x5F1F7
"""Keeps the rows' seed apart from those of evaluation and of training, whose second number is a small one."""


@dataclass(frozen=True)
class ProbeRows:
    """What all measurements of a run share; row i of data and row i of noise have condition i."""

    x_0: Tensor
    """(N, ...) rows of the data, none twice."""
    eps: Tensor
    """(N, ...) noise of the forward states."""
    noise: Tensor
    """(N, ...) where the student's rollouts start."""
    cond: Tensor
    """(N,) int64."""
    w: Tensor
    """(N,) float32."""
    swaps: Tensor
    """(P, N) bool exchanges of `energy_test`."""
    seed: int = 0
    """Of the noise that the student's sampler adds on its way."""
    projection_seed: int = 1
    """Of the directions that samples are projected on."""

    @classmethod
    def draw(cls, images: Tensor, conditions: Conditions, *, num_samples: int, seed: int) -> ProbeRows:
        """`num_samples` rows, or as many as there are `images`: a row twice would look like a shift.

        Args:
            images: (M, ...) clean data, row i conditioned on `conditions.pool[i]`.
            conditions: where conditions and guidance come from.
            num_samples: N.
            seed: of evaluation, never that of training.
        """
        own = np.random.SeedSequence((seed, _SEED_SPACE)).generate_state(3, np.uint64) >> 1
        of_rows, on_the_way, of_projection = map(int, own)
        generator = torch.Generator().manual_seed(of_rows)
        rows = torch.randperm(len(images), generator=generator)[:num_samples]
        x_0 = images[rows]
        eps, noise = torch.randn(2, *x_0.shape, generator=generator, dtype=x_0.dtype)
        w = conditions.draw_guidance(len(rows), generator)
        swaps = torch.rand(_EXCHANGES, len(rows), generator=generator) < 0.5
        return cls(x_0, eps, noise, conditions.pool[rows], w, swaps, on_the_way, of_projection)

    def to(self, device: torch.device | str) -> ProbeRows:
        """These rows on `device`."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        moved: dict[str, Any] = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in values}
        return ProbeRows(**moved)


@dataclass(frozen=True)
class _InParts:
    """A denoiser that asks its network for at most `rows` rows at a time."""

    denoiser: Denoiser
    rows: int

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        parts = zip(*(a.split(self.rows) for a in (x_t, t, cond, w)), strict=True)
        return torch.cat([self.denoiser(*part) for part in parts])


class ShiftProbe:
    """Measures students; `start` it at every phase.

    Args:
        rows: what is measured on, on the networks' device.
        images: (M, C, ...) clean data, whose range per channel is the ruler of `clip_share`.
        schedule: of teacher and student.
        batch_size: rows per network pass.
    """

    def __init__(self, rows: ProbeRows, images: Tensor, schedule: NoiseSchedule, *, batch_size: int) -> None:
        self.rows, self.schedule, self.batch_size = rows, schedule, batch_size
        beside = [axis for axis in range(images.ndim) if axis != 1]
        self._range = PerChannelThreshold(tuple(images.amin(beside).tolist()), tuple(images.amax(beside).tolist()))
        size = rows.x_0[0].numel()
        # Divided by the root of its columns' number it keeps the squared length of a shift, on average.
        entries = torch.randn(size, _FRECHET_SIZE, generator=torch.Generator().manual_seed(rows.projection_seed))
        self._projection = entries.double() / math.sqrt(_FRECHET_SIZE) if size > _FRECHET_SIZE else None

    @torch.no_grad()
    def start(self, phase: Phase, expert: Denoiser) -> None:
        """Measure students of `phase`, taught by `expert`; the forward side of every figure is made here, once."""
        self._phase, self._expert = phase, _InParts(expert, self.batch_size)
        rows, stages = self.rows, phase.stages[:-1]
        noised = [add_noise(rows.x_0, rows.eps, self._times(t), self.schedule) for t in stages.tolist()]
        if phase.pure_noise:
            noised[0] = rows.eps
        self._forward = [*noised, rows.x_0]
        self._forward_answers = [self._answer(x_t, step) for step, x_t in enumerate(noised)]

    @torch.no_grad()
    def measure(self, student: Denoiser) -> dict[str, float]:
        """The figures of this module's table for `student`, by name."""
        policy = Policy(_InParts(student, self.batch_size), self.schedule, self._phase.transition)
        generator = torch.Generator().manual_seed(self.rows.seed)
        x, nonfinite = self.rows.noise, 0
        figures: dict[str, float] = {}
        for step, (t, s) in enumerate(self._steps()):
            x_0 = policy.x_0(x, t, s, self.rows.cond, self.rows.w)
            x_0_forward = policy.x_0(self._forward[step], t, s, self.rows.cond, self.rows.w)
            here = {
                "shift/error_visited": _squared_error(x_0, self._answer(x, step)),
                "shift/error_forward": _squared_error(x_0_forward, self._forward_answers[step]),
                "rollout/clip_share": clip_fraction(x_0, self._range(x_0)),
            }
            x = policy.move(x, x_0, t, s, generator)
            here["rollout/spread"] = float(x.double().std(0).mean())
            if bool(x.isfinite().all()):
                here |= self._distances(self._forward[step + 1], x)
            nonfinite += int((~x.isfinite()).sum())
            figures |= {f"{name}/step_{step + 1}": value for name, value in here.items() if math.isfinite(value)}
        return {**figures, "rollout/nonfinite": nonfinite}

    def _steps(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(t, s), (N,) each, of the student's steps."""
        return itertools.pairwise(self._times(t) for t in self._phase.stages.tolist())

    def _times(self, t: float) -> Tensor:
        return torch.full((len(self.rows.cond),), t, dtype=torch.float64, device=self.rows.noise.device)

    def _answer(self, x_t: Tensor, step: int) -> Tensor:
        """What the expert would have for x_0 at states `x_t` (N, ...) of stages[step], for a sampler that moves so.

        A DDIM student imitates the expert's substeps to the next stage (`mean_x0`). One that re-noises imitates the end
        of the expert's probability flow, here by DDIM with as many substeps as its rollouts would take to get there.
        """
        phase = self._phase
        if phase.transition == "ddim":
            end, substeps = float(phase.stages[step + 1]), phase.teacher_substeps
        else:
            end, substeps = 0.0, phase.teacher_substeps * (phase.student_steps - step)
        policy = Policy(self._expert, self.schedule, "ddim", substeps)
        t = self._times(float(phase.stages[step]))
        return policy.x_0(x_t, t, self._times(end), self.rows.cond, self.rows.w)

    def _distances(self, forward: Tensor, visited: Tensor) -> dict[str, float]:
        energy, floor = energy_test(forward, visited, self.rows.swaps)
        flat = [x.flatten(1).double().cpu() for x in (forward, visited)]
        if self._projection is not None:
            flat = [x @ self._projection for x in flat]
        return {"shift/energy": energy, "shift/floor": floor, "shift/frechet": frechet_distance(*flat)}


class ShiftMeter:
    """Measures the student of one run from its published weights.

    Args:
        recipe: the run.
        objective: its method.
        student: frozen, and given each measured student's weights; its device is where measuring happens.
        images: (M, C, ...) the run's data.
        conditions: of the data.
    """

    def __init__(
        self, recipe: Recipe, objective: Objective, student: DiffusionModel, *, images: Tensor, conditions: Conditions
    ) -> None:
        settings, seed = recipe.config.shift, recipe.config.evaluation.seed
        rows = ProbeRows.draw(images, conditions, num_samples=settings.num_samples, seed=seed)
        device = next(student.network.parameters()).device
        self.probe = ShiftProbe(rows.to(device), images, student.schedule, batch_size=settings.batch_size)
        self.objective, self.student = objective, student
        self.autocast = PRECISIONS[recipe.config.trainer.precision]
        self._phase = -1

    def record(self, step: int, weights: FlatWeights, expert: Expert) -> dict[str, float]:
        """The figures of the student with `weights`, published at `step`, in the phase that `expert` teaches."""
        load_weights(self.student.network, weights)
        if expert.phase != self._phase:
            self.probe.start(self.objective.phases[expert.phase], expert.asked_in(self.autocast))
            self._phase = expert.phase
        student = self.objective.student_denoiser(self.student.denoiser(autocast=self.autocast))
        return {"step": step, "phase": expert.phase, **self.probe.measure(student)}


def _squared_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).double().square().mean())
