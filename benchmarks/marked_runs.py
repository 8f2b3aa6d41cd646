"""Runs on Ray that are watched from outside: what had been spent when each record arrived."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from measuring import cpu_seconds, cpu_seconds_of

from ddil_ray.config import RunConfig
from ddil_ray.runtime.run import distill
from ddil_ray.tracking import View

__all__ = ["Mark", "MarkedView", "Stretch", "merged", "run_on_ray"]

QUIET: dict[str, Any] = {
    "tracking": {"tracker": "none", "log_every": 5},
    "evaluation": {"enabled": False},
    "shift": {"enabled": False},
    "checkpoint": {"every": 10**6},
}
_AHEAD = "actors/blocks_ahead/"
_COMPUTING = ("ray::RayTrainWorker", "ray::MapWorker")
"""Begin the titles of the processes that train, and make states and labels."""


@dataclass(frozen=True)
class Mark:
    """A training record, and what had been spent when it arrived."""

    record: dict[str, float]
    seconds: float
    cpu_s: float
    computing_s: float = 0.0
    """Of `cpu_s` the part of processes that train, and make states and labels."""

    @property
    def step(self) -> int:
        """Updates done."""
        return int(self.record["step"])

    def apart(self, other: Mark) -> float:
        """Blocks by which actors were further ahead of the trainer at one than at the other, at most of any stream."""
        return max(abs(other.record[name] - lead) for name, lead in self.record.items() if name.startswith(_AHEAD))


@dataclass
class Stretch:
    """The cost of the updates between two marks, of all processes."""

    steps: int
    seconds: float
    cpu_s: float
    computing_s: float
    blocks_apart: float
    """By how much the lead of the actors had changed: what they made too much or too little, see `Mark.apart`."""


class MarkedView(View):
    """Shows nothing, and keeps every record of training with what had been spent."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[Mark] = []
        self.others: list[dict[str, float]] = []

    def show(self, record: dict[str, float]) -> None:
        """See `View.show`."""
        if "loss" in record:
            self.marks.append(Mark(record, time.perf_counter(), cpu_seconds(), cpu_seconds_of(*_COMPUTING)))
        else:
            self.others.append(record)

    def say(self, text: str) -> None:
        """See `View.say`."""

    def stretch(self, *, after: int, until: int, least: int) -> Stretch:
        """The longest one of those whose actors were as far ahead at the end as at the begin, or nearly.

        Actors work ahead of the trainer, at first until all that may lie ready does, and rest at a run's end, when all
        blocks are made. Between two marks with the same lead they made the blocks that the trainer took.

        Args:
            after: steps done at its begin, at least.
            until: steps done at its end, at most.
            least: steps.

        Raises:
            RuntimeError: there is none with leads within a block.
        """
        inside = [mark for mark in _newest_of_polls(self.marks) if after <= mark.step <= until]
        pairs = [pair for pair in itertools.combinations(inside, 2) if pair[1].step - pair[0].step >= least]
        alike = [pair for pair in pairs if pair[0].apart(pair[1]) <= 1]
        if not alike:
            leads = [{n: v for n, v in mark.record.items() if n.startswith(_AHEAD)} for mark in inside]
            raise RuntimeError(
                f"No {least} steps between {after} and {until} begin and end with actors equally far ahead: {leads}"
            )
        first, last = min(alike, key=lambda pair: (pair[0].apart(pair[1]), pair[0].step - pair[1].step))
        differences = (getattr(last, of) - getattr(first, of) for of in ("step", "seconds", "cpu_s", "computing_s"))
        return Stretch(*differences, first.apart(last))


def _newest_of_polls(marks: Sequence[Mark]) -> list[Mark]:
    """Of records that arrive together the last is the newest, and what had been spent is its own."""
    following = itertools.chain((mark.seconds for mark in marks[1:]), [float("inf")])
    return [mark for mark, later in zip(marks, following, strict=True) if later - mark.seconds >= 0.1]


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
