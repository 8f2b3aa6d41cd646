"""Who takes each step of a mixed rollout: rules that choose between student and teacher, and the settings of one.

A rule is a `Choose`; rules wrap rules. Policies are numbered as `rollout` gets them, student first. All chance is in
`bernoulli`'s generator; the others keep what they chose since stage 0, so one rule serves one rollout at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddil_ray.states.prior import Prior
from ddil_ray.states.rollout import Choose, Visit

__all__ = ["Mixing", "bernoulli", "held_for", "takeover"]

STUDENT, TEACHER = 0, 1


def bernoulli(probability: float, generator: torch.Generator) -> Choose:
    """Each row and step on its own goes to the teacher with `probability`.

    Source: DAgger's policy beta pi* + (1 - beta) pi, Ross et al. 2011, arXiv:1011.0686, section 3.
    """
    return lambda visit: (torch.rand(len(visit), generator=generator) < probability).to(visit.x_t.device)


def held_for(segment: int | None, rule: Choose) -> Choose:
    """`rule` is asked at every `segment`-th stage and holds until the next; None: at stage 0 for the whole trajectory.

    Same share of teacher steps, but longer stretches of one policy: the student's errors can grow before the teacher
    takes over, and the teacher can correct them before the student does. The lengths are ours.
    """
    held = torch.empty(0, dtype=torch.bool)

    def choose(visit: Visit) -> Tensor:
        nonlocal held
        if visit.stage == 0 or (segment is not None and visit.stage % segment == 0):
            held = rule(visit)
        return held

    return choose


def takeover(bound: float, rule: Choose) -> Choose:
    """`rule`, until a row that it gives to the student strays; from that step on the row is the teacher's.

    A row strays where the root mean square of (student x_0 - teacher x_0) at the visited state is over `bound`, or
    is no number. x_0 is what each would step with: for progressive distillation the teacher's is the student's very
    target, so the difference is the student's error; a consistency student looks further ahead than the teacher's next
    stage, so that some difference is no error there. Costs the teacher's passes for every step, not only for its own.

    For scale: distilling the shipped digits teacher from 8 steps to 4, the median was .35, .27, .16 at the three stages
    for the untrained copy and .11, .12, .08 after 200 steps.

    The rule is ours. SafeDAgger (Zhang and Cho 2016, arXiv:1605.06450) bounds a like deviation, but predicts with a
    network whether it is exceeded, and decides anew at every state.
    """
    taken = torch.empty(0, dtype=torch.bool)

    def choose(visit: Visit) -> Tensor:
        nonlocal taken
        drawn = rule(visit)
        if visit.stage == 0:
            taken = torch.zeros_like(drawn)
        rows = (~(drawn | taken)).nonzero().squeeze(1)
        gap = visit.estimate(STUDENT, rows) - visit.estimate(TEACHER, rows)
        taken[rows] = ~(gap.square().flatten(1).mean(1).sqrt() <= bound)
        return drawn | taken

    return choose


@dataclass(frozen=True)
class Mixing:
    """How student and teacher share the steps of mixed rollouts."""

    teacher_probability: Prior = field(default_factory=lambda: Prior(0.5, 0.5))
    """Chance that a draw gives its steps to the teacher, over the progress of a phase."""
    segment: int | None = 1
    """Steps that one draw decides; None: a whole trajectory."""
    takeover_bound: float | None = None
    """Where the teacher takes over (`takeover`); None: nowhere."""

    def rule(self, progress: float, generator: torch.Generator) -> Choose:
        """The rule of one rollout at `progress` in [0, 1] of its phase."""
        drawn = held_for(self.segment, bernoulli(self.teacher_probability.at(progress), generator))
        return drawn if self.takeover_bound is None else takeover(self.takeover_bound, drawn)
