"""Which checkpoints of a run are kept; the driver asks whenever another is saved."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from ddil_ray.config.checkpoint import Checkpoint
from ddil_ray.errors import first_line
from ddil_ray.runtime.storage import CheckpointStore
from ddil_ray.tracking import read_journal

__all__ = ["Retention", "score_at"]


class Retention:
    """Removes checkpoints that are neither among the newest nor the best; a storage that fails is told of once.

    Args:
        store: of the run.
        settings: how many and which.
        journal: file with the records that have the metric of the best.
        say: told what the user should know.
    """

    def __init__(self, store: CheckpointStore, settings: Checkpoint, journal: Path, say: Callable[[str], None]) -> None:
        self._store, self._settings, self._journal, self._say = store, settings, journal, say
        self._told: set[str] = set()
        self._one_at_a_time = threading.Lock()

    def soon(self) -> None:
        """Have a thread remove it. A storage that is slow holds up nobody; while it is, this does nothing."""
        if not self._one_at_a_time.locked():
            threading.Thread(target=self, name="retention", daemon=True).start()

    def __call__(self) -> None:
        """Remove what may go now."""
        with self._one_at_a_time:
            self._remove()

    def _remove(self) -> None:
        best = self._settings.best
        records = read_journal(self._journal) if best is not None else []
        try:
            self._store.prune(self._settings.keep, lambda step: score_at(records, best, step))
        except Exception as error:  # every filesystem has errors of its own
            self._once(f"Older checkpoints could not be removed: {first_line(error)}.")
        if best is not None and not any(best in record for record in records):
            self._once(f"`checkpoint.best` must name a metric, but {best!r} is in no record yet. See metrics.jsonl.")

    def _once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._say(text)


def score_at(records: Sequence[dict[str, float]], metric: str | None, step: int) -> float | None:
    """The value of `metric` that was measured last at or before `step`; None where none was, or no number."""
    known = [(r["step"], i) for i, r in enumerate(records) if metric in r and r["step"] <= step]
    value = records[max(known)[1]][metric] if known and metric is not None else math.nan
    return None if math.isnan(value) else value
