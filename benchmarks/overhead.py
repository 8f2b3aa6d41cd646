"""What Ray costs: a run on Ray against the plain loop, which is one process, on the same work.

Both train the student of `small_pipeline` by LCM on half forward states, half its own rollouts: above 20 ms of compute
per sample. CPU-seconds are those of all processes, Ray's own among them, between two records at which actors are as far
ahead of the trainer: after all that may lie ready does so, and before the streams have run out of blocks.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import measuring
from marked_runs import QUIET, MarkedView, merged, run_on_ray
from measuring import Goal, Outcome, Table
from small_pipeline import save_prepared, small_teacher

from ddil_ray.config import RunConfig
from ddil_ray.training.inline import distill_inline
from ddil_ray.training.recipe import Recipe

LOOPS = min(3, os.cpu_count() or 1)
"""Plain loops side by side: as many as processes compute on Ray, where there are cores for them."""
BATCH = 8
BLOCK = 16
LEAD = 30
"""Steps left out at both ends: actors get ahead in the first ones, and rest in the last 20, since 5 blocks of a stream,
each of 16 rows, may be begun before they are needed, and a step takes 4 rows."""
SLACK = 20
"""Steps that a stretch may be longer or later by."""


def settings(folder: Path, *, steps: int) -> dict[str, Any]:
    """The run that both make."""
    return {
        "name": "overhead",
        "teacher": {"model": str(folder / "pipeline"), "guidance": 7.0},
        "data": {"source": str(folder / "data")},
        "objective": {"type": "lcm", "student_steps": 4},
        "states": {"forward": 0.5, "student": 0.5},
        "trainer": {"steps": steps, "batch_size": BATCH, "lr": 1e-4},
        "forward_states": {"batch_size": BLOCK},
        "student_rollouts": {"batch_size": BLOCK},
        "sync": {"every": 10},
    }


def plain(folder: Path, *, steps: int) -> dict[str, float]:
    """The loop in this process; its last record."""
    config = RunConfig.model_validate(merged(QUIET, settings(folder, steps=steps)))
    return distill_inline(Recipe(config)).records[-1]


def plain_rates(folder: Path, *, steps: int) -> tuple[float, float]:
    """CPU-seconds per sample and samples per second of the loop in this process, without its start.

    It makes every block when it needs it, so any steps will do that whole blocks last for.
    """
    torch.set_num_threads(1)
    clocks = []
    for length in (1, 1 + steps):
        started = time.process_time(), time.perf_counter()
        plain(folder, steps=length)
        clocks.append((time.process_time() - started[0], time.perf_counter() - started[1]))
    cpu_s, seconds = (whole - first for first, whole in zip(*clocks, strict=True))
    return cpu_s / (steps * BATCH), steps * BATCH / seconds


def once(folder: Path, number: int, *, loops: Executor, steps: int, ray_steps: int) -> dict[str, float]:
    """CPU-seconds and samples per second of both, one after the other.

    Plain loops run side by side, since a core that has busy ones beside it is slower, as they have on Ray. There one
    block of each stream may be counted too many or too few: of two streams that is 80 passes of a row among 52 a step,
    so in 120 steps about 1 %.
    """
    each = [loops.submit(plain_rates, folder, steps=steps) for _ in range(LOOPS)]
    cpu_s, rates = zip(*(loop.result() for loop in each), strict=True)
    until = LEAD + ray_steps + SLACK
    view = run_on_ray(folder / "runs", f"run-{number}", settings(folder, steps=until + LEAD))
    stretch = view.stretch(after=LEAD, until=until, least=ray_steps)
    samples = stretch.steps * BATCH
    return {
        "plain_cpu_s_per_sample": fmean(cpu_s),
        "plain_computing_s_per_sample": fmean(cpu_s),
        "plain_samples_per_s": fmean(rates),
        "ray_cpu_s_per_sample": stretch.cpu_s / samples,
        "ray_computing_s_per_sample": stretch.computing_s / samples,
        "ray_samples_per_s": samples / stretch.seconds,
        "ray_steps": stretch.steps,
        "ray_blocks_apart": stretch.blocks_apart,
    }


def states_made(record: dict[str, float]) -> dict[str, float]:
    """How the states of a record were used: the same where the same work was done."""
    return {name: value for name, value in record.items() if name.startswith("replay/")}


def peaks(folder: Path, *, steps: int) -> tuple[dict[str, float], bool]:
    """Peak bytes of both, and whether both took in and drew the same rows."""
    with measuring.usage(every_s=0.5) as inline:
        last = plain(folder, steps=steps)
    with measuring.usage(every_s=2.0) as ray:
        view: MarkedView = run_on_ray(folder / "runs", "memory", settings(folder, steps=steps))
    same = states_made(view.marks[-1].record) == states_made(last)
    return {"plain": inline.peak_bytes, "ray": ray.peak_bytes}, same


def measure(quick: bool) -> Outcome:
    """Both in turn."""
    torch.set_num_threads(1)
    steps, ray_steps, repeats = (20, 20, 1) if quick else (60, 120, 2)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_prepared(small_teacher(folder), folder / "data")
        peak, same = peaks(folder, steps=20)
        assert same, "the two arms must take in and draw the same rows"
        with ProcessPoolExecutor(LOOPS, get_context("spawn")) as loops:
            found = [once(folder, n, loops=loops, steps=steps, ray_steps=ray_steps) for n in range(repeats)]
    medians = measuring.medians({name: [f[name] for f in found] for name in found[0]})
    ratio = medians["ray_cpu_s_per_sample"] / medians["plain_cpu_s_per_sample"]
    arms = {"plain": f"a plain loop, {LOOPS} side by side", "ray": "on Ray: trainer, 2 state actors, hub"}
    rows = [
        [
            arm,
            f"{medians[f'{key}_cpu_s_per_sample']:.4f}",
            f"{medians[f'{key}_computing_s_per_sample']:.4f}",
            f"{medians[f'{key}_samples_per_s']:.1f}",
            f"{peak[key] / 2**20:,.0f}",
        ]
        for key, arm in arms.items()
    ]
    goals = [
        Goal("compute per sample, s", medians["plain_cpu_s_per_sample"], 0.020, at_least=True),
        Goal("CPU-s per sample, Ray path / plain loop", ratio, 1.05),
    ]
    heading = ["arm", "CPU-s per sample", "of trainer and state actors", "samples/s", "peak memory, MiB"]
    return Outcome([Table("overhead", heading, rows)], goals, {"repeats": found, "peak_bytes": peak})


if __name__ == "__main__":
    measuring.main(__doc__, __file__, measure)
