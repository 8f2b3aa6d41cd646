"""Folders of this machine's disk for what is on its way to a storage; those of processes that were killed are removed.

Whoever has such a folder holds a lock on it, which ends with the process, whatever ends that: a folder that can be
locked is nobody's. Numbers of processes would not tell, as containers that share a disk count their own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

__all__ = ["Staging"]

_PREFIX = "ddil-ray-checkpoint-"
_TRIES = 10


class Staging:
    """A folder of this process.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self) -> None:
        for _ in range(_TRIES):
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
            self._lock = _locked(self.path)
            if self._lock is not None and self.path.exists():  # else another process took it for nobody's just now
                return
            with contextlib.suppress(OSError):
                self.path.rmdir()
        raise OSError(f"no folder can be locked in {tempfile.gettempdir()}")

    def remove(self) -> None:
        """It is done with."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @staticmethod
    def remove_left() -> None:
        """Remove what processes left that were killed."""
        for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            lock = _locked(path)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _locked(path: Path) -> int | None:
    """A lock on a folder; None where another process has it, or there is no such folder any more."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock
