"""Puts the records that the ranks of a trainer make at one step together into one.

Blocks go to ranks in turn, so the last rank waits for them longest, and the others for it, in the exchange of
gradients, where nobody sees what was waited for. What a trainer waits for is thus what its slowest rank waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

__all__ = ["Ranks", "together"]

Record = dict[str, float]

_ACROSS: dict[str, Callable[[Iterable[float]], float]] = {
    "trainer/stall_share": max,
    "staleness/max": max,
    "throughput/samples_per_s": sum,
    "rows/": sum,
}
"""How metrics of the ranks, by the beginning of their names, become one; all others are rank 0's."""


def together(records: list[Record]) -> Record:
    """One record of those of all ranks at one step, rank 0's first."""
    whole = dict(records[0])
    for prefix, join in _ACROSS.items():
        for name in {name for record in records for name in record if name.startswith(prefix)}:
            whole[name] = join(record[name] for record in records if name in record)
    return whole


@dataclass
class Ranks:
    """Holds records until those of all ranks are there."""

    _parts: dict[float, dict[int, Record]] = field(default_factory=dict)

    def add(self, record: Record, rank: int, ranks: int) -> Record | None:
        """The record of all ranks if `record`, which `rank` of `ranks` made, was the last of its step."""
        parts = self._parts.setdefault(record["step"], {})
        parts[rank] = record
        if len(parts) < ranks:
            return None
        self._parts = {step: part for step, part in self._parts.items() if step > record["step"]}
        return together([parts[n] for n in range(ranks)])

    def clear(self) -> None:
        """Forget what is held: other ranks begin."""
        self._parts.clear()
