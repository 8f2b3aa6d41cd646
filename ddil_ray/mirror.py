"""Copies files out from a thread, so that a storage that is slow or down holds up nobody."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ddil_ray.errors import first_line

__all__ = ["Mirror"]


class Mirror:
    """Calls `send` whenever it is asked to, one call at a time; what fails is told once and done again when next asked.

    Args:
        send: copies what has changed; may be slow and may raise.
        title: what messages call the place.
        say: tells the user.
    """

    def __init__(self, send: Callable[[], None], title: str, say: Callable[[str], None]) -> None:
        self._send, self._title, self._say = send, title, say
        self._asked, self._ended, self._failing = threading.Event(), False, False
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """Copy soon."""
        self._asked.set()

    def end(self) -> None:
        """Wait for the copy that is being made, if one is; the storage's own time-outs bound it."""
        self._ended = True
        self._asked.set()
        self._thread.join()

    def _run(self) -> None:
        while self._asked.wait() and not self._ended:
            self._asked.clear()
            try:
                self._send()
            except Exception as error:  # every filesystem has errors of its own
                if not self._failing:
                    self._say(
                        f"{self._title} could not be written ({first_line(error)}). The run goes on; its files are "
                        "copied with the next checkpoint that can be."
                    )
                self._failing = True
            else:
                if self._failing:
                    self._say(f"{self._title} is written again, and has everything.")
                self._failing = False
