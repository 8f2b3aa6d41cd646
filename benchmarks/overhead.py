"""What Ray costs: a run on Ray against the plain loop in one process, on the same work.

Both train the student of `small_pipeline` by LCM on half forward states, half its own rollouts: above 20 ms of compute
per sample. CPU-seconds are those of all processes, Ray's own among them, between two records at which actors are as far
ahead of the trainer: after all that may lie ready does so, and before the streams have run out of blocks.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import measuring
from marked_runs import QUIET, MarkedView, merged, run_on_ray
from measuring import Goal, Outcome, Table, Usage
from small_pipeline import save_prepared, small_teacher

from ddil_ray.config import RunConfig
from ddil_ray.training.inline import distill_inline
from ddil_ray.training.recipe import Recipe

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


def spent(folder: Path, *, steps: int, every_s: float | None = None) -> tuple[Usage, dict[str, float]]:
    """What the loop costs, and its last record."""
    with measuring.usage(every_s=every_s) as found:
        record = plain(folder, steps=steps)
    return found, record


def once(folder: Path, number: int, *, steps: int, ray_steps: int) -> dict[str, float]:
    """CPU-seconds and samples per second of both, one after the other.

    The plain loop makes every block when it needs it, so any steps will do that whole blocks last for. On Ray one block
    of each stream may be counted too many or too few: of two streams that is 80 passes of a row among 52 a step, so in
    160 steps less than 1 %.
    """
    before, _ = spent(folder, steps=1)
    whole, _ = spent(folder, steps=1 + steps)
    until = LEAD + ray_steps + SLACK
    view = run_on_ray(folder / "runs", f"run-{number}", settings(folder, steps=until + LEAD))
    stretch = view.stretch(after=LEAD, until=until, least=ray_steps)
    samples = stretch.steps * BATCH
    return {
        "plain_cpu_s_per_sample": (whole.cpu_s - before.cpu_s) / (steps * BATCH),
        "plain_samples_per_s": steps * BATCH / (whole.seconds - before.seconds),
        "ray_cpu_s_per_sample": stretch.cpu_s / samples,
        "ray_samples_per_s": samples / stretch.seconds,
        "ray_steps": stretch.steps,
        "ray_blocks_apart": stretch.blocks_apart,
    }


def states_made(record: dict[str, float]) -> dict[str, float]:
    """How the states of a record were used: the same where the same work was done."""
    return {name: value for name, value in record.items() if name.startswith("replay/")}


def peaks(folder: Path, *, steps: int) -> tuple[dict[str, float], bool]:
    """Peak bytes of both, and whether both took in and drew the same rows."""
    inline, last = spent(folder, steps=steps, every_s=0.5)
    with measuring.usage(every_s=2.0) as ray:
        view: MarkedView = run_on_ray(folder / "runs", "memory", settings(folder, steps=steps))
    same = states_made(view.marks[-1].record) == states_made(last)
    return {"plain": inline.peak_bytes, "ray": ray.peak_bytes}, same


def measure(quick: bool) -> Outcome:
    """Both in turn."""
    torch.set_num_threads(1)
    steps, ray_steps, repeats = (20, 20, 1) if quick else (60, 160, 2)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_prepared(small_teacher(folder), folder / "data")
        peak, same = peaks(folder, steps=20)
        assert same, "the two arms must take in and draw the same rows"
        found = [once(folder, n, steps=steps, ray_steps=ray_steps) for n in range(repeats)]
    medians = measuring.medians({name: [f[name] for f in found] for name in found[0]})
    ratio = medians["ray_cpu_s_per_sample"] / medians["plain_cpu_s_per_sample"]
    rows = [
        [
            arm,
            f"{medians[f'{key}_cpu_s_per_sample']:.4f}",
            f"{medians[f'{key}_samples_per_s']:.1f}",
            f"{peak[key] / 2**20:,.0f}",
        ]
        for arm, key in (("plain loop, one process", "plain"), ("on Ray: trainer, 2 state actors, hub, driver", "ray"))
    ]
    goals = [
        Goal("compute per sample, s", medians["plain_cpu_s_per_sample"], 0.020, at_least=True),
        Goal("CPU-s per sample, Ray path / plain loop", ratio, 1.05),
    ]
    heading = ["arm", "CPU-s per sample", "samples/s", "peak memory, MiB"]
    return Outcome([Table("overhead", heading, rows)], goals, {"repeats": found, "peak_bytes": peak})


if __name__ == "__main__":
    measuring.main(__doc__, __file__, measure)
