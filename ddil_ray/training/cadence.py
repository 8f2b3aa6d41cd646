"""Which publications of student weights are measured. Imports nothing: the hub lives by it too."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Cadence"]


@dataclass
class Cadence:
    """The first weights of every phase, and then those that are at least `every` steps newer than the last measured."""

    every: int
    phase: int = -1
    """Of the last measured weights; -1 before any."""
    version: int = -1

    def due(self, phase: int, version: int) -> bool:
        """Whether weights published at step `version` of `phase` are to be measured."""
        return phase != self.phase or version >= self.version + self.every

    def took(self, phase: int, version: int) -> None:
        """Those weights are being measured."""
        self.phase, self.version = phase, version
