"""Programs that tests start beside themselves: where, in which environment, and what is left of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

__all__ = ["Distilling", "alive", "checkout", "distilling", "environment", "free_port", "mentioning", "until"]

ROOT = Path(__file__).parents[1]
_DISTILL = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal; a shell has it ignored behind itself
from ddil_ray.cli import main
main()
"""
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


def mentioning(folder: Path) -> list[psutil.Process]:
    """Processes whose command line or environment names `folder`, and all that they have started."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = [*process.cmdline(), *process.environ().values()]
            if process.pid not in found and any(str(folder) in word for word in words):
                found |= {below.pid: below for below in (process, *process.children(recursive=True))}
    return list(found.values())


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def checkout(folder: Path) -> Path:
    """A clone of this repository: the files that git knows, as they are now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@dataclass
class Distilling:
    """`ddil-ray distill` as a process with a Ray of its own."""

    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        """All that it has printed."""
        return self.log.read_text()

    def below(self, title: str = "") -> list[psutil.Process]:
        """The processes that it has started, by what Ray calls them."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def until(self, condition: Callable[[], object], timeout_s: float = 200) -> None:
        """Wait for `condition`, which must come while it runs."""
        until(lambda: self.process.poll() is not None or condition(), timeout_s)
        assert self.process.poll() is None, self.said()[-3000:]


@contextlib.contextmanager
def distilling(log: Path, *arguments: object) -> Iterator[Distilling]:
    """`ddil-ray distill ARGUMENTS`, which finds factories in tests/; nothing of it is left afterwards."""
    variables = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", _DISTILL, "distill", *map(str, arguments)]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=kept | variables, stdout=out, stderr=out)
    started = Distilling(process, log)
    try:
        yield started
    finally:
        if process.poll() is None:
            left = started.below()
            process.kill()
            process.wait()
            for below in alive(left):
                below.kill()
