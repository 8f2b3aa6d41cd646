"""Which weights the monitor of covariate shift gets: a rule without Ray or torch, like those of `admission.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ddil_ray.training.cadence import Cadence

if TYPE_CHECKING:
    from ddil_ray.runtime.hub import Grant

__all__ = ["Measured"]


@dataclass
class Measured:
    """Which weights the monitor gets: those that are due, held until it takes them, and at the end the newest."""

    cadence: Cadence | None
    """None where nothing is measured."""
    newest: Grant | None = None
    held: Grant | None = None
    ended: bool = False

    def published(self, grant: Grant) -> None:
        """There are newer weights."""
        self.newest = grant
        self._hold()

    def take(self) -> Grant | None:
        """The held weights, which are being measured from now on; None where none are."""
        held, self.held = self.held, None
        if held is not None and self.cadence is not None:
            self.cadence.took(held.phase, held.version)
            self._hold()
        return held

    def end(self) -> None:
        """No more weights come: the newest are the last to measure, unless they have been taken."""
        self.ended = True
        if self.cadence is not None and self.newest is not None:
            taken = (self.newest.phase, self.newest.version) == (self.cadence.phase, self.cadence.version)
            self.held = None if taken else self.newest

    def _hold(self) -> None:
        if self.held is not None or self.newest is None or self.cadence is None:
            return
        if self.cadence.due(self.newest.phase, self.newest.version) and not self.ended:
            self.held = self.newest
