"""What the hub knows of the streams' actors: what each is at, which died and of what, and when that is too much.

Plain rules without Ray or torch, like those of `admission.py`.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

__all__ = ["Health", "Limits", "Newcomer"]

_HANGS = 2
"""Times that a pool's actors may hang, however long ago."""


@dataclass(frozen=True)
class Limits:
    """When a run gives up; see the config group `faults`."""

    max_deaths: int = 5
    window_s: float = 600.0


@dataclass(frozen=True)
class Newcomer:
    """An actor that starts."""

    actor: str
    """Ray's id of it, which it keeps when it is started again."""
    worker: str
    """Ray's id of its process."""
    pool: str
    role: str
    """The config group of the pool."""
    incarnation: int
    """Number of the worker group whose stream it belongs to; later ones have greater numbers."""


@dataclass
class _Actor:
    of: Newcomer
    doing: str
    since: float


@dataclass
class Health:
    """The actors of a run's streams, and why the run must end if it must.

    Times are seconds of any clock.
    """

    limits: Limits = field(default_factory=Limits)
    failure: str | None = None
    """Why the run must end: the first reason."""
    died: Counter[str] = field(default_factory=Counter)
    """Deaths of actors by pool, over the whole run."""
    _actors: dict[str, _Actor] = field(default_factory=dict)
    _deaths: defaultdict[str, deque[float]] = field(default_factory=lambda: defaultdict(deque))
    _hangs: Counter[str] = field(default_factory=Counter)
    _words: dict[str, str] = field(default_factory=dict)

    def fail(self, reason: str) -> None:
        """The run must end."""
        self.failure = self.failure or reason

    def predecessor(self, actor: str) -> str | None:
        """The process that an actor, which starts now, had before and died with; None where it is new."""
        return self._actors[actor].of.worker if actor in self._actors else None

    def joined(self, newcomer: Newcomer, *, now: float, cause: str = "") -> None:
        """An actor starts. `cause` is what Ray says of the end of its `predecessor`, if there is one."""
        actor, pool = newcomer.actor, newcomer.pool
        if actor in self._actors:
            told = self._words.pop(actor, None)
            self._count_death(pool, newcomer.role, told or cause or "no reason is known", now)
        # With a trainer that starts again come pools of other actors.
        gone = [a for a, n in self._actors.items() if n.of.pool == pool and n.of.incarnation < newcomer.incarnation]
        for other in gone:
            del self._actors[other]
        self._actors[actor] = _Actor(newcomer, "loads its models", now)

    def last_words(self, actor: str, words: str, *, hung: bool) -> None:
        """What an actor says before its process ends itself."""
        self._words[actor] = words
        if hung and actor in self._actors:
            self._hangs[self._actors[actor].of.pool] += 1

    def words_of(self, actor: str) -> str | None:
        """The last words of an actor that has not come back."""
        return self._words.get(actor)

    def doing(self, actor: str, what: str, *, now: float) -> None:
        """An actor is at something else."""
        if actor in self._actors and self._actors[actor].doing != what:
            self._actors[actor].doing, self._actors[actor].since = what, now

    def standing(self, source: str, *, now: float) -> str:
        """What the actors of a source are at, and of its labels if others make them."""
        actors = [a for a in self._actors.values() if source in (a.of.pool, a.of.pool.removeprefix("labels/"))]
        if not actors:
            return "none of its actors has started"
        return ", ".join(f"an actor of {a.of.role} {a.doing} since {now - a.since:.0f} s" for a in actors)

    def _count_death(self, pool: str, role: str, cause: str, now: float) -> None:
        self.died[pool] += 1
        deaths = self._deaths[pool]
        deaths.append(now)
        while deaths[0] < now - self.limits.window_s:
            deaths.popleft()
        if len(deaths) > self.limits.max_deaths:
            times = f"{len(deaths)} times in {self.limits.window_s:g} s (`faults.max_deaths`: {self.limits.max_deaths})"
        elif self._hangs[pool] > _HANGS:
            times = f"as they hung {self._hangs[pool]} times"
        else:
            return
        self.fail(f"Actors of `{role}` must stay alive, but died {times}; last cause: {cause}.{_advice(role, cause)}")


def _advice(role: str, cause: str) -> str:
    if "hung" in cause:
        return " If that work is just slow, raise `faults.timeout_s`."
    if any(sign in cause.lower() for sign in ("out of memory", "oom", "low on memory", "sigkill")):
        return f" Where memory is what lacks, lower `{role}.batch_size` or `num_actors`."
    return ""
