"""Rollouts: states that a student, a teacher or a mixture of both visits on its way from noise.

DAgger's data collection (Ross et al. 2011, arXiv:1011.0686): run a policy, keep what it visits, ask the expert there.
A `Policy` is a denoiser with the way its sampler moves; `rollout` runs one, or two mixed step by step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddil_ray.diffusion.denoiser import Denoiser
from ddil_ray.diffusion.schedule import NoiseSchedule
from ddil_ray.diffusion.solver import TRANSITIONS, mean_x0

__all__ = ["Policy", "bernoulli", "rollout"]


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


Choose = Callable[[int, int], Tensor]
"""(stage, rows) -> (rows,) bool: where the second of two policies takes the step."""


def bernoulli(probability: float, generator: torch.Generator) -> Choose:
    """Each row and step on its own goes to the second policy with `probability`."""
    return lambda _stage, rows: torch.rand(rows, generator=generator) < probability


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
        choose: required with two policies.

    Returns:
        (B, M, ...) states.
    """
    rows, x, wanted = len(noise), noise, wanted.to(noise.device)
    states = noise.unsqueeze(1).expand(rows, wanted.shape[1], *noise.shape[1:]).clone()
    lowest = float(wanted.min())
    for stage, (now, following) in enumerate(zip(stages.tolist(), stages.tolist()[1:], strict=False)):
        if now <= lowest:
            break  # nothing is asked for below here, so the last denoising would be wasted
        parts = _parts(policies, choose, stage, x)
        t, s = (torch.full((rows,), u, dtype=torch.float64, device=x.device) for u in (now, following))
        x_next = torch.empty_like(x)
        for policy, part in parts:
            here = (x[part], t[part], s[part])
            x_0 = policy.x_0(*here, cond[part], w[part])
            x_next[part] = policy.move(here[0], x_0, *here[1:], generator)
            row, column = ((wanted[part] < now) & (wanted[part] > following)).nonzero(as_tuple=True)
            if len(row):
                between = wanted[part][row, column]
                states[part[row], column] = policy.move(here[0][row], x_0[row], here[1][row], between, generator)
        row, column = (wanted == following).nonzero(as_tuple=True)
        states[row, column] = x_next[row]
        x = x_next
    return states


def _parts(policies: tuple[Policy, ...], choose: Choose | None, stage: int, x: Tensor) -> list[tuple[Policy, Tensor]]:
    """Which rows each policy moves at this stage; only policies with rows."""
    everyone = torch.arange(len(x), device=x.device)
    if len(policies) == 1 or choose is None:
        return [(policies[0], everyone)]
    second = choose(stage, len(x)).to(x.device)
    parts = [(policies[0], everyone[~second]), (policies[1], everyone[second])]
    return [(policy, part) for policy, part in parts if len(part)]
