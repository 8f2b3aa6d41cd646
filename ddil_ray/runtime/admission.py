"""Which block may be made when, as plain rules without Ray; `README.md` beside this file derives the bounds.

A block waits for three things: its phase, weights that will still be young enough when its last row is trained on, and
a credit. A stream has as many credits as it has actors, and `replay.ahead` more per trainer worker; a block holds one
from when it is begun until the trainer has reached the step that needs it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

__all__ = ["Ask", "Lack", "Stream", "StreamPlan", "Work"]

Lack = Literal["phase", "weights", "credit"]
"""What a block that may not be made yet waits for."""


@dataclass(frozen=True)
class StreamPlan:
    """The n blocks of one stream from where training goes on, in the order in which ranks take them."""

    phases: np.ndarray
    """(n,) the phase that each belongs to, ascending."""
    needed: np.ndarray
    """(n,) the global step that trains on its first row, or takes it into the buffer; ascending."""
    versions: np.ndarray
    """(n,) the oldest weights that its rows may come from; -1 where any will do, or none are used."""
    indices: np.ndarray
    """(n,) which block of its phase it is; with the phase, what its rows are made from."""
    progress: np.ndarray
    """(n,) where in its phase, from 0 to 1, it is first needed."""

    def __len__(self) -> int:
        return len(self.phases)


@dataclass(frozen=True)
class Ask:
    """An actor's wish to go on."""

    stream: str
    phase: int
    block: int | None
    """Place in the stream's plan; None for labels, which only follow the phase."""
    known: tuple[int, int]
    """(phase, version) of the weights that the actor has."""
    busy_s: float = 0.0
    """Seconds that it worked since it was last let go on."""
    actor: str = ""
    """Ray's id of it."""
    poisoned: int = 0
    """Rows that were not finite since it was last let go on."""
    rows: int = 0
    """Rows that it made since."""
    size: int = 0
    """Bytes of these."""

    @property
    def work(self) -> str:
        """What the actor is at once it is let go on."""
        return "labels a block" if self.block is None else f"is at block {self.block}"


@dataclass
class Work:
    """What the actors of one stream did since it was last asked."""

    blocks: int = 0
    busy_s: float = 0.0
    waited_s: defaultdict[Lack, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds by what was waited for."""
    rows: int = 0
    poisoned: int = 0
    """Rows that were not finite."""

    def add(self, ask: Ask) -> None:
        """An actor is let go on: count what it did before."""
        self.blocks += 1
        self.busy_s += ask.busy_s
        self.rows += ask.rows
        self.poisoned += ask.poisoned

    def record(self, stream: str) -> dict[str, float]:
        """Rows, where there are any, and shares of the actors' time, where they had some, as metrics."""
        total = self.busy_s + sum(self.waited_s.values())
        rows = {"rows/made": self.rows, "rows/poisoned": self.poisoned}
        record = {f"{name}/{stream}": float(count) for name, count in rows.items() if count}
        if not self.blocks or total <= 0:
            return record
        return record | {
            f"actors/busy_share/{stream}": self.busy_s / total,
            f"actors/waits_for_weights/{stream}": self.waited_s["weights"] / total,
            f"actors/waits_for_trainer/{stream}": (self.waited_s["credit"] + self.waited_s["phase"]) / total,
            f"actors/block_s/{stream}": self.busy_s / self.blocks,
        }


@dataclass
class Stream:
    """Credits of one stream, and what its actors do."""

    plan: StreamPlan
    actors: int
    """That make it at most; each may be at a block."""
    ready: int
    """Blocks that may lie ready besides: `replay.ahead` for every trainer worker."""
    begun: int = 0
    """Blocks that were ever begun."""

    def lacks(self, block: int, *, phase: int, version: int, step: int) -> Lack | None:
        """What `block` waits for, None if nothing, while the trainer is at `step` of `phase` with weights of `version`.

        A block beyond the plan, whose stream was longer when training began, is never needed and waits for ever.
        """
        if block >= len(self.plan):
            return "credit"
        if self.plan.phases[block] != phase:
            return "phase"
        if self.plan.versions[block] > version:
            return "weights"
        return "credit" if block >= self.needed_by(step) + self.actors + self.ready else None

    def needed_by(self, step: int) -> int:
        """Blocks that the trainer needs up to and including `step`."""
        return int(np.searchsorted(self.plan.needed, step, side="right"))

    def ahead(self, step: int) -> int:
        """Blocks that were begun and are not needed yet."""
        return max(0, self.begun - self.needed_by(step))
