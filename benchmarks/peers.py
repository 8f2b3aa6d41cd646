"""CPU-seconds per sample against diffusers' LCM script and DMD2, on the same pipeline, batch and updates.

Forward states only, so that nothing is done that the peers do not do; `peer_steps.py` has their steps. Floating-point
operations are counted first. One process, one thread, fp32.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
import measuring
from measuring import Goal, Outcome, Table
from peer_steps import DiffusersLcm, Dmd2, PeerData
from small_pipeline import random_latents, small_teacher

from ddil_ray.config import RunConfig
from ddil_ray.data import ImageData
from ddil_ray.models import DiffusionModel, student_of
from ddil_ray.prompts import NEGATIVE
from ddil_ray.training.inline import distill_inline
from ddil_ray.training.recipe import Recipe

BATCH = 8
METHODS: dict[str, dict[str, Any]] = {
    "lcm": {"type": "lcm", "guidance_embedding": True},
    "dmd2": {"type": "dmd2", "student_every": 5},
}
PEERS = {"lcm": DiffusersLcm, "dmd2": Dmd2}
Run = Callable[[int], None]
"""Trains for a number of steps, from the start."""


def our_run(method: str, teacher: DiffusionModel, data: ImageData) -> Run:
    """The plain loop of this library, forward states only."""

    def run(steps: int) -> None:
        config = RunConfig.model_validate(
            {
                "name": "peer",
                "teacher": {"model": str(teacher.folder), "guidance": [3.0, 15.0] if method == "lcm" else 7.0},
                "data": {"source": "digits"},
                "objective": METHODS[method],
                "states": {"forward": 1.0},
                "trainer": {"steps": steps, "batch_size": BATCH, "lr": 1e-4, "weight_decay": 1e-2},
                "forward_states": {"batch_size": BATCH},
                "sync": {"every": 50},
                "tracking": {"tracker": "none", "log_every": 50},
                "evaluation": {"enabled": False},
                "shift": {"enabled": False},
            }
        )
        distill_inline(Recipe(config), teacher=teacher, data=data)

    return run


def peer_run(method: str, teacher: DiffusionModel, data: ImageData) -> Run:
    """The peer's loop, from the same weights on the same data."""
    bank = teacher.network.bank
    embedded = bank(data.labels, data.images)["prompt"]
    no_prompt = bank(torch.tensor([NEGATIVE]), data.images)["prompt"]
    alphas_cumprod = (teacher.schedule.alpha((torch.arange(1000) + 1.0) / 1000) ** 2).float()
    peer_data = PeerData(data.images, embedded, no_prompt, alphas_cumprod)

    def run(steps: int) -> None:
        student = student_of(teacher, guidance_embedding=method == "lcm").copy().network.denoiser
        frozen = teacher.copy().network.denoiser.eval().requires_grad_(False)
        peer = PEERS[method](frozen, student.train().requires_grad_(True), peer_data)
        for _ in range(steps):
            peer.step(BATCH)

    return run


def flops_per_sample(run: Run, steps: int) -> float:
    """Counted floating-point operations of a step, from runs of two lengths, averaged over `steps`."""
    counts = []
    for length in (steps, 2 * steps):
        with FlopCounterMode(display=False) as counter:
            run(length)
        counts.append(counter.get_total_flops())
    return (counts[1] - counts[0]) / (steps * BATCH)


def cpu_of(run: Run, steps: int) -> float:
    """CPU-seconds of a run in this process."""
    started = time.process_time()
    run(steps)
    return time.process_time() - started


def compare(method: str, runs: dict[str, Run], *, steps: int, repeats: int) -> dict[str, Any]:
    """FLOPs and CPU-seconds per sample of both, runs of one step taken off from longer ones.

    Runs are short and take turns, the first of each turn being the last of the one before, so that what slows the
    machine down for seconds slows down both.
    """
    flops = {name: flops_per_sample(run, 5) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name, run in list(runs.items())[:: 1 if repeat % 2 else -1]:
            first = cpu_of(run, 1)
            seconds[name].append((cpu_of(run, 1 + steps) - first) / (steps * BATCH))
    medians = measuring.medians(seconds)
    return {
        "flops_per_sample": flops,
        "cpu_s_per_sample": seconds,
        "flops_ratio": flops["ours"] / flops["theirs"],
        "cpu_ratio": medians["ours"] / medians["theirs"],
        "medians": medians,
    }


def measure(quick: bool) -> Outcome:
    """Both methods, each beside its peer."""
    torch.set_num_threads(1)
    names = {"lcm": "diffusers `train_lcm_distill_sd_wds.py`", "dmd2": "DMD2 `train_sd.py`"}
    rows, goals, figures = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        teacher = small_teacher(Path(folder))
        data = random_latents(teacher)
        for method, peer in names.items():
            runs = {"ours": our_run(method, teacher, data)}
            runs["ours"](1)  # binds the prompts
            runs["theirs"] = peer_run(method, teacher, data)
            found = compare(method, runs, steps=5 if quick else 15, repeats=2 if quick else 4)
            figures[method] = found
            flops, cpu = found["flops_per_sample"], found["medians"]
            rows.append(
                [
                    f"{method} against {peer}",
                    f"{flops['ours'] / 1000000.0:.1f}",
                    f"{flops['theirs'] / 1000000.0:.1f}",
                    f"{found['flops_ratio']:.3f}",
                    f"{cpu['ours']:.4f}",
                    f"{cpu['theirs']:.4f}",
                    f"{found['cpu_ratio']:.3f}",
                ]
            )
            goals.append(Goal(f"CPU-s per sample, {method} / {peer}, forward-only", found["cpu_ratio"], 1.0))
    heading = ["comparison", "MFLOP, ours", "theirs", "ratio", "CPU-s per sample, ours", "theirs", "ratio"]
    return Outcome([Table("peers", heading, rows)], goals, figures)


if __name__ == "__main__":
    measuring.main(__doc__, __file__, measure)
