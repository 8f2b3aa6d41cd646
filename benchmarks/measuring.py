"""What the benchmarks share: goals, interleaved timing, the cost of a tree of processes, and what a script leaves.

A script is a function `measure(quick) -> Outcome`, and ends in `main(__doc__, __file__, measure)`: it prints its tables
and goals and writes `results/<script>.json`, which `suite.py` gathers and `tables.py` writes into the documentation.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table as RichTable

from ddil_ray.folder import environment

__all__ = [
    "RESULTS",
    "Goal",
    "Outcome",
    "Table",
    "Usage",
    "cpu_seconds",
    "cpu_seconds_of",
    "interleaved",
    "main",
    "medians",
    "show_goals",
    "timed",
    "usage",
]

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Goal:
    """What was promised before it was measured: `measured` is at most `bound`, or at least."""

    name: str
    measured: float
    bound: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the promise holds."""
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound


@dataclass(frozen=True)
class Table:
    """Figures as they are shown; its name is the mark in the documentation that they go to."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Outcome:
    """What a benchmark found."""

    tables: list[Table] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    """Everything measured, unrounded."""


def timed(call: Callable[[], Any]) -> float:
    """Seconds that `call` takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def interleaved(arms: Mapping[str, Callable[[], Any]], *, repeats: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of every arm, `repeats` times each in turn, so that what else the machine does falls on all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(warm + repeats):
        for name, arm in arms.items():
            took = timed(arm)
            if repeat >= warm:
                seconds[name].append(took)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of every arm."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def _tree() -> Iterator[psutil.Process]:
    yield psutil.Process()
    yield from psutil.Process().children(recursive=True)


@dataclass
class _Seen:
    """CPU-seconds by process, as last seen: those that have ended keep what they had."""

    spent: dict[tuple[int, float], float] = field(default_factory=dict)
    titles: dict[tuple[int, float], str] = field(default_factory=dict)
    looking_s: float = 0.0
    """What looking took, which is no part of the work."""
    total: float = 0.0


_SEEN = _Seen()


def cpu_seconds() -> float:
    """CPU-seconds of this process and of all that have been seen below it; ask now and then, or some are missed."""
    started = time.thread_time()
    for process in _tree():
        with contextlib.suppress(psutil.Error):
            times, key = process.cpu_times(), (process.pid, process.create_time())
            _SEEN.spent[key], _SEEN.titles[key] = times.user + times.system, "".join(process.cmdline()[:1])
    _SEEN.looking_s += time.thread_time() - started
    # Never less than before: processes are timed in ticks of 10 ms, looking is not.
    _SEEN.total = max(_SEEN.total, sum(_SEEN.spent.values()) - _SEEN.looking_s)
    return _SEEN.total


def cpu_seconds_of(*titles: str) -> float:
    """Of those that `cpu_seconds` last saw the part of processes whose titles begin like one of `titles`."""
    return sum(spent for key, spent in _SEEN.spent.items() if _SEEN.titles[key].startswith(titles))


def memory_bytes() -> int:
    """Bytes held by this process and all below it: pages that are shared count once, in parts."""
    total = 0
    for process in _tree():
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total


@dataclass
class Usage:
    """What a stretch of work cost: this process and all below it."""

    seconds: float = 0.0
    cpu_s: float = 0.0
    peak_bytes: int = 0


@contextlib.contextmanager
def usage(*, every_s: float | None = None) -> Iterator[Usage]:
    """Measure a stretch of work; its peak memory too where `every_s` says how often to look."""
    found, done = Usage(), threading.Event()

    def watch() -> None:
        while every_s is not None and not done.is_set():
            found.peak_bytes = max(found.peak_bytes, memory_bytes())
            done.wait(every_s)

    watcher = threading.Thread(target=watch, daemon=True)
    started, before = time.perf_counter(), cpu_seconds()
    watcher.start()
    try:
        yield found
    finally:
        found.seconds, found.cpu_s = time.perf_counter() - started, cpu_seconds() - before
        done.set()
        watcher.join()


def show_goals(goals: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print goals in the form in which they are written: name, measured, bound, at_least, met."""
    table = RichTable(title="Goals")
    for column in ("goal", "measured", "bound", "met"):
        table.add_column(column)
    for goal in goals:
        bound = f"{'>=' if goal['at_least'] else '<='} {goal['bound']:.4g}"
        table.add_row(goal["name"], f"{goal['measured']:.4g}", bound, "yes" if goal["met"] else "NO")
    console.print(table)


def main(about: str, script: str, measure: Callable[[bool], Outcome]) -> None:
    """Run a benchmark from the command line."""
    name = Path(script).stem
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="a small part of the work: whether it runs at all")
    args = parser.parse_args()
    load, started = os.getloadavg()[0], time.perf_counter()
    outcome = measure(args.quick)
    console = Console(width=140)
    for table in outcome.tables:
        shown = RichTable(*table.columns, title=table.name)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    goals = [{**asdict(goal), "met": goal.met} for goal in outcome.goals]
    if goals:
        show_goals(goals, console)
    content = {
        "quick": args.quick,
        "seconds": round(time.perf_counter() - started, 1),
        "load_before": load,
        "environment": environment(0),
        "goals": goals,
        "tables": [asdict(table) for table in outcome.tables],
        "figures": outcome.figures,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{name}: {content['seconds']} s; {args.out}")
