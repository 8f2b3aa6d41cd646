"""Where streams go on when a run goes on with another number of workers.

Ranks take whole blocks in turn, as many each, and how many is known from the plan alone. So from the step at which the
number of workers changes, the blocks used so far are counted, buffers start empty, and a new plan of the same phase
takes blocks behind them: no block is used twice, and the mixture follows the same priors at the same steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ddil_ray.states.batch import Origin
from ddil_ray.states.prior import ConsumptionPlan

__all__ = ["Stretch"]


@dataclass(frozen=True)
class Stretch:
    """Part of a run that one number of workers does without leaving rows behind."""

    workers: int
    step: int = 0
    """Global step that it begins at."""
    used: Mapping[Origin, int] = field(default_factory=dict)
    """Blocks of that step's phase that were taken before, over all workers; none of other sources."""

    def begin(self, phase: int, steps: int) -> int:
        """Step of `phase`, which has `steps`, that buffers start empty at."""
        return max(0, self.step - phase * steps)

    def used_in(self, phase: int, steps: int, origin: Origin) -> int:
        """Blocks of `origin` that others took of `phase`."""
        return self.used.get(origin, 0) if phase == self.step // steps else 0

    def taken(self, plan: ConsumptionPlan, origin: Origin, *, step: int, rows: int) -> int:
        """Blocks of `rows` rows of `origin` that each worker has taken of the phase of `plan` before global `step`."""
        local = step % plan.steps
        return -(-int(plan.fresh(origin)[local - 1]) // rows) if local else 0

    def followed_by(self, workers: int, plan: ConsumptionPlan, *, step: int, rows: Mapping[Origin, int]) -> Stretch:
        """The stretch that goes on at global `step`: this one, unless the number of workers is another.

        Args:
            workers: from now on.
            plan: of one of this stretch's workers, for the phase of `step`.
            step: updates done.
            rows: of the blocks of every source.
        """
        if workers == self.workers:
            return self
        phase = step // plan.steps
        used = {
            o: self.used_in(phase, plan.steps, o) + self.workers * self.taken(plan, o, step=step, rows=rows[o])
            for o in plan.origins
        }
        return Stretch(workers, step, used)

    def state_dict(self) -> dict[str, Any]:
        """As plain numbers."""
        return {"workers": self.workers, "step": self.step, "used": {int(o): n for o, n in self.used.items()}}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Stretch:
        """What `state_dict` gave."""
        return cls(state["workers"], state["step"], {Origin(o): n for o, n in state["used"].items()})
