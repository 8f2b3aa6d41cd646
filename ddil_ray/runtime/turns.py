"""Lets the threads of a process do something one at a time, in the order of what they do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Turns"]


class Turns:
    """One at a time, the smallest place first among those that wait.

    Example: while place 4 has its turn, 8, 6 and 2 come to wait; they get theirs as 2, 6, 8.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[int] = []
        self._taken = False

    @contextmanager
    def of(self, place: int) -> Iterator[None]:
        """Wait for the turn of `place`, and have it inside."""
        with self._changed:
            self._waiting.append(place)
            self._changed.wait_for(lambda: not self._taken and place == min(self._waiting))
            self._waiting.remove(place)
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()
