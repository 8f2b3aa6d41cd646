"""The run in virtual time: when every block is made and every step ends, from how long each thing takes.

Streams of blocks made by pools of actors, ranks that take them in turn and meet at every gradient exchange, credits and
weights that blocks wait for: each time is a maximum of earlier times plus a duration (a max-plus recursion), so
integer numbers of actors and finite buffers are accounted for exactly, where durations are as given. docs/plan.md has
the equations. Ordinary code without Ray or torch; thousands of steps take a second.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = ["Forecast", "Stream", "Update", "forecast"]


@dataclass(frozen=True)
class Stream:
    """One source: a pool of actors that make its blocks, and a pool behind it that labels them if there is one."""

    name: str
    needed: np.ndarray
    """(steps,) blocks that each rank must have taken to do each step, cumulative."""
    actors: int
    block_s: np.ndarray
    """(blocks per rank,) seconds that an actor needs for a block."""
    after: np.ndarray | None = None
    """(blocks per rank,) steps whose weights a block waits for, at most the step that needs it; None: for none."""
    label_s: float = 0.0
    """Seconds that a labelling actor needs for a block."""
    labellers: int = 0
    """0 where the actors that make blocks label them, in `block_s`."""
    ready: int = 0
    """Blocks, over all ranks, that may lie ready beside one per actor."""


@dataclass(frozen=True)
class Update:
    """What the trainer does in a step, once it has its states."""

    seconds: float
    every: int = 1
    """Steps between publications of weights."""
    publication_s: float = 0.0
    """Seconds that a publication keeps the trainer."""
    lag_s: float = 0.0
    """Seconds from the end of a step to when actors may have its weights."""


@dataclass(frozen=True)
class Forecast:
    """What comes of it."""

    ends: np.ndarray
    """(steps,) seconds at which each step ends."""
    waits: np.ndarray
    """(steps,) seconds that the slowest rank waited for states before each step."""
    busy: dict[str, float]
    """Share of their time that the actors of each stream worked, over the steps that `since` leaves."""
    since: int
    """First step that counts: before it the pipeline fills."""

    @property
    def step_s(self) -> float:
        """Mean seconds of a step."""
        return float(self._seconds) / (len(self.ends) - self.since)

    @property
    def stall(self) -> float:
        """Share of the trainer's time that went into waiting for states."""
        return float(self.waits[self.since :].sum() / self._seconds)

    @property
    def _seconds(self) -> float:
        return float(self.ends[-1] - (self.ends[self.since - 1] if self.since else 0.0))


def forecast(streams: Sequence[Stream], update: Update, *, ranks: int) -> Forecast:
    """All steps of a phase with `ranks` trainer workers, which start with nothing made."""
    steps = len(streams[0].needed)
    runs = [_Run(stream, ranks) for stream in streams]
    ends, waits, now = np.zeros(steps), np.zeros(steps), 0.0
    published = np.zeros(steps + 1)
    for step in range(steps):
        begun = now
        for run in runs:
            run.reached(min(step + 1, steps - 1), begun)
        for run in runs:
            now = max(now, run.take(step, published))
        waits[step] = now - begun
        now += update.seconds
        if (step + 1) % update.every == 0:
            now += update.publication_s
        ends[step], published[step + 1] = now, now + update.lag_s
    since = _filled(streams, steps)
    start = ends[since - 1] if since else 0.0
    busy = {run.stream.name: run.busy(float(start), now) for run in runs}
    return Forecast(ends, waits, busy, since)


def _filled(streams: Sequence[Stream], steps: int) -> int:
    """Step from which start-up is over: each actor has made two blocks, or half of all steps are done."""
    first = 0
    for stream in streams:
        enough = np.searchsorted(stream.needed, 2)
        first = max(first, int(enough))
    return min(max(first, steps // 10), steps // 2)


@dataclass
class _Run:
    """A stream as it goes."""

    stream: Stream
    ranks: int
    made: int = 0
    """Blocks that were made, over all ranks."""
    arrived: float = 0.0
    """When the last of them was there: blocks come in order."""
    credits: list[float] = field(default_factory=list)
    """When each block no longer counted as ready, as far as the trainer has come."""
    finished: list[tuple[float, float]] = field(default_factory=list)
    """(end, seconds) of the work on each block."""

    def __post_init__(self) -> None:
        self.free = [0.0] * self.stream.actors
        self.labelling = [0.0] * self.stream.labellers

    def reached(self, step: int, now: float) -> None:
        """What the trainer needs up to `step`, which is its next, no longer counts as ready."""
        self.credits += [now] * (int(self.stream.needed[step]) * self.ranks - len(self.credits))

    def take(self, step: int, published: np.ndarray) -> float:
        """When every rank has the blocks it needs for `step`."""
        while self.made < int(self.stream.needed[step]) * self.ranks:
            self._make(published)
        return self.arrived

    def _make(self, published: np.ndarray) -> None:
        mine = self.made // self.ranks
        may = self._credit(self.made)
        if self.stream.after is not None:
            may = max(may, float(published[self.stream.after[mine]]))
        seconds = float(self.stream.block_s[mine])
        there = _served(self.free, may, seconds)
        self.finished.append((there, seconds))
        if self.labelling:
            there = _served(self.labelling, there, self.stream.label_s)
        self.arrived = max(self.arrived, there)
        self.made += 1

    def _credit(self, block: int) -> float:
        """When `block` may begin: once the one that many places before it is needed."""
        before = block - self.stream.actors - self.stream.labellers - self.stream.ready
        return self.credits[before] if before >= 0 else 0.0

    def busy(self, start: float, end: float) -> float:
        """Share of their time from `start` to `end` that the actors worked."""
        worked = sum(seconds for done, seconds in self.finished if start < done <= end)
        return worked / max(end - start, 1e-12) / self.stream.actors


def _served(free: list[float], ready: float, seconds: float) -> float:
    """When work that is `ready` is done by the first of the servers, which are `free` at these times."""
    done = max(free[0], ready) + seconds
    heapq.heapreplace(free, done)
    return done
