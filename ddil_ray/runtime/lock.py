"""One run per name: a lock in the run folder, which its owner keeps alive, and which a dead owner loses.

It works on any storage that shows what was last written. On disks and on S3 creating it is exclusive; elsewhere, and
where a dead owner's lock is taken over, whoever wrote last has it, which each finds out by reading it again. Whose it
is tells the token that it holds, not a storage's answer, which may be lost or say little.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import psutil
from fsspec.implementations.local import LocalFileSystem

from ddil_ray.errors import ConfigError, RunFailedError
from ddil_ray.folder import using, write_whole

__all__ = ["LOCK", "Place", "RunLock"]

LOCK = "lock.json"
_STALE_BEATS, _TRIES = 6, 3
_TICKS = "process_ticks"
"""Key of a process's start by the machine's own count, as seconds move when the clock is set; older locks lack it."""
_START_TICKS = 19
"""Its place in /proc/PID/stat, counted behind the process's name."""


class Place(Protocol):
    """A folder that one process at a time may work in."""

    fs: Any
    """Filesystem of fsspec."""
    root: str
    """On it."""
    url: str
    others: bool
    """Set where another process has it by now."""


class RunLock:
    """Held while it is entered, by this process alone.

    Args:
        folder: of the run.
        say: told when the lock of a dead owner is taken over.
        field: that names the folder, for messages.
        beat_s: seconds between signs of life; six without one, and then two more that are watched, and the owner is
            dead. On the owner's own machine it is dead when its process is.

    Raises:
        ConfigError: on entry, another process has it, or the storage fails.
        RunFailedError: on exit, another process took it over, which this one was told by SIGTERM.
    """

    def __init__(self, folder: Place, say: Callable[[str], None], *, field: str = "name", beat_s: float = 10.0) -> None:
        self._folder, self._fs, self._path, self._url = folder, folder.fs, f"{folder.root}/{LOCK}", folder.url
        self._say, self._field, self._beat_s = say, field, beat_s
        me = psutil.Process()
        self._mine: dict[str, Any] = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": me.pid,
            "process_started": me.create_time(),
            _TICKS: _ticks(me.pid),
            "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        self._lost: dict[str, Any] | None = None
        self._ended = threading.Event()

    @property
    def stale_s(self) -> float:
        """Seconds after which a dead owner is known to be dead, on whatever machine it was."""
        return (_STALE_BEATS + 3) * self._beat_s

    def wait(self, seconds: float) -> None:
        """Until no live process has it, and no longer than this: one that was told to end saves a checkpoint first.

        Raises:
            ConfigError: the storage fails.
        """
        with self._reaching():
            self._wait(seconds)

    def _wait(self, seconds: float) -> None:
        deadline, told = time.monotonic() + seconds, False
        while (holder := self._read()) is not None and not self._is_dead(holder) and time.monotonic() < deadline:
            if not told:
                self._say(f"Waiting for the end of another process, for {seconds:g} s at most: {self._active(holder)}.")
                told = True
            time.sleep(self._beat_s / 2)

    def __enter__(self) -> RunLock:
        with self._reaching():
            self._acquire()
            self._check_mine()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._lost is not None:
            raise RunFailedError(f"This run must be the only one of its name, but {self._active(self._lost)}.")
        with contextlib.suppress(Exception):  # it would be found dead, too
            if self._is_mine(self._read()):
                self._fs.rm_file(self._path)

    def _acquire(self) -> None:
        for _ in range(_TRIES):
            # Read first: not every store heeds the condition of creating, and one that does not overwrites.
            holder = self._read()
            if holder is None and self._create():
                return
            if (holder := holder or self._read()) is not None:
                if not self._is_mine(holder):  # it is where it was created and the answer was lost
                    self._take_over(holder)
                return
            time.sleep(min(1.0, self._beat_s))  # it is being written, or was released this moment
        self._seize()  # neither: the rest of a writing that was cut off, or a storage that cannot create

    def _create(self) -> bool:
        """Whether it was created. Where the storage does not say so, reading tells what is there: S3 may refuse its own
        repetition of a request whose answer was lost, and not every store names the condition that failed."""
        content = self._content()
        try:
            if isinstance(self._fs, LocalFileSystem):
                with open(self._path, "xb") as file:
                    file.write(content)
            else:
                self._fs.pipe_file(self._path, content, mode="create")
        except Exception:  # every filesystem has errors of its own; one that lasts is met again by reading or writing
            return False
        return True

    def _take_over(self, holder: dict[str, Any]) -> None:
        if not self._is_dead(holder):
            raise ConfigError(
                f"`{self._field}` must be that of no run that is active, but {self._active(holder)}. Wait for it, stop "
                f"it, or choose another `{self._field}`; if it is dead, remove {self._url}/{LOCK}."
            )
        self._say(f"Taking over from a run that died: {self._active(holder, verb='was')}.")
        self._seize()

    def _seize(self) -> None:
        self._write()
        time.sleep(min(1.0, self._beat_s))  # whoever else does so has written by now

    def _check_mine(self) -> None:
        holder = self._read()
        if holder is not None and not self._is_mine(holder):
            raise ConfigError(
                f"`{self._field}` must be that of no run that is active, but {self._active(holder)}, since this "
                f"moment. Choose another `{self._field}`."
            )

    def _reaching(self) -> AbstractContextManager[None]:
        return using(f"{self._url}/{LOCK}", "Check the address, the disk and the credentials, and start again.")

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_s):
            with contextlib.suppress(Exception):  # a storage that fails for a while is tried again
                holder = self._read()
                if holder is not None and not self._is_mine(holder):
                    self._lost, self._folder.others = holder, True
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                self._write()

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        if holder["machine"] == self._mine["machine"]:
            return not _lives(holder)
        if 0 <= time.time() - holder["beat"] < _STALE_BEATS * self._beat_s:  # a beat to come says nothing
            return False
        time.sleep(2 * self._beat_s)  # clocks differ: what still beats is alive
        later = self._read()
        return later is None or later["beat"] == holder["beat"]

    def _read(self) -> dict[str, Any] | None:
        """What the lock holds; None where there is none, or one that is just being written."""
        self._fs.invalidate_cache()
        try:
            content: Any = json.loads(self._fs.cat_file(self._path))
        except (FileNotFoundError, ValueError):
            return None
        return content if isinstance(content, dict) and self._mine.keys() - {_TICKS} <= content.keys() else None

    def _write(self) -> None:
        if isinstance(self._fs, LocalFileSystem):
            write_whole(self._fs, self._path, self._content())
        else:  # objects are whole or not there
            self._fs.pipe_file(self._path, self._content())

    def _content(self) -> bytes:
        return json.dumps({**self._mine, "beat": time.time()}, indent=2).encode()

    def _is_mine(self, holder: dict[str, Any] | None) -> bool:
        return holder is not None and bool(holder["token"] == self._mine["token"])

    def _active(self, holder: dict[str, Any], *, verb: str = "is") -> str:
        age = max(0.0, time.time() - holder["beat"])
        return (
            f"{self._url} {verb} active on {holder['host']} since {holder['since']} (process {holder['pid']}, last "
            f"sign of life {age:.0f} s ago)"
        )


def _lives(holder: Mapping[str, Any]) -> bool:
    try:
        process = psutil.Process(holder["pid"])
        ticks, before = _ticks(process.pid), holder.get(_TICKS)
        if ticks is None or before is None:
            same = abs(process.create_time() - holder["process_started"]) < 1
        else:
            same = ticks == before
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _ticks(pid: int) -> int | None:
    """When a process started, in ticks since its machine did; None where the system does not tell."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[_START_TICKS])
    return None


def _machine() -> str:
    """What processes have in common that see each other's numbers: the host, its start and its process namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # where there is no such folder the host's name must do
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return "/".join(parts)
