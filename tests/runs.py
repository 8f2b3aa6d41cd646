"""Small runs that tests share."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psutil

from ddil_ray.config import RunConfig

__all__ = ["kill", "processes", "small_run", "when"]

_SMALL: dict[str, Any] = {
    "name": "small",
    "teacher": {"model": "ddil_ray.testing:tiny_model", "guidance": 1.0},
    "data": {"source": "digits"},
    "objective": {"type": "lcm", "solver_steps": 10, "student_steps": 2},
    "states": {"forward": 0.5, "student": 0.5},
    "trainer": {"steps": 20, "batch_size": 16, "lr": 1e-3},
    "forward_states": {"batch_size": 16},
    "student_rollouts": {"batch_size": 16},
    "teacher_rollouts": {"batch_size": 16},
    "sync": {"every": 4},
    "checkpoint": {"every": 8},
    "tracking": {"tracker": "none", "log_every": 2},
    "evaluation": {"enabled": False},
    "shift": {"enabled": False},
}
PD = {"type": "pd", "teacher_steps": 8, "student_steps": [4, 2]}
DMD2 = {"type": "dmd2", "student_steps": 4, "student_every": 2, "gan_layer": "inside"}
THREE_SOURCES = {"forward": 0.4, "student": 0.3, "teacher": 0.3}


def small_run(**changes: Any) -> RunConfig:
    """A run of seconds on the tiny model; `changes` replace settings, group by group."""
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in _SMALL.items()}
    for key, value in changes.items():
        replace = not isinstance(value, dict) or key in ("objective", "states")
        tree[key] = value if replace else {**tree.get(key, {}), **value}
    return RunConfig.model_validate(tree)


def when(condition: Callable[[], Any], act: Callable[[], Any], timeout_s: float = 280) -> Future[bool]:
    """Do `act` in a thread once `condition` holds; the future tells that it was done."""

    def watch() -> bool:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        act()
        return True

    done = ThreadPoolExecutor(1).submit(watch)
    done.add_done_callback(_tell)
    return done


def _tell(done: Future[bool]) -> None:
    """Say at once what went wrong in a thread: a test that waits for what it was to do may not get to ask."""
    error = done.exception()
    if error is not None:
        traceback.print_exception(error)


def processes(title: str) -> list[psutil.Process]:
    """Processes of this session's Ray by what Ray calls them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(title in part for part in process.cmdline()):
                found.append(process)
    return found


def kill(title: str) -> None:
    """Kill one process of this session's Ray."""
    processes(title)[0].kill()
