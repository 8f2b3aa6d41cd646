"""Signals of a run: in training the first asks it to stop after a last checkpoint, the second interrupts at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Signals", "ended_by_signals", "handlers_kept"]


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within this SIGTERM raises `SystemExit`, as SIGINT does `KeyboardInterrupt`, so that what is open is closed."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Keep this process's answer to SIGTERM, if it has one, from Ray, which sets its own while it starts.

    Ray's exits with the number of the signal: one that comes within raises what it raises in `ended_by_signals`.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as end:
        raise SystemExit(128 + signal.SIGTERM if end.code == signal.SIGTERM else end.code) from None
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


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
            raise SystemExit(128 + number) if number == signal.SIGTERM else KeyboardInterrupt
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
