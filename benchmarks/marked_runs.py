"""Runs on Ray that are watched from outside: what had been spent when each record arrived."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from measuring import cpu_seconds

from ddil_ray.config import RunConfig
from ddil_ray.runtime.run import distill
from ddil_ray.tracking import View

__all__ = ["Mark", "MarkedView", "merged", "run_on_ray"]

QUIET: dict[str, Any] = {
    "tracking": {"tracker": "none", "log_every": 5},
    "evaluation": {"enabled": False},
    "shift": {"enabled": False},
    "checkpoint": {"every": 10**6},
}


@dataclass(frozen=True)
class Mark:
    """A training record, and what had been spent when it arrived."""

    record: dict[str, float]
    seconds: float
    cpu_s: float

    @property
    def step(self) -> int:
        """Updates done."""
        return int(self.record["step"])


@dataclass
class Stretch:
    """The cost of the updates between two marks, of all processes."""

    steps: int
    seconds: float
    cpu_s: float


class MarkedView(View):
    """Shows nothing, and keeps every record of training with what had been spent."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[Mark] = []
        self.others: list[dict[str, float]] = []

    def show(self, record: dict[str, float]) -> None:
        """See `View.show`."""
        if "loss" in record:
            self.marks.append(Mark(record, time.perf_counter(), cpu_seconds()))
        else:
            self.others.append(record)

    def say(self, text: str) -> None:
        """See `View.say`."""

    def stretch(self, *, after: int) -> Stretch:
        """From the first record after `after` steps to the last one before the end: a run's end is no steady state."""
        total = int(self.marks[-1].record["total_steps"])
        inside = [mark for mark in self.marks if after <= mark.step < total]
        # Of records that arrive together the last is the newest, and the time is its own.
        first, last = _newest_of_poll(inside, inside[0]), inside[-1]
        return Stretch(last.step - first.step, last.seconds - first.seconds, last.cpu_s - first.cpu_s)


def _newest_of_poll(marks: list[Mark], mark: Mark) -> Mark:
    return [m for m in marks if m.seconds - mark.seconds < 0.1][-1]


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `parts`, later ones over earlier, group by group."""
    tree: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, dict) and isinstance(tree.get(key), dict)
            tree[key] = {**tree[key], **value} if both else value
    return tree


def run_on_ray(folder: Path, name: str, settings: Mapping[str, Any]) -> MarkedView:
    """Distil as `settings` say; what there is to see of it."""
    view = MarkedView()
    config = RunConfig.model_validate(merged(QUIET, settings, {"name": name, "output": str(folder)}))
    distill(config, view=view)
    return view
