"""Drives a tracker from a thread of its own, so that a slow or dead server never slows training.

The journal on disk is the queue: the thread sends what lies beyond the last record it sent, tries again with growing
pauses when a call fails, and remembers its place between processes.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddil_ray.errors import first_line
from ddil_ray.tracking.journal import read_after
from ddil_ray.tracking.tracker import RunInfo, Tracker

__all__ = ["BackgroundTracker"]

_POLL_S, _LONGEST_PAUSE_S, _HEALTHY_CLOSE_S = 1.0, 60.0, 300.0
_log = logging.getLogger(__name__)


class BackgroundTracker:
    """Sends the records of a journal to a tracker.

    | event | effect |
    | --- | --- |
    | start | a thread opens the tracker, then polls the journal |
    | a call fails | logged once, made again after 1, 2, 4, ... at most 60 s |
    | finish | what is left is sent, then the run is closed; a tracker that fails gets `timeout_s`, then is left |

    Args:
        tracker: where to.
        run: what is known of the run.
        journal: the records.
        state: file that remembers the tracker's run and how far it got.
        timeout_s: how long a failing tracker may hold up the end.
    """

    def __init__(self, tracker: Tracker, run: RunInfo, *, journal: Path, state: Path, timeout_s: float) -> None:
        self.tracker, self.run, self.timeout_s = tracker, run, timeout_s
        self._journal, self._state_path = journal, state
        self._state = _read_state(state)
        self._wake = threading.Event()
        self._ending: tuple[str, Sequence[Path]] | None = None
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="tracker", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def finish(self, status: str, files: Sequence[Path] = ()) -> str | None:
        """Send the rest and close the run; what could not be sent is described, None if all was."""
        self._ending = (status, files)
        self._wake.set()
        waited = 0.0
        while self._thread.is_alive() and waited < (self.timeout_s if self._failures else _HEALTHY_CLOSE_S):
            self._thread.join(0.2)
            waited += 0.2
        unsent = len(read_after(self._journal, self._sent)[0])
        if unsent or self._failures or self._thread.is_alive():
            return f"{unsent} records did not reach the tracker; all of them are in {self._journal}."
        return None

    @property
    def _sent(self) -> int:
        """Bytes of the journal that have been sent."""
        return int(self._state.get("sent", 0))

    def _run(self) -> None:
        opened = False
        while True:
            try:
                if not opened:
                    self.tracker.open(self.run, self._state)
                    self._save()
                    opened = True
                ending = self._ending  # read first: whatever is journalled before it is sent before the close
                self._send()
                if ending is not None:
                    self.tracker.close(*ending)
                self._failures = 0
                if ending is not None:
                    return
            except Exception as error:  # a tracker may fail in any way; training goes on
                if self._failures == 0:
                    _log.warning(
                        "Tracking failed and will be tried again: %s",
                        first_line(error),
                    )
                self._failures += 1
                if self._ending is not None:
                    return
            self._wake.wait(min(_LONGEST_PAUSE_S, _POLL_S * 2**self._failures))

    def _send(self) -> None:
        records, end = read_after(self._journal, self._sent)
        if records:
            self.tracker.log(records)
            self._state["sent"] = end
            self._save()

    def _save(self) -> None:
        whole = self._state_path.with_suffix(".part")
        whole.write_text(json.dumps(self._state))
        whole.replace(self._state_path)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}
