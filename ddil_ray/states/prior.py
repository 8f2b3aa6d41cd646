"""How much of each batch comes from each source, as a function of training progress, and the exact plan it gives.

DDIL's beta_forward, beta_student, beta_teacher. The plan is a pure function of (seed, step): every trainer rank, every
producer and a resumed run read the same numbers, which is what keeps several streams free of deadlock and makes the
age of a state known before it is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ddil_ray.states.batch import Origin

__all__ = ["RAMPS", "ConsumptionPlan", "Prior", "SourcePriors"]

RAMPS: dict[str, Callable[[float], float]] = {
    "linear": lambda u: u,
    "cosine": lambda u: (1 - math.cos(math.pi * u)) / 2,
}
"""Ramp shapes [0, 1] -> [0, 1] by name."""


@dataclass(frozen=True)
class Prior:
    """A probability: `start`, moving to `end` over the first `over` of a phase."""

    start: float
    end: float
    ramp: str = "linear"
    over: float = 1.0

    def at(self, progress: float) -> float:
        """The probability at `progress` in [0, 1]."""
        return self.start + (self.end - self.start) * RAMPS[self.ramp](min(1.0, progress / self.over))


@dataclass(frozen=True)
class SourcePriors:
    """One prior per source; they sum to 1 at every progress."""

    priors: Mapping[Origin, Prior]

    @classmethod
    def constant(cls, **shares: float) -> SourcePriors:
        """Constant priors by source name, as in `SourcePriors.constant(forward=.5, student=.5)`."""
        return cls({Origin[name.upper()]: Prior(p, p) for name, p in shares.items()})

    @property
    def origins(self) -> list[Origin]:
        """The sources that are ever used."""
        return [o for o, p in self.priors.items() if p.start > 0 or p.end > 0]

    def at(self, progress: float) -> dict[Origin, float]:
        """Probability of every used source at `progress`."""
        return {origin: self.priors[origin].at(progress) for origin in self.origins}


class ConsumptionPlan:
    """Rows of each source that one rank trains on, and takes fresh from its stream, at every step of a phase.

    The mixture is drawn per step by systematic sampling: with one uniform number per step each source gets
    floor or ceil of its expected share and the expectation is exact. `fresh(origin)[n]` is the number of new rows
    taken up to and including step n: with reuse r, F(n) = ceil(D(n - 1) / r) + c(n) where D counts rows trained on and
    c(n) is this step's need, made monotone. With r = 1 that is D(n): every row is used exactly once.

    Args:
        priors: of the sources.
        steps: of the phase.
        batch_size: rows of one rank per step.
        seed: of the run.
        phase: which it is.
        reuse: times that each row is trained on.
        begin: step of the phase that this plan's rows are counted from; nothing is taken before.
    """

    def __init__(
        self,
        priors: SourcePriors,
        *,
        steps: int,
        batch_size: int,
        seed: int,
        phase: int = 0,
        reuse: int = 1,
        begin: int = 0,
    ) -> None:
        self.steps, self.batch_size, self.reuse = steps, batch_size, reuse
        self.origins = priors.origins
        shares = np.array([list(priors.at(n / max(1, steps - 1)).values()) for n in range(steps)])
        edges = np.cumsum(shares, axis=1) * batch_size
        edges[:, -1] = batch_size
        u = np.random.default_rng((seed, phase, 0x9E37)).random((steps, 1))
        below = np.ceil(edges - u - 1e-9).clip(0, batch_size).astype(np.int64)
        below[:, -1] = batch_size
        drawn = np.diff(below, axis=1, prepend=0)
        drawn[:begin] = 0
        self._counts = {o: drawn[:, i] for i, o in enumerate(self.origins)}
        self._fresh = {o: self._needed(counts) for o, counts in self._counts.items()}

    def counts(self, step: int) -> dict[Origin, int]:
        """Rows of each source in the batch of `step` of the phase; from `begin` on they sum to the batch size."""
        return {origin: int(counts[step]) for origin, counts in self._counts.items()}

    def fresh(self, origin: Origin) -> np.ndarray:
        """(steps,) int64: new rows of `origin` that must have arrived by each step, cumulative."""
        return self._fresh[origin]

    def _needed(self, counts: np.ndarray) -> np.ndarray:
        trained = np.cumsum(counts)
        needed = np.where(counts > 0, -(-(trained - counts) // self.reuse) + counts, 0)
        return np.maximum.accumulate(needed)

    def blocks(self, origin: Origin, rows: int) -> int:
        """Blocks of `rows` rows that the phase takes from the stream of `origin`."""
        return -(-int(self.fresh(origin)[-1]) // rows)

    def first_steps(self, origin: Origin, rows: int) -> np.ndarray:
        """(blocks,) int64: the step at which the first row of each block is needed."""
        begins = np.arange(self.blocks(origin, rows)) * rows
        return np.searchsorted(self.fresh(origin), begins, side="right")

    def last_steps(self, origin: Origin, rows: int) -> np.ndarray:
        """(blocks,) int64: the last step that depends on each block.

        It takes the last of the block's rows that are taken at all, or draws last while no newer block is there.
        """
        first, fresh = self.first_steps(origin, rows), self.fresh(origin)
        ends = np.minimum((np.arange(len(first)) + 1) * rows, fresh[-1]) - 1
        drawing = np.flatnonzero(self._counts[origin])
        before_next = np.searchsorted(drawing, np.append(first, self.steps)[1:]) - 1
        newest_until = drawing[before_next.clip(min=0)]
        steps: np.ndarray = np.maximum(np.searchsorted(fresh, ends, side="right"), newest_until)
        return steps

    def progress(self, origin: Origin, rows: int) -> np.ndarray:
        """(blocks,) where in the phase, from 0 to 1, each block is first needed; what schedules of a block go by."""
        return self.first_steps(origin, rows) / max(1, self.steps - 1)

    def smallest_staleness(self, origin: Origin, *, rows: int, sync_every: int) -> int:
        """Least bound (in steps) that cannot stall: the longest span of a block plus the wait for a publication."""
        spans = self.last_steps(origin, rows) - self.first_steps(origin, rows)
        return int(spans.max(initial=0)) + sync_every
