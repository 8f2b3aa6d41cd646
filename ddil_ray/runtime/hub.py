"""The one actor that all processes of a run know: weights with versions, admission of blocks, records, stop flag.

It owns the published weights (an object dies with the process that owns it), so that rollouts outlive a trainer. It may
die itself: Ray starts it again, calls under way are repeated, and rank 0, which has what it published last, begins anew
(`Publisher`); half a second's records are lost. The rules are in `HubState`, `Stream` and `Measured` and need no Ray;
`Hub` adds the transport. Nothing that it is sent may import torch, which would make it start several seconds later.

| who | calls | waits for |
| --- | --- | --- |
| trainer rank 0 | begin, publish, push | nothing (a thread does the first two) |
| every rank | wish(step), request_save, log, tell | nothing |
| state and label actors | plan_of, admit | the trainer to begin; phase, weights and credit of their block |
| | joined, last_words, fail | nothing |
| Ray Train's controller | incarnation, look | nothing |
| readers of streams | standing | nothing |
| monitor | to_measure, push | weights that are due (`Cadence`), or the end |
| streams' executors | pool_sizes, cannot_resize | nothing |
| driver | drain, failure, idle_s, trainer_words, request_stop, training_ended, resize | nothing |
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray

from ddil_ray.runtime.admission import Ask, Lack, Stream, StreamPlan, Work
from ddil_ray.runtime.exits import exit_of
from ddil_ray.runtime.health import Health, Newcomer
from ddil_ray.runtime.measured import Measured
from ddil_ray.runtime.records import Ranks
from ddil_ray.runtime.sizing import Bounds, Sizing
from ddil_ray.training.cadence import Cadence

if TYPE_CHECKING:
    from ddil_ray.training.loop import Wish
    from ddil_ray.training.wire import FlatWeights

__all__ = ["LAID_OUT", "Grant", "Hub", "HubState", "Publication", "laid_out"]

LAID_OUT: dict[str, FlatWeights] = {}
"""What the hub may take from this process: weights of `student` and `teacher`."""
_RECORDS_KEPT = 10_000


@dataclass(frozen=True)
class Grant:
    """Permission to make a block or to measure, and where newer weights are if there are any."""

    phase: int
    version: int
    student: Any = None
    """Reference to flat student weights, boxed so that Ray passes it on unresolved; None if the caller's are as new."""
    teacher: Any = None
    """Reference to the flat weights of this phase's teacher, or None for the given teacher."""


@dataclass(frozen=True)
class Publication:
    """Weights that lie ready in the process of an actor, in its `LAID_OUT`: those of the student."""

    phase: int
    version: int
    source: Any
    """Handle of the actor."""
    teacher: bool = False
    """Whether those of the phase's teacher lie there too; else it is the given teacher."""
    waited_s: float = 0.0
    """Since the trainer had them."""


@dataclass
class HubState:
    """Who may make which block."""

    begun: int = 0
    """When the trainer began that is at work, in ns of this process's clock; older ones are void. 0 before any."""
    start_step: int = 0
    streams: dict[str, Stream] = field(default_factory=dict)
    works: defaultdict[str, Work] = field(default_factory=lambda: defaultdict(Work))
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of the newest block of every pool."""
    phase: int = -1
    version: int = -1
    seen_step: int = -1
    save_step: int | None = None
    stop_step: int | None = None
    records: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_RECORDS_KEPT))

    def incarnation(self, *, now: int) -> int:
        """A number for a worker group that is about to start: trainers that begin later have no smaller one."""
        return max(now, self.begun + 1)

    def begin(self, start_step: int, streams: Mapping[str, Stream], reached: int, *, now: int, before: int = 0) -> int:
        """A trainer counts its streams from `start_step`, and has reached a step; older publications are void.

        Returns a number that its publications carry. `before` is the one that it had of a hub that died, maybe on a
        machine whose clock was ahead of `now`: actors of its streams wait for one that is no smaller.
        """
        self.begun = max(now, self.begun + 1, before + 1)
        self.start_step, self.streams = start_step, dict(streams)
        self.phase, self.version, self.seen_step, self.save_step, self.stop_step = -1, -1, reached, None, None
        return self.begun

    def lacks(self, ask: Ask) -> Lack | None:
        """What an actor must wait for; None if it may go on."""
        if not 0 <= ask.phase == self.phase:  # there is none before a trainer has begun, nor behind the plan's end
            return "phase"
        if ask.block is None:
            return None
        return self.streams[ask.stream].lacks(ask.block, phase=self.phase, version=self.version, step=self.seen_step)

    def granted(self, ask: Ask) -> None:
        """Count what the actor did before, and the block that it begins."""
        self.works[ask.stream].add(ask)
        if ask.size:
            self.sizes[ask.stream] = ask.size
        if ask.block is not None:
            stream = self.streams[ask.stream]
            stream.begun = max(stream.begun, ask.block + 1)

    def wish(self, step: int) -> Wish | None:
        """See `Hooks.wish`: what is wanted lies two steps beyond the furthest rank seen when it was asked for."""
        self.seen_step = max(self.seen_step, step)
        if self.stop_step is not None and step >= self.stop_step:
            return "stop"
        return "save" if step == self.save_step else None

    def request_save(self) -> None:
        """Let all ranks write a checkpoint at one step that none has passed; to be asked for until it is wished."""
        self.save_step = self.seen_step + 2 if self.begun else None  # else how far they are is not known

    def request_stop(self) -> None:
        """Stop all ranks at one step that none has passed; to be asked for until they have."""
        if self.stop_step is None and self.begun:
            self.stop_step = self.seen_step + 2

    def work(self) -> dict[str, float]:
        """What the actors of every stream did since this was last called, and how far ahead of the trainer they are."""
        record: dict[str, float] = {}
        for name, stream in self.streams.items():
            blocks = record[f"actors/blocks_ahead/{name}"] = stream.ahead(self.seen_step)
            size = self.sizes.get(f"labels/{name}", self.sizes.get(name))
            if size is not None:
                record[f"actors/bytes_ahead/{name}"] = blocks * size
        for name, work in self.works.items():
            record |= work.record(name)
        self.works.clear()
        return record


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=100_000)  # every actor that waits is one
class Hub:
    """`HubState` behind an actor, with the weights.

    Args:
        measure_every: steps between the weights that a monitor gets; None where there is no monitor.
        pools: bounds of the actor pools.
        max_deaths: of an actor, see `Health`.
    """

    def __init__(
        self,
        measure_every: int | None = None,
        pools: Mapping[str, Bounds] | None = None,
        max_deaths: int = 5,
    ) -> None:
        self.state = HubState()
        self.health = Health(max_deaths)
        self.sizing = Sizing(pools or {})
        self._cannot_resize: str | None = None
        self._ranks = Ranks()
        self._measured = Measured(None if measure_every is None else Cadence(measure_every))
        self._changed = asyncio.Condition()
        self._student: Any = None
        self._teacher: Any = None
        self._looked = time.monotonic()

    async def incarnation(self) -> int:
        """See `HubState.incarnation`."""
        return self.state.incarnation(now=time.time_ns())

    async def begun(self) -> int:
        """What `begin` last returned; 0 where none has, as after a restart of this actor."""
        return self.state.begun

    async def begin(self, start_step: int, streams: dict[str, Stream], reached: int, before: int = 0) -> int:
        """See `HubState.begin`."""
        token = self.state.begin(start_step, streams, reached, now=time.time_ns(), before=before)
        self._ranks.clear()
        self.health.began()
        for name, stream in self.state.streams.items():  # of pools that told their sizes before
            stream.actors = self.sizing.actors(name) or stream.actors
        await self._notify()
        return token

    async def plan_of(self, incarnation: int, stream: str) -> StreamPlan:
        """Blocks of `stream` that the trainer of `incarnation` takes; waits until it has begun."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.state.begun >= incarnation)
        return self.state.streams[stream].plan

    async def publish(self, token: int, publication: Publication) -> bool:
        """Take weights over from where they lie; readers see the old or the new, never a mixture.

        `token` is what `begin` returned to the publisher. False where that is void, and nothing was done.
        """
        if token != self.state.begun:
            return False
        started = time.perf_counter()
        student, size = await self._fetch(publication.source, "student")
        teacher = self._teacher
        if publication.phase != self.state.phase:
            teacher = (await self._fetch(publication.source, "teacher"))[0] if publication.teacher else None
        if token != self.state.begun:
            return False
        self._student, self._teacher = student, teacher
        self.state.phase, self.state.version = publication.phase, publication.version
        self._measured.published(Grant(self.state.phase, self.state.version, [student], teacher and [teacher]))
        seconds = publication.waited_s + time.perf_counter() - started
        self.state.records.append({"step": publication.version, "sync/bytes": size, "sync/seconds": seconds})
        await self._notify()
        return True

    async def admit(self, ask: Ask, patience_s: float | None = None) -> Grant | None:
        """Wait until the actor may go on, at most `patience_s`; None where it may not."""
        if ask.busy_s > 0:
            self.health.finished(ask.actor)
        until = None if patience_s is None else time.perf_counter() + patience_s
        async with self._changed:
            while (lack := self.state.lacks(ask)) is not None:
                since = time.perf_counter()
                if until is not None and since >= until:
                    return None
                self.health.doing(ask.actor, f"waits for {lack}", now=time.monotonic(), rests=True)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), until and until - since)
                self.state.works[ask.stream].waited_s[lack] += time.perf_counter() - since
        self.health.doing(ask.actor, ask.work, now=time.monotonic())
        self.state.granted(ask)
        new_phase = ask.known[0] != ask.phase
        return Grant(
            ask.phase,
            self.state.version,
            [self._student] if new_phase or self.state.version > ask.known[1] else None,
            [self._teacher] if new_phase and self._teacher is not None else None,
        )

    async def joined(self, newcomer: Newcomer) -> None:
        """See `Health.joined`."""
        before = self.health.predecessor(newcomer.actor)
        cause = "" if before is None else exit_of(before)
        self.health.joined(newcomer, now=time.monotonic(), cause=cause)

    async def last_words(self, actor: str, words: str, hung: bool) -> None:
        """See `Health.last_words`."""
        self.health.last_words(actor, words, hung=hung)

    async def trainer_words(self) -> str | None:
        """See `Health.trainer_words`."""
        return self.health.trainer_words()

    async def fail(self, reason: str) -> None:
        """See `Health.fail`."""
        self.health.fail(reason)

    async def failure(self) -> str | None:
        """Why the run must end; None if it need not."""
        return self.health.failure

    async def look(self) -> str | None:
        """`failure`, for who looks after a trainer that runs."""
        self._looked = time.monotonic()
        return self.health.failure

    async def idle_s(self) -> float:
        """Seconds since a trainer that runs was last looked after."""
        return time.monotonic() - self._looked

    async def standing(self, source: str) -> str:
        """What the actors of `source` are at, and what the hub has of what they may wait for."""
        state = self.state
        at = f"the trainer is at step {state.seen_step}, weights are of phase {state.phase} and step {state.version}"
        return f"{self.health.standing(source, now=time.monotonic())}; {at}"

    async def to_measure(self) -> Grant | None:
        """Wait for weights that are due, the oldest that are held; None once training has ended."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._measured.held is not None or self._measured.ended)
        return self._measured.take()

    async def training_ended(self) -> None:
        """See `Measured.end`."""
        self._measured.end()
        await self._notify()

    async def wish(self, step: int) -> Wish | None:
        """See `HubState.wish`."""
        before = self.state.seen_step
        wish = self.state.wish(step)
        if self.state.seen_step > before:  # which returns credits
            await self._notify()
        return wish

    async def request_save(self) -> None:
        """See `HubState.request_save`."""
        self.state.request_save()

    async def request_stop(self) -> None:
        """See `HubState.request_stop`."""
        self.state.request_stop()

    async def log(self, record: dict[str, float], rank: int, ranks: int) -> None:
        """Keep the trainer's record, with what actors did, once every rank has given its own of that step."""
        whole = self._ranks.add(record, rank, ranks)
        if whole is not None:
            busy_s = {name: work.busy_s for name, work in self.state.works.items()}
            self.sizing.observe(whole, busy_s, now=time.monotonic())
            deaths = {f"actors/deaths/{pool}": float(count) for pool, count in self.health.died.items()}
            self.state.records.append(whole | self.state.work() | deaths)

    async def push(self, record: dict[str, float]) -> None:
        """Keep a record until the driver takes it; the oldest go if it does not."""
        self.state.records.append(record)

    async def tell(self, note: str) -> None:
        """Keep what the user should know until the driver takes it, among the records."""
        self.state.records.append({"note": note})

    async def pool_sizes(self, counts: dict[str, int]) -> dict[str, int]:
        """See `Sizing.report`. A stream has as many credits as it has actors."""
        wanted, changed = self.sizing.report(counts)
        if changed:
            for name, stream in self.state.streams.items():
                stream.actors = self.sizing.actors(name) or stream.actors
            self.state.records.append({"step": max(0, self.state.seen_step), **changed})
            await self._notify()
        return wanted

    async def resize(self, bounds: dict[str, Bounds]) -> str | None:
        """See `Sizing.resize`; why it cannot be done, if it cannot."""
        if self._cannot_resize is None:
            self.sizing.resize(bounds)
        return self._cannot_resize

    async def cannot_resize(self, reason: str) -> None:
        """An executor cannot change the sizes of its pools."""
        self._cannot_resize = reason

    async def drain(self) -> list[dict[str, Any]]:
        """Take all records, and notes, which are records of a `note` alone."""
        records = list(self.state.records)
        self.state.records.clear()
        return records

    @staticmethod
    async def _fetch(source: Any, whose: str) -> tuple[Any, int]:
        """A reference to what lies ready in the process of `source`, and its bytes.

        Who calls a method of an actor owns what it returns: the weights are written to the store of the source's node
        once, and stay there when the source dies.
        """
        weights, size = source.__ray_call__.options(num_returns=2).remote(laid_out, whose)
        return weights, await size

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def laid_out(source: Any, whose: str) -> tuple[FlatWeights, int]:
    """What lies ready, and its bytes. Called in the process of the actor `source`."""
    weights = LAID_OUT[whose]
    return weights, sum(part.nbytes for part in weights.values())
