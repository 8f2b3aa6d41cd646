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

    Rows lie in slots: one is copied as it enters and as it is drawn, and stays where it is in between. A slot that is
    freed is the next to be filled. A step moves the bytes that it adds and draws, however many rows are held; only the
    few numbers known of every row are gone through.

    Raises:
        StaleStateError: `draw` finds no row that is young enough.
    """

    def __init__(self, *, capacity: int, reuse: int = 1, max_staleness: int | None = None) -> None:
        self.capacity, self.reuse, self.max_staleness = capacity, reuse, max_staleness
        self.evicted = self.expired = self.received = self.drawn = 0
        self._slots: StateBatch | None = None
        # Of every row in order of arrival its slot and its uses; and the slots without a row.
        self._held, self._uses, self._free = torch.zeros(3, 0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._held)

    def clear(self) -> None:
        """Forget every row; a new phase starts."""
        self._slots = None
        self._held, self._uses, self._free = torch.zeros(3, 0, dtype=torch.int64)

    def add(self, batch: StateBatch) -> None:
        """Append rows, of the shapes of those that are held."""
        self.received += len(batch)
        excess = max(0, len(self) + len(batch) - self.capacity)
        self.evicted += excess
        oldest = min(excess, len(self))
        self._keep(torch.arange(len(self)) >= oldest)
        self._append(batch[excess - oldest :], torch.zeros(len(batch) - (excess - oldest), dtype=torch.int64))

    def draw(self, count: int, *, step: int, generator: torch.Generator) -> StateBatch:
        """`count` rows for the batch of `step`; fewer are held: some come twice."""
        self._expire(step)
        if self._slots is None or len(self) == 0:
            raise StaleStateError(
                f"`replay` must hold a state at most {self.max_staleness} steps old at step {step}, but holds none. "
                "Raise `replay.max_staleness`, lower `sync.every`, or lower `replay.reuse`."
            )
        self.drawn += count
        chosen = self._choose(count, generator)
        batch = self._slots[self._held[chosen]]
        self._uses.index_add_(0, chosen, torch.ones_like(chosen))
        self._keep(self._uses < self.reuse)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on with the same draws."""
        rows = None if self._slots is None else dict(vars(self._slots[self._held]))
        counters = {n: getattr(self, n) for n in ("evicted", "expired", "received", "drawn")}
        return {"rows": rows, "uses": self._uses.clone(), **counters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.clear()
        if state["rows"] is not None:
            self._append(StateBatch(**state["rows"]), state["uses"])
        for name in ("evicted", "expired", "received", "drawn"):
            setattr(self, name, state[name])

    def _choose(self, count: int, generator: torch.Generator) -> Tensor:
        if self.reuse == 1 and count <= len(self):
            return torch.arange(count)
        if count <= len(self):
            return torch.randperm(len(self), generator=generator)[:count]
        return torch.randint(len(self), (count,), generator=generator)

    def _expire(self, step: int) -> None:
        if self.max_staleness is None or self._slots is None:
            return
        version = self._slots.version[self._held]
        young = (version < 0) | (step - version <= self.max_staleness)
        self.expired += int((~young).sum())
        self._keep(young)

    def _keep(self, mask: Tensor) -> None:
        """Keep the rows that `mask` (len(self),) marks, and free the slots of the others."""
        if not bool(mask.all()):
            self._free = torch.cat([self._free, self._held[~mask]])
            self._held, self._uses = self._held[mask], self._uses[mask]

    def _append(self, rows: StateBatch, uses: Tensor) -> None:
        """Copy `rows` into free slots, the newest freed first."""
        storage = self._reserve(rows)
        self._free, slots = self._free.tensor_split([len(self._free) - len(rows)])
        for name, part in vars(rows).items():
            getattr(storage, name).index_copy_(0, slots, part)
        self._held, self._uses = torch.cat([self._held, slots]), torch.cat([self._uses, uses])

    def _reserve(self, rows: StateBatch) -> StateBatch:
        """All slots, with free ones for `rows`: where they lack, their number at least doubles, up to the capacity."""
        slots = rows[:0] if self._slots is None else self._slots
        have, lack = len(slots), len(rows) - len(self._free)
        if lack > 0:
            more = max(lack, min(have, self.capacity - have))
            grown = StateBatch(**{n: part.new_empty(have + more, *part.shape[1:]) for n, part in vars(slots).items()})
            for name, part in vars(slots).items():
                getattr(grown, name)[:have] = part
            self._free, slots = torch.cat([self._free, torch.arange(have, have + more)]), grown
        self._slots = slots
        return slots
