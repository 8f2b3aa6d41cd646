"""One source of states in one phase, as the capacity model sees it: when its blocks are needed, and what they take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ddil_ray.capacity.costs import PROGRESS, Costs
from ddil_ray.states.batch import Origin
from ddil_ray.states.prior import ConsumptionPlan
from ddil_ray.training.producer import USES_STUDENT
from ddil_ray.training.recipe import Ingredients, Recipe

__all__ = ["Source", "sources_of"]


@dataclass(frozen=True)
class Source:
    """One source in one phase."""

    origin: Origin
    plan: ConsumptionPlan
    rows: int
    """Per block."""
    state_s: np.ndarray
    """At `PROGRESS`."""
    label_s: float
    share: float
    """Fresh rows per row trained on, where it is largest."""
    pooled: bool
    """Whether labels have actors of their own."""
    made: float
    """Blocks per worker that are made; later ones are kept ones, which cost nothing here."""
    needed: np.ndarray = field(init=False)
    """(steps,) blocks per worker, cumulative."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "needed", -(-self.plan.fresh(self.origin) // self.rows))

    @property
    def block_s(self) -> np.ndarray:
        """(blocks per worker,) seconds of the actor that makes the states, and labels them if nobody else does."""
        blocks = int(self.needed[-1])
        first = np.searchsorted(self.needed, np.arange(1, blocks + 1))
        states: np.ndarray = np.interp(first / max(1, self.plan.steps - 1), PROGRESS, self.state_s)
        fresh = np.arange(blocks) < self.made
        return fresh * (states + (0.0 if self.pooled else self.label_s))

    def after(self, *, staleness: int, every: int) -> np.ndarray | None:
        """(blocks per worker,) see `Stream.after`: the first weights that are young enough when the last row goes."""
        if self.origin not in USES_STUDENT:
            return None
        oldest = (self.plan.last_steps(self.origin, self.rows) - staleness).clip(min=0)
        return -(-oldest // every) * every


def sources_of(recipe: Recipe, made: Ingredients, costs: Costs, phase: int) -> Iterator[Source]:
    """The sources of `phase`; see `capacity` for the arguments."""
    pooled, plan = recipe.config.labels.placement == "pool", made.plans[phase]
    for origin in recipe.priors.origins:
        trained = sum(plan.counts(step)[origin] for step in range(plan.steps))
        most = max(recipe.priors.at(progress)[origin] for progress in np.linspace(0, 1, 21))
        yield Source(
            origin,
            plan,
            recipe.rows_per_block(origin),
            costs.phases[phase].state_s[origin],
            costs.phases[phase].label_s[origin],
            most * float(plan.fresh(origin)[-1]) / max(1, trained),
            pooled,
            _made(recipe, origin),
        )


def _made(recipe: Recipe, origin: Origin) -> float:
    """Blocks per worker before kept ones come again."""
    kept = recipe.config.teacher_rollouts.keep_rows
    if origin is not Origin.TEACHER or kept is None:
        return math.inf
    return -(-kept // recipe.rows_per_block(origin)) / recipe.config.trainer.workers[1]
