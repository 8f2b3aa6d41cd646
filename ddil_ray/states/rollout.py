"""Rollouts: states that a student, a teacher or a mixture of both visits on its way from noise.

DAgger's data collection (Ross et al. 2011, arXiv:1011.0686): run a policy, keep what it visits, ask the expert there.
A `Policy` is a denoiser with the way its sampler moves; `rollout` runs one, or two of which a rule (`mixing`) chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddil_ray.diffusion.denoiser import Denoiser
from ddil_ray.diffusion.schedule import NoiseSchedule
from ddil_ray.diffusion.solver import TRANSITIONS, mean_x0

__all__ = ["Choose", "Policy", "Visit", "rollout"]


@dataclass(frozen=True)
class Policy:
    """Who moves a state from stage to stage, and how.

    `substeps` > 1 is an expert that takes several DDIM steps per stage; its effective x_0 (`mean_x0`) then stands for
    all of them.
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    transition: str
    substeps: int = 1

    def x_0(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        """The estimate (B, ...) with which this policy goes from `t` to `s`."""
        if self.substeps == 1:
            return self.denoiser(x_t, t, cond, w)
        return mean_x0(self.denoiser, x_t, t, s, cond=cond, w=w, schedule=self.schedule, substeps=self.substeps)

    def move(self, x_t: Tensor, x_0: Tensor, t: Tensor, s: Tensor, generator: torch.Generator) -> Tensor:
        """The state (B, ...) at `s`."""
        return TRANSITIONS[self.transition](x_t, x_0, t, s, self.schedule, generator)


@dataclass(frozen=True)
class Visit:
    """B rows where they stand at one stage, before anyone moves them."""

    stage: int
    policies: tuple[Policy, ...]
    x_t: Tensor
    """(B, ...) states."""
    t: Tensor
    """(B,) time of this stage."""
    s: Tensor
    """(B,) time of the next."""
    cond: Tensor
    """(B,) conditions."""
    w: Tensor
    """(B,) guidance."""
    _known: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        return len(self.t)

    def estimate(self, which: int, rows: Tensor) -> Tensor:
        """x_0 (R, ...) with which policy number `which` would step from `rows` (R,) int64; no row is computed twice."""
        if which not in self._known:
            self._known[which] = torch.zeros_like(self.t, dtype=torch.bool), torch.empty_like(self.x_t)
        known, x_0 = self._known[which]
        new = rows[~known[rows]]
        if len(new):
            here = (self.x_t[new], self.t[new], self.s[new], self.cond[new], self.w[new])
            x_0[new], known[new] = self.policies[which].x_0(*here), True
        return x_0[rows]


Choose = Callable[[Visit], Tensor]
"""Visit -> (B,) bool on the states' device: where the second of two policies takes the step."""


@torch.no_grad()
def rollout(
    policies: tuple[Policy] | tuple[Policy, Policy],
    noise: Tensor,
    *,
    stages: Tensor,
    wanted: Tensor,
    cond: Tensor,
    w: Tensor,
    generator: torch.Generator,
    choose: Choose | None = None,
) -> Tensor:
    """Roll `noise` (B, ...) down `stages` and return the states met at `wanted` times.

    A wanted time on a stage gets the visited state itself. One between two stages is reached from the stage just above
    by the policy's own move: a partial DDIM step, or re-noising its x_0 estimate.

    Args:
        policies: one policy, or two of which `choose` picks per row and stage.
        noise: (B, ...) states at t = 1.
        stages: (K + 1,) times from 1 down to 0.
        wanted: (B, M) times in (0, 1].
        cond: (B,) conditions.
        w: (B,) guidance.
        generator: source of the moves' noise.
        choose: who steps, asked once per stage in order; without it the first policy does.

    Returns:
        (B, M, ...) states.
    """
    rows, x, wanted = len(noise), noise, wanted.to(noise.device)
    states = noise.unsqueeze(1).expand(rows, wanted.shape[1], *noise.shape[1:]).clone()
    lowest = float(wanted.min())
    for stage, (now, following) in enumerate(zip(stages.tolist(), stages.tolist()[1:], strict=False)):
        if now <= lowest:
            break  # nothing is asked for below here, so the last denoising would be wasted
        t, s = (torch.full((rows,), u, dtype=torch.float64, device=x.device) for u in (now, following))
        visit = Visit(stage, policies, x, t, s, cond, w)
        x = torch.empty_like(x)
        for which, part in _parts(visit, choose):
            policy, x_t, x_0 = policies[which], visit.x_t[part], visit.estimate(which, part)
            x[part] = policy.move(x_t, x_0, t[part], s[part], generator)
            row, column = ((wanted[part] < now) & (wanted[part] > following)).nonzero(as_tuple=True)
            if len(row):
                between = wanted[part][row, column]
                states[part[row], column] = policy.move(x_t[row], x_0[row], t[part][row], between, generator)
        row, column = (wanted == following).nonzero(as_tuple=True)
        states[row, column] = x[row]
    return states


def _parts(visit: Visit, choose: Choose | None) -> list[tuple[int, Tensor]]:
    """Which rows each policy moves at this stage, by its number; only policies with rows."""
    everyone = torch.arange(len(visit), device=visit.x_t.device)
    if choose is None:
        return [(0, everyone)]
    second = choose(visit)
    return [(which, part) for which, part in enumerate((everyone[~second], everyone[second])) if len(part)]
