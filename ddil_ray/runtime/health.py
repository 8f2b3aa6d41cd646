"""What the hub knows of the streams' actors: what each is at, which died and of what, and when that is too much.

Plain rules without Ray or torch, like those of `admission.py`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["TRAINER", "Health", "Newcomer"]

TRAINER = "trainer-"
"""What names of the trainer's processes begin with."""

_HANGS = 2
"""Times in a row that an actor may hang."""


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
    rests: bool = False
    """It waits to be let go on: whatever it dies of, it is no work of its own."""
    deaths: int = 0
    """At work, since it last finished a block; Ray repeats the block that it died at."""
    hangs: int = 0
    """Of these."""


@dataclass
class Health:
    """The actors of a run's streams, and why the run must end if it must.

    Machines go and processes are killed, however often: that is lived through. What ends a run is an actor that dies of
    its own work again and again, so that it finishes nothing in between. Times are seconds of any clock.
    """

    max_deaths: int = 5
    failure: str | None = None
    """Why the run must end: the first reason."""
    died: Counter[str] = field(default_factory=Counter)
    """Deaths of actors by pool, over the whole run."""
    _actors: dict[str, _Actor] = field(default_factory=dict)
    _words: dict[str, str] = field(default_factory=dict)

    def fail(self, reason: str) -> None:
        """The run must end."""
        self.failure = self.failure or reason

    def predecessor(self, actor: str) -> str | None:
        """The process that an actor, which starts now, had before and died with; None where it is new."""
        return self._actors[actor].of.worker if actor in self._actors else None

    def joined(self, newcomer: Newcomer, *, now: float, cause: str = "") -> None:
        """An actor starts. `cause` is what Ray says of the end of its `predecessor`, if there is one."""
        before = self._actors.get(newcomer.actor)
        # With a trainer that starts again come pools of other actors.
        self._actors = {
            name: actor
            for name, actor in self._actors.items()
            if actor.of.pool != newcomer.pool or actor.of.incarnation >= newcomer.incarnation
        }
        here = self._actors[newcomer.actor] = _Actor(newcomer, "loads its models", now)
        if before is not None:
            here.deaths, here.hangs = before.deaths + (not before.rests), before.hangs
            self.died[newcomer.pool] += 1
            words: str | None = self._words.pop(newcomer.actor, None)
            self._judge(here, words or cause or "no reason is known")

    def last_words(self, actor: str, words: str, *, hung: bool) -> None:
        """What an actor says before its process ends itself."""
        self._words[actor] = words
        if hung and actor in self._actors:
            self._actors[actor].hangs += 1

    def trainer_words(self) -> str | None:
        """The last words of the first of the trainer's processes that has ended itself since they began."""
        return next((words for name, words in self._words.items() if name.startswith(TRAINER)), None)

    def began(self) -> None:
        """The trainer's processes begin, and what those before them said is of no more use."""
        self._words = {name: words for name, words in self._words.items() if not name.startswith(TRAINER)}

    def doing(self, actor: str, what: str, *, now: float, rests: bool = False) -> None:
        """An actor begins something, or waits, of which it may tell again."""
        here = self._actors.get(actor)
        if here is not None and not (rests and here.doing == what):
            here.doing, here.since, here.rests = what, now, rests

    def finished(self, actor: str) -> None:
        """An actor has finished a block."""
        if actor in self._actors:
            self._actors[actor].deaths = self._actors[actor].hangs = 0

    def standing(self, source: str, *, now: float) -> str:
        """What the actors of a source are at, and of its labels if others make them."""
        actors = [a for a in self._actors.values() if source in (a.of.pool, a.of.pool.removeprefix("labels/"))]
        if not actors:
            return "none of its actors has started"
        return ", ".join(f"an actor of {a.of.role} {a.doing} since {now - a.since:.0f} s" for a in actors)

    def _judge(self, actor: _Actor, cause: str) -> None:
        role = actor.of.role
        if actor.hangs > _HANGS:
            times = f"hung {actor.hangs} times"
        elif actor.deaths > self.max_deaths:
            times = f"died {actor.deaths} times"
        else:
            return
        self.fail(
            f"Actors of `{role}` must finish blocks, but one {times} without that (`faults.max_deaths`: "
            f"{self.max_deaths}); last cause: {cause.rstrip('.')}.{_advice(role, cause)}"
        )


def _advice(role: str, cause: str) -> str:
    if "hung" in cause:
        return " If that work is just slow, raise `faults.timeout_s`."
    if any(sign in cause.lower() for sign in ("out of memory", "oom", "low on memory", "sigkill")):
        return f" Where memory is what lacks, lower `{role}.batch_size` or `num_actors`."
    return ""
