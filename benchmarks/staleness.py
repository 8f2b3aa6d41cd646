"""Age of rows and throughput against the bound on age; and whether the object store stays flat.

Devices are simulated (`sleeping.py`), once with rollouts as the slower side and once with training. Every step trains
on 16 student states, weights are published every 4 steps; the least bound that cannot stall is 4. Without a bound,
blocks may lie ready without limit too.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import measuring
from marked_runs import QUIET, MarkedView, merged, run_on_ray
from measuring import Goal, Outcome, Table

from ddil_ray.config import RunConfig
from ddil_ray.factory import allow_code
from ddil_ray.runtime.cluster import ray_session
from ddil_ray.training.recipe import Recipe

ROWS, EVERY = 16, 4
BOUNDS: dict[str, dict[str, int]] = {
    "least": {"max_staleness": EVERY},
    "default": {},
    "none": {"max_staleness": 10**6, "ahead": 10**6},
}
"""Settings of `replay`."""
SPEEDS = {"rollouts slower": "sleeping:fast_trainer", "training slower": "sleeping:slow_trainer"}
ARMS = {"rollouts slower": ("least", "default", "none"), "training slower": ("default", "none")}
"""Keys of `BOUNDS`: the least costs where rollouts are slower."""


def settings(teacher: str, *, steps: int, replay: Mapping[str, int]) -> dict[str, Any]:
    """A run of one phase whose every state comes from the student."""
    return {
        "teacher": {"model": teacher, "guidance": None},
        "data": {"source": "digits"},
        "objective": {"type": "pd", "teacher_steps": 8, "student_steps": [4]},
        "states": {"student": 1.0, "forward": 0.0},
        "trainer": {"steps": steps, "batch_size": ROWS, "lr": 1e-4},
        "student_rollouts": {"batch_size": ROWS},
        "sync": {"every": EVERY},
        "replay": dict(replay),
    }


def summed_up(view: MarkedView, *, warm: int) -> dict[str, float]:
    """Throughput and ages of the records after `warm` steps; every record is of 5 steps."""
    records = [mark.record for mark in view.marks if mark.step > warm]
    rates = [record["throughput/samples_per_s"] for record in records]
    return {
        "samples_per_s": len(rates) / sum(1 / rate for rate in rates),
        "age_median": sorted(record["staleness/p50"] for record in records)[len(records) // 2],
        "age_most": max(mark.record["staleness/max"] for mark in view.marks),
        "stall_share": sum(record["trainer/stall_share"] for record in records) / len(records),
    }


def steps_of(run: Mapping[str, Any]) -> int:
    """The bound of a run."""
    config = RunConfig.model_validate(merged(QUIET, run, {"name": "bound"}))
    return Recipe(config).ingredients().max_staleness


def bounded(folder: Path, *, steps: int, repeats: int) -> dict[str, dict[str, list[dict[str, float]]]]:
    """What every speed and bound gave, in turn."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {
        speed: {bound: [] for bound in ARMS[speed]} for speed in SPEEDS
    }
    for repeat in range(repeats):
        for speed, teacher in SPEEDS.items():
            for bound in ARMS[speed]:
                run = settings(teacher, steps=steps, replay=BOUNDS[bound])
                view = run_on_ray(folder, f"{teacher.partition(':')[2]}-{bound}-{repeat}", run)
                found[speed][bound].append({"bound": steps_of(run), **summed_up(view, warm=steps // 5)})
    return found


class StoreWatch:
    """Bytes in the object store, looked at while the context lasts."""

    def __init__(self, every_s: float = 0.5) -> None:
        self.used: list[tuple[float, int]] = []
        self._every_s, self._ended = every_s, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _look(self) -> None:
        from ray._private.internal_api import get_memory_info_reply

        self.used.append((time.perf_counter(), get_memory_info_reply(self._state).store_stats.object_store_bytes_used))

    def _watch(self) -> None:
        while not self._ended.wait(self._every_s):
            self._look()

    def __enter__(self) -> StoreWatch:
        from ray._private.internal_api import get_state_from_address

        self._state = get_state_from_address(None)
        self._look()  # which connects, while nothing else asks Ray for anything
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def long_stream(folder: Path, *, batches: int) -> tuple[list[int], float]:
    """Bytes in the object store during a run of `batches` small batches, after its first tenth; seconds of the run.

    A block is 150 KB, since Ray keeps objects below 100 KB elsewhere, and serves 4 batches.
    """
    rows = {"batch_size": 256}
    changes = {
        "states": {"forward": 0.5, "student": 0.5},
        "trainer": {"batch_size": 128},
        "forward_states": rows,
        "student_rollouts": rows,
        "sync": {"every": 50},
        "tracking": {"log_every": max(1, batches // 100)},
    }
    run = settings("ddil_ray.testing:tiny_model", steps=batches, replay={"max_staleness": 200})
    with StoreWatch() as watch:
        view = run_on_ray(folder, "long", merged(run, changes))
    warm = next(mark.seconds for mark in view.marks if mark.step >= batches // 10)
    last = view.marks[-2].seconds
    return [used for at, used in watch.used if warm <= at <= last], last - view.marks[0].seconds


def measure(quick: bool) -> Outcome:
    """Bounds and speeds, then the long run."""
    allow_code()  # its teachers are factories beside this file
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    steps, repeats, batches = (40, 1, 200) if quick else (250, 1, 10_000)
    with tempfile.TemporaryDirectory() as folder, ray_session(cpus=6):
        found = bounded(Path(folder), steps=steps, repeats=repeats)
        used, seconds = long_stream(Path(folder), batches=batches)
    rows, goals, beyond = [], [], 0
    for speed, arms in found.items():
        medians = {bound: measuring.medians({n: [f[n] for f in runs] for n in runs[0]}) for bound, runs in arms.items()}
        share = {bound: arm["samples_per_s"] / medians["none"]["samples_per_s"] for bound, arm in medians.items()}
        for bound, arm in medians.items():
            most = max(f["age_most"] for f in arms[bound])
            beyond += int(most > arm["bound"])
            shown = bound if bound == "none" else f"{arm['bound']:.0f} ({bound})"
            ages = [f"{arm['age_median']:.0f}", f"{most:.0f}"]
            speeds = [f"{arm['samples_per_s']:.0f}", f"{share[bound]:.3f}", f"{arm['stall_share']:.1%}"]
            rows.append([speed, shown, *ages, *speeds])
        name = f"throughput at the default bound / without one, {speed}"
        goals.append(Goal(name, share["default"], 0.95, at_least=True))
    half = len(used) // 2
    growth = max(used[half:]) / max(used[:half])
    goals.append(Goal("arms with rows beyond their bound", beyond, 0))
    goals.append(Goal(f"object store, most in 2nd / 1st half of {batches} batches", growth, 1.05))
    mib = [f"{value / 2**20:.2f}" for value in (min(used), max(used[:half]), max(used[half:]))]
    heading = ["slower side", "bound, steps", "age, median", "most", "samples/s", "of unbounded", "trainer waits"]
    store = Table(
        "store",
        ["batches", "seconds", "least, MiB", "most, 1st half", "most, 2nd half"],
        [[str(batches), f"{seconds:.0f}", *mib]],
    )
    return Outcome([Table("staleness", heading, rows), store], goals, {"bounds": found, "store_bytes": used})


if __name__ == "__main__":
    measuring.main(__doc__, __file__, measure)
