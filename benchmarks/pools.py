"""Pools of actors that take requests in any order, as `ddil-ray prepare` and `evaluate` use them: rates over 1, 2, ...

Preparing encodes pictures of 256 x 256, evaluating samples digits; both compute, so that they scale with real cores.
Simulated requests take 100 ms without computing: what the pool can do with more actors than cores. Rates leave out
how actors start: those of preparing count from when each has answered, the others are of the later half.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from ddil_ray.config.groups import Evaluation
from ddil_ray.evaluation import Benchmark
from ddil_ray.evaluation.samplers import Sampler
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
    """Answers per second of a pool, of the later half: by then all actors have started."""
    stamps = [time.perf_counter() for _ in answers("pool", stage, arguments, requests, role)]
    return rate(stamps, skip=len(stamps) // 2)


def simulated(actors: int, *, each: int) -> float:
    """Requests per second of actors that only take time."""
    role = Role(num_actors=actors, num_cpus=0.1, num_gpus=0)
    return stamped("sleeping:SleepingStage", [SIMULATED_S], list(range(each * actors)), role)


@dataclass(frozen=True)
class Evaluating:
    """What `evaluate` measures: the teacher of digits at 4 steps, against itself at 64."""

    benchmark: Benchmark
    samplers: dict[str, dict[int, Sampler]]
    role: Evaluation

    @classmethod
    def of(cls, *, blocks: int) -> Evaluating:
        """Blocks of 50 samples."""
        overrides = [f"evaluation.num_samples={50 * blocks}", "evaluation.batch_size=50", "evaluation.steps=[4]"]
        recipe = Recipe(load_config("digits-perceptron", overrides, kind=RunConfig))
        made = recipe.ingredients()
        samplers = {"teacher": teacher_samplers(recipe, made)}
        return cls(new_benchmark(recipe, made), samplers, recipe.config.evaluation)

    def rate(self, actors: int) -> float:
        """Samples per second."""
        import ray

        work = [ray.put((self.benchmark.maker, self.samplers)), ray.put(self.benchmark.data.images.numpy())]
        role = self.role.model_copy(update={"num_actors": actors, "num_gpus": 0})
        requests = [("samples", block) for block in range(len(self.benchmark.maker.blocks))]
        return 50 * stamped("ddil_ray.runtime.evaluation:BlockStage", [work], requests, role)


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
    items, blocks = (8, 20) if quick else (10, 30)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary, ray_session(cpus=10):
        folder = Path(temporary)
        save_small_pipeline(folder)
        write_pictures(folder / "pictures", 8 * items)
        evaluating = Evaluating.of(blocks=blocks)
        for actors in (1, 2):
            found[f"prepare, images/s, {actors}"] = prepared(actors, folder, items=items)
            found[f"evaluate, samples/s, {actors}"] = evaluating.rate(actors)
        for actors in (1, 8):
            found[f"simulated requests/s, {actors}"] = simulated(actors, each=160)
    rows = []
    for name, value in found.items():
        what, _, actors = name.rpartition(", ")
        rows.append([what, actors, f"{value:.1f}", f"{value / found[f'{what}, 1']:.2f}"])
    rows.sort(key=lambda row: row[0])
    return Outcome([Table("pools", ["work", "actors", "rate", "of one actor"], rows)], figures=found)


if __name__ == "__main__":
    measuring.main(__doc__, __file__, measure)
