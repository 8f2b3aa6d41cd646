"""Age of rows and throughput against the bound on age; and whether the object store stays flat.

Devices are simulated (`sleeping.py`), once with rollouts as the slower side and once with training. Every step trains
on 16 student states, weights are published every 4 steps; the least bound that cannot stall is 4.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import measuring
from marked_runs import MarkedView, run_on_ray
from measuring import Goal, Outcome, Table

from ddil_ray.runtime.cluster import ray_session

ROWS, EVERY = 16, 4
BOUNDS = (EVERY, 2 * EVERY, 4 * EVERY)
UNBOUNDED = 10**6
SPEEDS = {"rollouts slower": "sleeping:fast_trainer", "training slower": "sleeping:slow_trainer"}


def settings(teacher: str, *, steps: int, bound: int) -> dict[str, Any]:
    """A run of one phase whose every state comes from the student."""
    return {
        "teacher": {"model": teacher, "guidance": None},
        "data": {"source": "digits"},
        "objective": {"type": "pd", "teacher_steps": 8, "student_steps": [4]},
        "states": {"student": 1.0, "forward": 0.0},
        "trainer": {"steps": steps, "batch_size": ROWS, "lr": 1e-4},
        "student_rollouts": {"batch_size": ROWS},
        "sync": {"every": EVERY},
        "replay": {"max_staleness": bound},
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


def bounded(folder: Path, *, steps: int, repeats: int) -> dict[str, list[dict[str, float]]]:
    """What every speed and bound gave, in turn."""
    found: dict[str, list[dict[str, float]]] = {}
    for repeat in range(repeats):
        for speed, teacher in SPEEDS.items():
            for bound in (*BOUNDS, UNBOUNDED):
                name = f"{teacher.partition(':')[2]}-{bound}-{repeat}"
                view = run_on_ray(folder, name, settings(teacher, steps=steps, bound=bound))
                found.setdefault(f"{speed}, {bound}", []).append(summed_up(view, warm=steps // 5))
    return found


class StoreWatch:
    """Bytes in the object store, looked at while the context lasts."""

    def __init__(self, every_s: float = 0.5) -> None:
        self.used: list[tuple[float, int]] = []
        self._every_s, self._ended = every_s, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        from ray._private.internal_api import get_memory_info_reply, get_state_from_address

        state = get_state_from_address(None)
        while not self._ended.wait(self._every_s):
            self.used.append((time.perf_counter(), get_memory_info_reply(state).store_stats.object_store_bytes_used))

    def __enter__(self) -> StoreWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def long_stream(folder: Path, *, batches: int) -> tuple[list[int], float]:
    """Bytes in the object store during a run of `batches` small batches, after its first tenth; seconds of the run."""
    small = settings("ddil_ray.testing:tiny_model", steps=batches, bound=200)
    small |= {"states": {"forward": 0.5, "student": 0.5}, "forward_states": {"batch_size": ROWS}, "sync": {"every": 50}}
    small["tracking"] = {"log_every": max(1, batches // 100)}
    with StoreWatch() as watch:
        view = run_on_ray(folder, "long", small)
    warm = next(mark.seconds for mark in view.marks if mark.step >= batches // 10)
    last = view.marks[-2].seconds
    return [used for at, used in watch.used if warm <= at <= last], last - view.marks[0].seconds


def measure(quick: bool) -> Outcome:
    """Bounds and speeds, then the long run."""
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    steps, repeats, batches = (40, 1, 200) if quick else (250, 2, 10_000)
    with tempfile.TemporaryDirectory() as folder, ray_session(cpus=6):
        found = bounded(Path(folder), steps=steps, repeats=repeats)
        used, seconds = long_stream(Path(folder), batches=batches)
    rows, goals, beyond = [], [], 0
    for speed in SPEEDS:
        arms = {
            bound: measuring.medians(
                {n: [f[n] for f in found[f"{speed}, {bound}"]] for n in found[f"{speed}, {bound}"][0]}
            )
            for bound in (*BOUNDS, UNBOUNDED)
        }
        free = arms[UNBOUNDED]["samples_per_s"]
        for bound, arm in arms.items():
            most = max(f["age_most"] for f in found[f"{speed}, {bound}"])
            beyond += int(most > bound)
            rows.append(
                [
                    speed,
                    "none" if bound == UNBOUNDED else str(bound),
                    f"{arm['age_median']:.0f}",
                    f"{most:.0f}",
                    f"{arm['samples_per_s']:.0f}",
                    f"{arm['samples_per_s'] / free:.3f}",
                    f"{arm['stall_share']:.1%}",
                ]
            )
        share = arms[2 * EVERY]["samples_per_s"] / free
        goals.append(Goal(f"throughput at the default bound / without one, {speed}", share, 0.95, at_least=True))
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
