"""Drives a tracker from a thread of its own, so that a slow or dead server never slows training.

The journal on disk is the queue: the thread sends what lies beyond the last record it sent, tries again with growing
pauses when a call fails, and remembers its place between processes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddil_ray.errors import first_line
from ddil_ray.tracking.journal import read_after
from ddil_ray.tracking.tracker import RunInfo, Tracker

__all__ = ["BackgroundTracker"]

_POLL_S, _LONGEST_PAUSE_S = 1.0, 60.0
_CLOSE_S, _STOPPED_CLOSE_S = 3600.0, 300.0
"""That closing may take while nothing fails: of a finished run, with its files, and of one that ends otherwise."""
_log = logging.getLogger(__name__)


class BackgroundTracker:
    """Sends the records of a journal to a tracker.

    | event | effect |
    | --- | --- |
    | start | a thread opens the tracker, then polls the journal |
    | a call fails | logged once, made again after 2, 4, 8, ... at most 60 s, and every second at the end; opened anew |
    | another tracker, or another place | it gets the whole journal |
    | another name, as of a copied folder | a run of its own gets the whole journal |
    | finish | what is left is sent, and the run is closed with its files, which may take an hour |
    | a call fails at the end | made again for `timeout_s` and as long as it took to fail, then the tracker is left |

    Args:
        tracker: where to.
        run: what is known of the run.
        journal: the records.
        state: file that remembers the tracker's run and how far it got; one that cannot be read is as none.
        timeout_s: how long a failing tracker may hold up the end.
        kept: where all of it stays, as it is called when something was not sent; default: the journal's folder.
        lost: whether the run is another process's by now, so that nothing more is sent, closed or remembered.
    """

    def __init__(
        self,
        tracker: Tracker,
        run: RunInfo,
        *,
        journal: Path,
        state: Path,
        timeout_s: float,
        kept: str | None = None,
        lost: Callable[[], bool] = lambda: False,
    ) -> None:
        self.tracker, self.run, self.timeout_s, self._kept = tracker, run, timeout_s, kept or str(journal.parent)
        self._journal, self._state_path, self._lost = journal, state, lost
        known = _of_run(run.name, {"key": uuid.uuid4().hex, **_read_state(state)})
        self._state = _of_place(tracker.place(), known)
        written = journal.stat().st_size if journal.exists() else 0
        self._state["sent"] = min(int(self._state.get("sent", 0)), written)  # the journal may be an older copy
        self._wake, self._left = threading.Event(), threading.Event()
        self._ending: tuple[str, Sequence[Path]] | None = None
        self._opened, self._closed, self._failed_closing, self._failures = False, False, False, 0
        self._closing_since: float | None = None
        self._left_at = self._close_s = math.inf
        self._thread = threading.Thread(target=self._run, name="tracker", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._save()
        self._thread.start()

    def finish(self, status: str, files: Sequence[Path] = ()) -> str | None:
        """Send the rest and close the run; what could not be sent is described, None if all was."""
        self._close_s = _CLOSE_S if status == "finished" else _STOPPED_CLOSE_S
        self._left_at = time.monotonic() + (self.timeout_s if self._failures else self._close_s)
        self._ending = (status, files)
        self._wake.set()
        while self._thread.is_alive() and time.monotonic() < self._left_at:
            self._thread.join(0.2)
        self._left.set()
        if self._closed or self._lost() or self._thread.ident is None:  # it was never started
            return None
        unsent = 0
        with suppress(OSError):  # the journal's disk does not answer
            unsent = len(read_after(self._journal, self._state["sent"])[0])
        what = f"{unsent} records" if unsent else "The end of the run, or its files,"
        return f"{what} did not reach the tracker; all is in {self._kept}, and `--resume` sends it."

    def _run(self) -> None:
        while not (self._left.is_set() or self._closed or self._lost()):
            ending = self._ending  # read first: whatever is journalled before it is sent before the close
            self._closing_since = None
            try:
                self._send()
                if ending is not None and not self._lost():
                    self._close(*ending)
                self._failures = 0
            except Exception as error:  # a tracker may fail in any way; training goes on
                self._failed(error)
            if self._ending is None:
                self._wake.wait(min(_LONGEST_PAUSE_S, _POLL_S * 2**self._failures))
            elif self._failures:
                self._left.wait(_POLL_S)

    def _close(self, status: str, files: Sequence[Path]) -> None:
        self._closing_since = time.monotonic()
        if not self._failed_closing:  # it answers, whatever it did before
            self._left_at = max(self._left_at, self._closing_since + self._close_s)
        self.tracker.close(status, files)
        self._closed = True

    def _failed(self, error: Exception) -> None:
        """What failed is made again; closing takes as long again where it works."""
        if self._failures == 0:
            _log.warning("Tracking failed and will be tried again: %s", first_line(error))
        self._failures += 1
        self._opened = False  # its run may be gone
        if self._ending is not None:
            now, since = time.monotonic(), self._closing_since
            self._left_at = min(self._left_at, now + self.timeout_s + (now - since if since is not None else 0.0))
            self._failed_closing = self._failed_closing or since is not None

    def _send(self) -> None:
        if not self._opened:
            self.tracker.open(self.run, self._state)
            self._opened = True
            self._save()
        records, end = read_after(self._journal, self._state["sent"])
        if records:
            self.tracker.log(records)
            self._state["sent"] = end
            self._save()

    def _save(self) -> None:
        """Remember. Where there is no room, a process after this one sends again what the tracker has already."""
        if self._lost():
            return
        part = self._state_path.with_suffix(".part")
        with suppress(OSError), part.open("w") as file:
            json.dump(self._state, file)
            file.flush()
            os.fsync(file.fileno())
            part.replace(self._state_path)


def _of_place(place: str, state: dict[str, Any]) -> dict[str, Any]:
    """`state` where it is of this place, or is too old to tell; else what is known of the run without any tracker."""
    before = state.setdefault("place", place)
    if before == place:
        return state
    _log.warning("Tracking goes from %s to %s, from the first record on.", before, place)
    return {"key": state["key"], "run": state["run"], "place": place}


def _of_run(name: str, state: dict[str, Any]) -> dict[str, Any]:
    """`state` where it is of a run of this name, or is too old to tell; none in a copy of another run's folder."""
    before = state.setdefault("run", name)
    if before == name:
        return state
    _log.warning("This run was called %s, and is tracked anew as %s, from the first record on.", before, name)
    return {"key": uuid.uuid4().hex, "run": name}


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text())
        return {**state, "sent": int(state.get("sent", 0))}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        _log.warning("%s cannot be read (%s): the tracker gets the whole run again, as a new one.", path, error)
        return {}
