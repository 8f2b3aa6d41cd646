"""The one actor that all processes of a run know: weights with versions, admission of rollouts, records, stop flag.

It owns the published weights (an object dies with the process that put it), so that rollouts outlive a trainer. The
rules are in `HubState` and `Measured`, which need no Ray; `Hub` adds the transport.

| who | calls | waits for |
| --- | --- | --- |
| trainer rank 0 | begin, start_phase, publish, push | nothing (adoption is awaited before the next publish) |
| every rank | should_stop(step) | nothing |
| state actors | start_of, admit | the trainer to begin; phase and version of their block |
| monitor | to_measure, push | weights that are due (`Cadence`), or the end |
| streams' executors | pool_sizes, cannot_resize | nothing |
| driver | drain, request_stop, training_ended, resize | nothing |
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray

from ddil_ray.runtime.sizing import Bounds, Sizing
from ddil_ray.training.cadence import Cadence

if TYPE_CHECKING:
    from ddil_ray.training.weights import FlatWeights

__all__ = ["Grant", "Hub", "HubState", "Measured"]

_RECORDS_KEPT = 10_000


@dataclass(frozen=True)
class Grant:
    """Permission to make a block or to measure, and where newer weights are if there are any."""

    phase: int
    version: int
    student: Any = None
    """Reference to flat student weights, or None if the caller's are as new."""
    teacher: Any = None
    """Reference to the flat weights of this phase's teacher, or None for the given teacher."""


@dataclass
class HubState:
    """Who may make which block.

    A block of phase p whose last row is trained on at global step n is admitted once phase p is on and weights of
    version >= n - max_staleness are published. Its rows then carry that version or a newer one, so at the step that
    trains on them they are at most max_staleness steps old: the bound holds whatever the speeds.
    """

    incarnations: Counter[str] = field(default_factory=Counter)
    """Starts of the worker group, counted by each stream as it is built anew."""
    begun: int = 0
    """Incarnation whose trainer has begun; whatever belongs to an older one is void."""
    start_step: int = 0
    phase: int = -1
    version: int = -1
    seen_step: int = -1
    stop_step: int | None = None
    records: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=_RECORDS_KEPT))

    def incarnation_of(self, stream: str) -> int:
        """`stream` is built for a new worker group; its number, from 1."""
        self.incarnations[stream] += 1
        return self.incarnations[stream]

    def begin(self, start_step: int) -> None:
        """The trainer of the newest worker group goes on from `start_step`; older publications are void."""
        self.begun, self.start_step = max(self.incarnations.values(), default=1), start_step
        self.phase = self.version = self.seen_step = -1

    def admits(self, phase: int, min_version: int) -> bool:
        """Whether a block of `phase` that needs `min_version` may be made now."""
        return self.phase == phase and self.version >= min_version

    def should_stop(self, step: int) -> bool:
        """The same answer to every rank: the stop lies two steps beyond the furthest rank seen."""
        self.seen_step = max(self.seen_step, step)
        return self.stop_step is not None and step >= self.stop_step

    def request_stop(self) -> None:
        """Stop all ranks at one step that none has passed."""
        if self.stop_step is None:
            self.stop_step = self.seen_step + 2


@dataclass
class Measured:
    """Which weights the monitor gets: those that are due, held until it takes them, and at the end the newest."""

    cadence: Cadence | None
    """None where nothing is measured."""
    newest: Grant | None = None
    held: Grant | None = None
    ended: bool = False

    def published(self, grant: Grant) -> None:
        """There are newer weights."""
        self.newest = grant
        self._hold()

    def take(self) -> Grant | None:
        """The held weights, which are being measured from now on; None where none are."""
        held, self.held = self.held, None
        if held is not None and self.cadence is not None:
            self.cadence.took(held.phase, held.version)
            self._hold()
        return held

    def end(self) -> None:
        """No more weights come: the newest are the last to measure, unless they have been taken."""
        self.ended = True
        if self.cadence is not None and self.newest is not None:
            taken = (self.newest.phase, self.newest.version) == (self.cadence.phase, self.cadence.version)
            self.held = None if taken else self.newest

    def _hold(self) -> None:
        if self.held is not None or self.newest is None or self.cadence is None:
            return
        if self.cadence.due(self.newest.phase, self.newest.version) and not self.ended:
            self.held = self.newest


@ray.remote(num_cpus=0, max_restarts=0, max_concurrency=1000)
class Hub:
    """`HubState` behind an actor, with the weights.

    Args:
        measure_every: steps between the weights that a monitor gets; None where there is no monitor.
        pools: bounds of the actor pools.
    """

    def __init__(self, measure_every: int | None = None, pools: Mapping[str, Bounds] | None = None) -> None:
        self.state = HubState()
        self.sizing = Sizing(pools or {})
        self._cannot_resize: str | None = None
        self._measured = Measured(None if measure_every is None else Cadence(measure_every))
        self._changed = asyncio.Condition()
        self._student: Any = None
        self._teacher: Any = None
        self._stored_bytes = 0

    async def incarnation_of(self, stream: str) -> int:
        """Number of the worker group that `stream` is being built for."""
        return self.state.incarnation_of(stream)

    async def begin(self, start_step: int) -> None:
        """See `HubState.begin`."""
        self.state.begin(start_step)
        await self._notify()

    async def start_of(self, incarnation: int) -> int:
        """Step that the trainer of `incarnation` goes on from; waits until it has begun."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.state.begun >= incarnation)
        return self.state.start_step

    async def start_phase(self, phase: int, version: int, student: list[Any], teacher: list[Any]) -> None:
        """Publish the first weights of a phase, and its teacher's where it has a new one.

        References come in lists, so that Ray passes them on unresolved.
        """
        self._teacher = await self._adopt(teacher)
        self._student = await self._adopt(student)
        self.state.phase, self.state.version = phase, version
        await self._published()

    async def publish(self, version: int, student: list[Any]) -> None:
        """Publish newer student weights; readers see the old or the new, never a mixture."""
        self._student = await self._adopt(student)
        self.state.version = version
        await self._published()

    async def admit(self, phase: int, min_version: int, known: tuple[int, int]) -> Grant:
        """Wait until the block may be made; `known` is the caller's (phase, version)."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.state.admits(phase, min_version))
        version = self.state.version
        new_phase = known[0] != phase
        return Grant(
            phase,
            version,
            [self._student] if new_phase or version > known[1] else None,
            [self._teacher] if new_phase and self._teacher is not None else None,
        )

    async def to_measure(self) -> Grant | None:
        """Wait for weights that are due, the oldest that are held; None once training has ended."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._measured.held is not None or self._measured.ended)
        return self._measured.take()

    async def training_ended(self) -> None:
        """See `Measured.end`."""
        self._measured.end()
        await self._notify()

    async def should_stop(self, step: int) -> bool:
        """See `HubState.should_stop`."""
        return self.state.should_stop(step)

    async def request_stop(self) -> None:
        """See `HubState.request_stop`."""
        self.state.request_stop()

    async def push(self, record: dict[str, float]) -> None:
        """Keep a record until the driver takes it; the oldest go if the driver does not."""
        self.state.records.append(record)
        if "trainer/stall_share" in record:
            self.sizing.observe(record, now=time.monotonic())

    async def pool_sizes(self, counts: dict[str, int]) -> dict[str, int]:
        """See `Sizing.report`."""
        wanted, changed = self.sizing.report(counts)
        if changed:
            self.state.records.append({"step": max(0, self.state.seen_step), **changed})
        return wanted

    async def resize(self, bounds: dict[str, Bounds]) -> str | None:
        """See `Sizing.resize`; why it cannot be done, if it cannot."""
        if self._cannot_resize is None:
            self.sizing.resize(bounds)
        return self._cannot_resize

    async def cannot_resize(self, reason: str) -> None:
        """An executor cannot change the sizes of its pools."""
        self._cannot_resize = reason

    async def drain(self) -> list[dict[str, float]]:
        """Take all records."""
        records = list(self.state.records)
        self.state.records.clear()
        return records

    async def _published(self) -> None:
        teacher = [self._teacher] if self._teacher is not None else None
        self._measured.published(Grant(self.state.phase, self.state.version, [self._student], teacher))
        self.state.records.append({"step": self.state.version, "sync/bytes": self._stored_bytes})
        await self._notify()

    async def _adopt(self, boxed: list[Any]) -> Any:
        """Re-put an object so that it is this actor's own."""
        if not boxed:
            return None
        weights: FlatWeights = await boxed[0]
        self._stored_bytes = sum(part.nbytes for part in weights.values())
        return ray.put(weights)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
