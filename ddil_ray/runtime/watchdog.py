"""Ends a process whose work hangs, after telling why: Ray then starts another, and what it was at is done again.

Each process watches itself, so nothing needs the right to look into another one, and a process that waits for its turn
is never taken for one that hangs. A thread sees that the work takes too long, tells the hub where it stands, and ends
the process. It cannot where a library holds on to the interpreter: a timer of `faulthandler`, which needs no
interpreter, then writes the stacks to the process's log (`ray logs`) and ends it, some seconds later.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Watchdog"]

_POLL_S = 0.5
_GRACE_S = 30.0
_LONGEST = 10.0
"""Times the median that work may take."""
_FRAMES = 8


@dataclass(frozen=True)
class _Work:
    what: str
    begun: float
    limit_s: float
    thread: int


class Watchdog:
    """Watches what this process is at, one piece of work at a time.

    Args:
        tell: told of work that hangs, in words, before the process ends.
        timeout_s: what any work may take.
        leave: ends the process.
    """

    def __init__(
        self, tell: Callable[[str], None], *, timeout_s: float, leave: Callable[[int], object] = os._exit
    ) -> None:
        self._tell, self._timeout_s, self._leave = tell, timeout_s, leave
        self._took: deque[float] = deque(maxlen=64)
        self._work: _Work | None = None
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def begin(self, what: str, *, times: float = 1.0) -> None:
        """The calling thread is at `what` from now on, which may take `times` the usual limit."""
        usual = max(self._timeout_s, _LONGEST * statistics.median(self._took) if self._took else 0.0)
        self._work = _Work(what, time.monotonic(), times * usual, threading.get_ident())
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(times * usual + _GRACE_S, exit=True, file=sys.__stderr__)

    def end(self) -> None:
        """It is done."""
        work, self._work = self._work, None
        faulthandler.cancel_dump_traceback_later()
        if work is not None:
            self._took.append(time.monotonic() - work.begun)

    def stop(self) -> None:
        """It was given up, which tells nothing of how long it takes."""
        self._work = None
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while True:
            time.sleep(_POLL_S)
            work = self._work
            if work is not None and (seconds := time.monotonic() - work.begun) > work.limit_s:
                faulthandler.dump_traceback(file=sys.__stderr__) if sys.__stderr__ is not None else None
                try:
                    self._tell(f"hung: {work.what} for {seconds:.0f} s, at {_place(work.thread)}")
                finally:
                    self._leave(1)


def _place(thread: int) -> str:
    """Where a thread of this process stands, innermost call first."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "a thread that has ended"
    calls = traceback.extract_stack(frame)[: -_FRAMES - 1 : -1]
    return " < ".join(f"{call.name} ({os.path.basename(call.filename)}:{call.lineno})" for call in calls)
