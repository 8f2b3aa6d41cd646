"""Programs that tests start beside themselves: where, in which environment, and what is left of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
from pages import ROOT

__all__ = ["checkout", "environment", "free_port", "running", "until"]

T = TypeVar("T")


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(**more: object) -> dict[str, str]:
    """This process's environment without any Ray, and with `more`."""
    left_out = ("RAY_", "DDIL_", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return {**kept, **{name: str(value) for name, value in more.items()}}


def until(condition: Callable[[], T], timeout_s: float = 90) -> T:
    """What `condition` gives once it is true."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return found


def running(name: str, value: object) -> list[psutil.Process]:
    """Processes with this variable in the environment that they were started in."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(name) == str(value) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def checkout(folder: Path) -> Path:
    """A clone of this repository: the files that git knows, as they are now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder
