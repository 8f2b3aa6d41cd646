"""How many actors of each role a trainer needs, and how a number of GPUs is best split between trainer and actors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["HEADROOM", "Load", "Split", "actors_needed", "best_split"]

HEADROOM = 1.2
"""Actors over what is needed at least: with two batches of buffer, a fifth more keeps the trainer's stall below 1 %."""


@dataclass(frozen=True)
class Load:
    """Work of one role per row that is trained on."""

    role: str
    pools: tuple[float, ...]
    """Actor-seconds per row trained on, of each of the role's pools: one per source that it serves. All pools of a role
    have the same number of actors."""
    gpus: float = 1.0
    """Per actor."""

    def rate(self, actors: int) -> float:
        """Rows per second that pools of `actors` each can feed."""
        return actors / max(self.pools) if max(self.pools) > 0 else math.inf


@dataclass(frozen=True)
class Split:
    """Workers and actors for a number of GPUs."""

    workers: int
    actors: dict[str, int]
    """By role."""
    rows_per_s: float
    """The slowest of trainer and roles."""
    trainer_rows_per_s: float

    @property
    def stall(self) -> float:
        """Share of the trainer's time without states, however large the buffers are."""
        return 1 - self.rows_per_s / self.trainer_rows_per_s


def actors_needed(load: Load, *, rows_per_s: float, headroom: float = HEADROOM) -> int:
    """ceil(headroom * rate * seconds): actors per pool for `rows_per_s` rows trained on; at least 1."""
    return max(1, math.ceil(headroom * rows_per_s * max(load.pools) - 1e-9))


def best_split(
    loads: Sequence[Load], *, gpus: float, worker_s: Mapping[int, float], worker_gpus: float = 1.0
) -> Split | None:
    """The split of `gpus` that trains on most rows per second; None where not even one of each fits.

    For every number of workers the other GPUs go, one actor at a time, to the role that feeds least, until all have
    head-room: no other split of whole actors feeds more.

    Args:
        loads: of all roles that share the GPUs with the trainer; none where it has them to itself.
        gpus: to split.
        worker_s: seconds per row of one worker, by the number of workers that may be.
        worker_gpus: per trainer worker.
    """
    splits = (_with_workers(loads, n, gpus - n * worker_gpus, seconds) for n, seconds in worker_s.items())
    found: Iterable[Split] = (split for split in splits if split is not None)
    return max(found, key=lambda s: (round(s.rows_per_s, 9), -s.workers), default=None)


def _with_workers(loads: Sequence[Load], workers: int, gpus: float, seconds: float) -> Split | None:
    actors = {load.role: 1 for load in loads}
    left, trainer = gpus - sum(_cost(load) for load in loads), workers / seconds
    if left < -1e-9:
        return None
    if not loads:
        return Split(workers, actors, trainer, trainer)
    slowest = min(loads, key=lambda load: load.rate(actors[load.role]))
    while _cost(slowest) <= left + 1e-9 and slowest.rate(actors[slowest.role]) < HEADROOM * trainer:
        actors[slowest.role] += 1
        left -= _cost(slowest)
        slowest = min(loads, key=lambda load: load.rate(actors[load.role]))
    return Split(workers, actors, min(trainer, slowest.rate(actors[slowest.role])), trainer)


def _cost(load: Load) -> float:
    """GPUs of one more actor in each pool."""
    return load.gpus * len(load.pools)
