"""Replay buffer of one source: DDIL's dataset aggregation, with bounded reuse and bounded age."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddil_ray.errors import StaleStateError
from ddil_ray.states.batch import StateBatch

__all__ = ["ReplayBuffer"]


class ReplayBuffer:
    """Rows of one source, each drawn at most `reuse` times, never older than `max_staleness` steps.

    `draw` picks rows at random without replacement, in arrival order where `reuse` is 1 (then it is a queue and every
    row is used exactly once). Rows over `capacity` push out the oldest.

    | event | effect |
    | --- | --- |
    | add | rows enter with no use; oldest beyond `capacity` leave (`evicted`) |
    | draw at step n | rows with version >= 0 and n - version > max_staleness leave first (`expired`) |
    | reuse reached | the row leaves |

    Raises:
        StaleStateError: `draw` finds no row that is young enough.
    """

    def __init__(self, *, capacity: int, reuse: int = 1, max_staleness: int | None = None) -> None:
        self.capacity, self.reuse, self.max_staleness = capacity, reuse, max_staleness
        self.evicted = self.expired = self.received = self.drawn = 0
        self._rows: StateBatch | None = None
        self._uses = torch.zeros(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._uses)

    def add(self, batch: StateBatch) -> None:
        """Append rows."""
        self.received += len(batch)
        self._rows = batch if self._rows is None else StateBatch.cat([self._rows, batch])
        self._uses = torch.cat([self._uses, torch.zeros(len(batch), dtype=torch.int64)])
        excess = len(self) - self.capacity
        if excess > 0:
            self.evicted += excess
            self._keep(torch.arange(len(self)) >= excess)

    def draw(self, count: int, *, step: int, generator: torch.Generator) -> StateBatch:
        """`count` rows for the batch of `step`; fewer are held: some come twice."""
        self._expire(step)
        if self._rows is None or len(self) == 0:
            raise StaleStateError(
                f"`replay` must hold a state at most {self.max_staleness} steps old at step {step}, but holds none. "
                "Raise `replay.max_staleness`, lower `sync.every`, or lower `replay.reuse`."
            )
        self.drawn += count
        chosen = self._choose(count, generator)
        batch = self._rows[chosen]
        self._uses.index_add_(0, chosen, torch.ones_like(chosen))
        self._keep(self._uses < self.reuse)
        return batch

    def clear(self) -> None:
        """Forget every row; a new phase starts."""
        self._rows, self._uses = None, torch.zeros(0, dtype=torch.int64)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on with the same draws."""
        columns = None if self._rows is None else self._rows.to_columns()
        counters = {n: getattr(self, n) for n in ("evicted", "expired", "received", "drawn")}
        return {"columns": columns, "uses": self._uses.clone(), **counters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        columns = state["columns"]
        self._rows = None if columns is None else StateBatch.from_columns(columns)
        self._uses = state["uses"].clone()
        for name in ("evicted", "expired", "received", "drawn"):
            setattr(self, name, state[name])

    def _choose(self, count: int, generator: torch.Generator) -> Tensor:
        if self.reuse == 1 and count <= len(self):
            return torch.arange(count)
        if count <= len(self):
            return torch.randperm(len(self), generator=generator)[:count]
        return torch.randint(len(self), (count,), generator=generator)

    def _expire(self, step: int) -> None:
        if self.max_staleness is None or self._rows is None:
            return
        version = self._rows.version
        young = (version < 0) | (step - version <= self.max_staleness)
        if not bool(young.all()):
            self.expired += int((~young).sum())
            self._keep(young)

    def _keep(self, mask: Tensor) -> None:
        if self._rows is not None and not bool(mask.all()):
            self._rows, self._uses = self._rows[mask], self._uses[mask]
