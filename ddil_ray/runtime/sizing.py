"""How many actors the pools of a run should have: what was asked for, and a rule that follows the trainer's stall.

Plain state without Ray, which the hub holds. A pool is named after its source (`student`), or `labels/student` for the
label actors behind it. Its executor reports how many actors run and gets how many there should be (`pools.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Bounds", "Load", "Rule", "Sizing"]

Bounds = tuple[int, int]
"""(least, most) actors; equal where the number is fixed."""


@dataclass(frozen=True)
class Load:
    """What one pool and the trainer did over a stretch of time, as shares of it."""

    stall: float
    """The trainer waited for this pool's source."""
    stall_all: float
    """The trainer waited for any source."""
    busy: float
    """An actor of the pool worked, on average; the rest of the time it waited to be let go on."""


@dataclass(frozen=True)
class Rule:
    """The size of a pool that keeps the trainer from waiting for it.

    n actors that are busy for a share b of the time feed the trainer at the pace it has; without its stall S it would
    go 1 / (1 - S) times as fast, so it needs n b / (1 - S) actors, and some head-room because neither is steady. The
    pool grows to that only when the trainer waits for its source, and shrinks to it only when the trainer does not:
    between lies a band in which nothing moves. It grows soon and by up to its own size, since a trainer that waits is
    the dearest thing there is, and shrinks late and by a quarter, so that it does not have to come back.
    """

    stalls: float = 0.02
    """Share of the trainer's time spent waiting for a source beyond which its actors are too few."""
    headroom: float = 1.15
    """Actors in place of one that is needed."""
    settle_s: float = 20.0
    """Seconds after a change that are not looked at: blocks are then missing, or lie ready, that soon will not."""
    grow_s: float = 20.0
    """Seconds that a pool is watched before it grows."""
    shrink_s: float = 120.0
    """The same before it shrinks."""
    memory: int = 30
    """Times that a pool could shrink for which it does not go back to a size at which the trainer waited."""

    def size(self, actors: int, load: Load, *, too_few: int = 0) -> int:
        """What a pool of `actors` should become; `too_few` is a size at which the trainer waited before."""
        needed = actors * min(load.busy, 1.0) / max(1 - load.stall_all, 0.01)
        target = math.ceil(needed * self.headroom - 1e-9)
        if load.stall > self.stalls:
            return max(actors, min(target, 2 * actors))
        return min(actors, max(target, actors - max(1, actors // 4), too_few + 1, 1))


@dataclass
class _Pool:
    """One pool: its bounds, how many actors it should have and has, and what it did since it had them."""

    bounds: Bounds
    wanted: int
    count: int = 0
    settling_s: float = 0.0
    """Of these that are still to pass before anything is looked at."""
    seconds: float = 0.0
    stall_s: float = 0.0
    stall_all_s: float = 0.0
    busy_s: float = 0.0
    too_few: int = 0
    """The largest size at which the trainer waited."""
    calm: int = 0
    """Times since then that the pool could have shrunk."""

    def restart(self) -> None:
        """Look from now on."""
        self.seconds = self.stall_s = self.stall_all_s = self.busy_s = 0.0

    def add(self, seconds: float, load: Load) -> None:
        """Observe a stretch of time."""
        if self.settling_s > 0:
            self.settling_s -= seconds
            return
        self.seconds += seconds
        self.stall_s += seconds * load.stall
        self.stall_all_s += seconds * load.stall_all
        self.busy_s += seconds * load.busy

    def decide(self, rule: Rule) -> None:
        """Follow the rule, if it is time."""
        load = Load(self.stall_s / self.seconds, self.stall_all_s / self.seconds, self.busy_s / self.seconds)
        stalls = load.stall > rule.stalls
        if self.seconds < (rule.grow_s if stalls else rule.shrink_s):
            return
        self.calm = 0 if stalls else self.calm + 1
        self.too_few = 0 if self.calm > rule.memory else self.too_few
        size = rule.size(self.count, load, too_few=self.too_few)
        if size > self.count:
            self.too_few = max(self.too_few, self.count)
        if size < self.count or self.count >= self.wanted:  # one that still starts is waited for, not added to
            self.aim(size)
        self.restart()

    def aim(self, size: int) -> None:
        """Want `size` actors, or as near as the bounds allow."""
        low, high = self.bounds
        self.wanted = min(max(size, low), high)


@dataclass
class Sizing:
    """The pools of a run.

    Example: `Sizing({"student": (1, 4)})` begins with one actor. The executor's `report("student", 1)` gives 1; after
    records that show a trainer waiting for students, it gives 2.
    """

    bounds: Mapping[str, Bounds]
    rule: Rule = field(default_factory=Rule)

    def __post_init__(self) -> None:
        self._pools = {name: _Pool(bounds, bounds[0]) for name, bounds in self.bounds.items()}
        self._last: float | None = None

    def resize(self, bounds: Mapping[str, Bounds]) -> None:
        """Give pools other bounds; asking for the same twice changes nothing."""
        for name, wish in bounds.items():
            pool = self._pools[name]
            if pool.bounds != wish:
                pool.bounds = wish
                pool.aim(pool.wanted)
                pool.restart()

    def report(self, counts: Mapping[str, int]) -> tuple[dict[str, int], dict[str, float]]:
        """The executor of some pools runs `counts` actors: how many each should have, and what changed, as metrics."""
        changed = {}
        for name, count in counts.items():
            pool = self._pools[name]
            if pool.count == 0:  # where this is new to pools that are at work, they keep their sizes
                pool.aim(max(count, pool.wanted))
            if count != pool.count:
                pool.count, pool.settling_s = count, self.rule.settle_s
                pool.restart()
                changed[f"actors/count/{name}"] = float(count)
        return {name: self._pools[name].wanted for name in counts}, changed

    def actors(self, source: str) -> int:
        """How many actors make and label the states of `source`."""
        return sum(pool.count for name, pool in self._pools.items() if source in (name, name.removeprefix("labels/")))

    def observe(self, record: Mapping[str, float], busy_s: Mapping[str, float], *, now: float) -> None:
        """Follow the rule where a pool has bounds to move in.

        Args:
            record: metrics of the trainer since the last one: `trainer/stall_share`, and the same with a source's name
                behind where the trainer waited for it.
            busy_s: seconds that the actors of a pool worked meanwhile, all together.
            now: seconds of any clock.
        """
        seconds, self._last = (0.0 if self._last is None else now - self._last), now
        for name, pool in self._pools.items():
            if pool.bounds[0] == pool.bounds[1] or pool.count == 0 or seconds <= 0:
                continue
            stall = record.get(f"trainer/stall_share/{name.removeprefix('labels/')}", 0.0)
            busy = busy_s.get(name, 0.0) / (pool.count * seconds)
            pool.add(seconds, Load(stall, record.get("trainer/stall_share", 0.0), busy))
            if pool.seconds > 0:
                pool.decide(self.rule)
