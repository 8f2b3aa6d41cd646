"""Signals of a run: the first one asks it to stop after a last checkpoint, the second interrupts at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["Signals"]


class Signals:
    """Remembers SIGINT and SIGTERM while it is entered; the second one interrupts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._told = False

    def fresh(self) -> bool:
        """Whether a signal came that `fresh` has not told of."""
        told, self._told = self._told, self.received is not None
        return self._told and not told

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def __enter__(self) -> Signals:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
