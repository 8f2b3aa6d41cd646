"""Pools of actors that take requests in any order, as `ddil-ray prepare` and `evaluate` use them: rates over 1, 2, ...

Preparing encodes pictures of 256 x 256, evaluating samples digits; both compute, so that they scale with real cores.
Simulated requests take 100 ms without computing: what the pool itself can do with more actors than cores. A rate counts
from when every actor has answered to the last answer: starting actors is left out.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parent))
import measuring
import preparing
from measuring import Outcome, Table
from small_pipeline import save_small_pipeline

from ddil_ray.config import Role, RunConfig, load_config
from ddil_ray.prepare import begin, fill, new_job
from ddil_ray.results import new_benchmark, teacher_samplers
from ddil_ray.runtime.cluster import ray_session
from ddil_ray.runtime.requests import answers
from ddil_ray.training.recipe import Recipe

SIMULATED_S = 0.1


def rate(stamps: Sequence[float], *, skip: int) -> float:
    """Answers per second after the first `skip`."""
    return (len(stamps) - skip) / (stamps[-1] - stamps[skip - 1])


def stamped(stage: str, arguments: Sequence[Any], requests: Sequence[Any], role: Role) -> float:
    """Answers per second of a pool."""
    stamps = [time.perf_counter() for _ in answers("pool", stage, arguments, requests, role)]
    return rate(stamps, skip=4 * role.num_actors)


def simulated(actors: int, *, each: int) -> float:
    """Requests per second of actors that only take time."""
    role = Role(num_actors=actors, num_cpus=0.1, num_gpus=0)
    return stamped("sleeping:SleepingStage", [SIMULATED_S], list(range(each * actors)), role)


def evaluated(actors: int, *, blocks: int) -> float:
    """Samples per second of `evaluate`: a teacher of digits, 16 steps, with features."""
    import ray

    size = 50
    overrides = [f"evaluation.num_samples={blocks * size}", f"evaluation.batch_size={size}", "evaluation.steps=[16]"]
    recipe = Recipe(load_config("digits-perceptron", overrides, kind=RunConfig))
    made = recipe.ingredients()
    benchmark = new_benchmark(recipe, made)
    samplers = {"teacher": {16: teacher_samplers(recipe, made)[16]}}
    work = [ray.put((benchmark.maker, samplers)), ray.put(benchmark.data.images.numpy())]
    role = recipe.config.evaluation.model_copy(update={"num_actors": actors, "num_gpus": 0})
    requests = [("samples", block) for block in range(len(benchmark.maker.blocks))]
    return size * stamped("ddil_ray.runtime.evaluation:BlockStage", [work], requests, role)


def prepared(actors: int, folder: Path, *, items: int) -> float:
    """Images per second of `prepare`."""
    from ddil_ray.runtime import prepare as on_ray

    output = folder / f"prepared-{actors}-{time.monotonic_ns()}"
    config = preparing.settings(
        folder / "pipeline",
        folder / "pictures",
        output,
        resolution=256,
        rows_per_file=8,
        encode_images={"num_actors": actors, "num_gpus": 0},
        encode_prompts={"num_gpus": 0},
    )
    job = new_job(config)
    begin(job)
    execute = on_ray._execution(job, {"PromptStage": config.encode_prompts, "ImageStage": config.encode_images})
    stamps: list[float] = []

    def noted(stage: str, requests: Sequence[Any]) -> Iterator[Any]:
        for made in execute(stage, requests):
            if stage == "ImageStage":
                stamps.append(time.perf_counter())
            yield made

    fill(job, noted, preparing.quiet())
    assert len(stamps) == items
    return 8 * rate(stamps, skip=2 * actors)


def write_pictures(folder: Path, count: int) -> None:
    """Pictures of 256 x 256 with captions."""
    preparing.write_folder(folder, [f"number {i % 8}" for i in range(count)])
    for i in range(count):
        (folder / f"{i:03}.png").write_bytes(preparing.picture(i, 256, 256))


def measure(quick: bool) -> Outcome:
    """Rates over actors, in turn."""
    torch.set_num_threads(1)
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    items, blocks, repeats = (12, 20, 1) if quick else (40, 80, 3)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary, ray_session(cpus=10):
        folder = Path(temporary)
        save_small_pipeline(folder)
        write_pictures(folder / "pictures", 8 * items)
        for _ in range(repeats):
            for actors in (1, 2):
                found.setdefault(f"prepare, images/s, {actors}", []).append(prepared(actors, folder, items=items))
                found.setdefault(f"evaluate, samples/s, {actors}", []).append(evaluated(actors, blocks=blocks))
            for actors in (1, 2, 4, 8):
                found.setdefault(f"simulated requests/s, {actors}", []).append(simulated(actors, each=40))
    medians = measuring.medians(found)
    rows = []
    for name, value in medians.items():
        what, _, actors = name.rpartition(", ")
        rows.append([what, actors, f"{value:.1f}", f"{value / medians[f'{what}, 1']:.2f}"])
    rows.sort(key=lambda row: row[0])
    return Outcome([Table("pools", ["work", "actors", "rate", "of one actor"], rows)], figures=found)


if __name__ == "__main__":
    measuring.main(__doc__, __file__, measure)
