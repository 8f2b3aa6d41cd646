"""Rollouts of exactly known policies that tests share."""

from __future__ import annotations

import itertools

import torch

from ddil_ray.diffusion.schedule import CosineVP
from ddil_ray.diffusion.solver import sample
from ddil_ray.diffusion.timegrid import uniform_grid
from ddil_ray.states.law import TimeLaw
from ddil_ray.states.rollout import rollout
from ddil_ray.states.source import Conditions, Phase, SourceContext
from ddil_ray.testing import GaussianDenoiser

__all__ = ["GRID", "SCHEDULE", "STUDENT", "TEACHER", "context", "phase", "roll", "seeded", "trajectory"]

SCHEDULE = CosineVP()
TEACHER = GaussianDenoiser(SCHEDULE)
STUDENT = GaussianDenoiser(SCHEDULE, mean=-0.2, std=0.6)
GRID = uniform_grid(4)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def roll(policies, noise, *, wanted=None, choose=None, stages=GRID, cond=None, generator=None):
    """`rollout` unconditionally, for the states at every stage."""
    return rollout(
        policies,
        noise,
        stages=stages,
        wanted=stages[:-1].expand(len(noise), -1) if wanted is None else wanted,
        cond=torch.zeros(len(noise)).long() if cond is None else cond,
        w=torch.zeros(len(noise)),
        generator=seeded() if generator is None else generator,
        choose=choose,
    )


def trajectory(denoiser, noise, *, transition="ddim", stages=GRID, seed=0):
    """States at every stage, by the sampler itself, one step at a time."""
    w, cond, generator, states = torch.zeros(len(noise)), torch.zeros(len(noise)).long(), seeded(seed), [noise]
    how = {"cond": cond, "w": w, "schedule": SCHEDULE, "transition": transition, "generator": generator}
    for now, following in itertools.pairwise(stages[:-1]):
        states.append(sample(denoiser, states[-1], times=torch.stack([now, following]), **how))
    return torch.stack(states, 1)


def context(**changes):
    """Everything that sources read: 500 rows of 8 values in 10 classes."""
    settings = {
        "schedule": SCHEDULE,
        "sample_shape": (8,),
        "conditions": Conditions(torch.arange(500) % 10, (1.0, 3.0)),
        "images": torch.randn(500, 8, generator=seeded(9)),
        "student": STUDENT,
        "teacher": TEACHER,
    }
    return SourceContext(**(settings | changes))


def phase(stages=GRID, law=None, transition="ddim"):
    return Phase(0, len(stages) - 1, stages, TimeLaw.over(stages) if law is None else law, transition, 2)
