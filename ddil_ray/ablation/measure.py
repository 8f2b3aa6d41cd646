"""One run of a grid in this process: trained by the loop without Ray, and measured against its baseline's references.

A run of seconds on Ray's own pipeline would pay a minute of process starts, so a grid runs whole runs in parallel
instead of parts of one. The method is the same: a test holds both ways to the same losses.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ddil_ray.ablation.grid import GridRun, same_reference
from ddil_ray.ablation.outcome import Outcome
from ddil_ray.evaluation import Benchmark
from ddil_ray.results import Scores, new_benchmark, samplers_of, scores, teacher_samplers
from ddil_ray.training.inline import distill_inline
from ddil_ray.training.recipe import Ingredients, Recipe

__all__ = ["Workbench"]


@dataclass(frozen=True)
class _Reference:
    """What all runs of a comparison are measured against, and the teacher's own scores there."""

    made: Ingredients
    benchmark: Benchmark
    teacher: Scores
    pictures: dict[str, bytes]


@dataclass
class Workbench:
    """Runs one after another; teachers, data and references are made once and kept."""

    device: torch.device | str = "cpu"
    """Of training and of measuring."""
    _references: dict[str, _Reference] = field(default_factory=dict)

    def run(self, run: GridRun) -> Outcome:
        """Train and measure `run`.

        Raises:
            RunFailedError: its loss is not finite.
        """
        reference = self._reference(Recipe(run.reference))
        recipe = Recipe(run.config)
        same_teacher = run.config.teacher == run.reference.teacher
        same_data = run.config.data == run.reference.data
        made = recipe.ingredients(
            teacher=reference.made.teacher if same_teacher else None, data=reference.made.data if same_data else None
        )
        result = distill_inline(recipe, teacher=made.teacher, data=made.data, device=self.device)
        students = samplers_of(recipe, made, result.rounds)["student"]
        on_device = {"student": {steps: sampler.to(self.device) for steps, sampler in students.items()}}
        with tempfile.TemporaryDirectory() as folder:
            measured = scores(reference.benchmark, on_device, Path(folder))
            pictures = _pictures(Path(folder))
        return Outcome(
            group=run.group,
            arm=run.arm,
            seed=run.seed,
            scores=measured["student"],
            teacher=reference.teacher["teacher"],
            records=result.records,
            batch_size=recipe.config.trainer.batch_size,
            reuse=recipe.config.replay.reuse,
            seconds=result.seconds,
            about=reference.benchmark.describe(),
            pictures=reference.pictures | pictures,
        )

    def _reference(self, recipe: Recipe) -> _Reference:
        key = same_reference(recipe.config)
        if key not in self._references:
            made = recipe.ingredients()
            benchmark = new_benchmark(recipe, made)
            benchmark.maker = benchmark.maker.to(self.device)
            with tempfile.TemporaryDirectory() as folder:
                measured = scores(benchmark, {"teacher": teacher_samplers(recipe, made)}, Path(folder))
                self._references[key] = _Reference(made, benchmark, measured, _pictures(Path(folder)))
        return self._references[key]


def _pictures(folder: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in sorted(folder.glob("*.png"))}
