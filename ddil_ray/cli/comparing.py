"""What the demos share: students of one teacher, made in this process and on Ray, and measured alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddil_ray.report import Table, write_page
from ddil_ray.results import (
    Section,
    add_scores,
    export_students,
    new_benchmark,
    samplers_of,
    score_parts,
    score_table,
    scores,
    teacher_samplers,
)
from ddil_ray.tracking import View
from ddil_ray.training.inline import distill_inline
from ddil_ray.training.recipe import Ingredients, Recipe

if TYPE_CHECKING:
    from ddil_ray.config import RunConfig
    from ddil_ray.models import DiffusionModel

__all__ = ["FORWARD_ONLY", "Comparison", "scaled"]

FORWARD_ONLY = ("states.forward=1", "states.student=0", "states.teacher=0", "states.mixed=0")


def scaled(preset: str, scale: float, settings: Sequence[str]) -> RunConfig:
    """The run of a preset with `scale` times its training steps, and `settings`."""
    from ddil_ray.config import RunConfig, load_config

    steps = load_config(preset, settings, kind=RunConfig).trainer.steps
    return load_config(preset, [*settings, f"trainer.steps={max(2, round(steps * scale))}"], kind=RunConfig)


class Comparison:
    """Measures a teacher, then its students as they are made.

    Args:
        usual: any of the runs; teacher, data and evaluation are its.
        folder: for students, `samples` and report.html.
    """

    def __init__(self, usual: Recipe, folder: Path) -> None:
        self._made = usual.ingredients()
        self._folder = folder
        self.grids, self.look = folder / "samples", ""
        self._benchmark = new_benchmark(usual, self._made)
        self.measured = scores(self._benchmark, {"teacher": teacher_samplers(usual, self._made)}, self.grids)

    @property
    def about(self) -> dict[str, Any]:
        """See `Benchmark.describe`."""
        return self._benchmark.describe()

    def in_process(self, name: str, config: RunConfig) -> None:
        """Distil by the same loop without Ray, and measure the student as `name`."""
        recipe = Recipe(config)
        parts = self._parts(recipe)
        rounds = distill_inline(recipe, teacher=self._made.teacher.copy(), data=self._made.data).rounds
        export_students(recipe, parts, rounds, self._folder / config.name)
        self._measure(name, recipe, parts, rounds)

    def on_ray(self, name: str, config: RunConfig) -> None:
        """Distil on the connected Ray, and measure the student as `name`."""
        from ddil_ray.runtime.run import distill

        recipe = Recipe(config)
        parts = self._parts(recipe)
        result = distill(config, view=View())
        self.look = result.look
        self._measure(name, recipe, parts, result.rounds)

    def table(self, seconds: float) -> Table:
        """Scores of all models, for the terminal."""
        title = f"{self.about['num_samples']} samples; {self.about['features']}; {seconds:.0f} s"
        return score_table(self.measured, title)

    def report(self, title: str, summary: Sequence[str], more: Sequence[Section] = ()) -> None:
        """Write report.html, with `more` sections in front."""
        sections = [*more, *score_parts(self.measured, self.about, self.grids)]
        write_page(self._folder / "report.html", title=title, summary=summary, sections=sections)

    def _parts(self, recipe: Recipe) -> Ingredients:
        return recipe.ingredients(teacher=self._made.teacher, data=self._made.data)

    def _measure(self, name: str, recipe: Recipe, parts: Ingredients, rounds: Mapping[int, DiffusionModel]) -> None:
        samplers = {name: samplers_of(recipe, parts, rounds)["student"]}
        self.measured.update(scores(self._benchmark, samplers, self.grids))
        own = {"student": self.measured[name], "teacher": self.measured["teacher"]}
        add_scores(recipe, parts, rounds, own, self.about, self._folder / recipe.config.name)
