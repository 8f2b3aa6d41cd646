"""What a tracker is: a place for parameters, metrics and files, told of them by one thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

__all__ = ["NullTracker", "RunInfo", "Tracker"]

Record = dict[str, float]
"""Metrics by name; `step` is the global step and `phase` the phase it belongs to."""


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run when it starts."""

    name: str
    params: dict[str, str]
    tags: dict[str, str]
    rounds: Sequence[str] = field(default=())
    """Names of the phases, where there are several."""


class Tracker(Protocol):
    """Calls may be slow and may raise: they come from a background thread, and failed ones are made again."""

    def check(self, *, reach: bool) -> None:
        """Look at the settings before the run starts, and with `reach` also whether the tracker answers.

        Raises:
            ConfigError: it cannot work.
        """

    def open(self, run: RunInfo, state: dict[str, Any]) -> None:
        """Start the run, or go on with the one that `state` remembers; called again after a call that failed.

        `state` is kept between processes for as long as `place` is the same. Its "key" names the run and is the same
        in all tries and places, so that none starts a second one. Its "sent" is what the run has of the journal, in
        bytes; a tracker that finds its run gone starts another, and sets it to 0.
        """

    def log(self, records: Sequence[Record]) -> None:
        """Keep metrics."""

    def close(self, status: str, files: Sequence[Path]) -> None:
        """End the run as `finished`, `failed` or `stopped`, with `files` (files or folders) as its artifacts."""

    def place(self) -> str:
        """Which tracker this is and where, without secrets: one at another place gets the whole run."""

    def look(self) -> str:
        """What a user types, or where they look, to see the run."""


class NullTracker:
    """Tracks nothing."""

    def check(self, *, reach: bool) -> None:
        """Nothing."""

    def open(self, run: RunInfo, state: dict[str, Any]) -> None:
        """Nothing."""

    def log(self, records: Sequence[Record]) -> None:
        """Nothing."""

    def close(self, status: str, files: Sequence[Path]) -> None:
        """Nothing."""

    def place(self) -> str:
        """See `Tracker.place`."""
        return "no tracker"

    def look(self) -> str:
        """Nothing."""
        return ""
