"""`ddil-ray demo`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ddil_ray.cli.options import AsJson, print_json, print_lines, print_table

__all__ = ["demo"]

_PRESETS = {"pd": "digits-pd", "lcm": "digits-lcm"}
_FORWARD_ONLY = ["states.forward=1", "states.student=0", "states.teacher=0"]


def demo(
    output: Annotated[str, typer.Option(help="Folder for the runs.")] = "runs",
    scale: Annotated[float, typer.Option(min=0.01, help="Share of the usual training steps and samples.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Distil the shipped digits teacher by PD and LCM, forward-only and with DDIL, and compare.

    The DDIL students are made on Ray; the forward-only baselines by the same loop in this process, without Ray.
    """
    from ddil_ray.models import DiffusionModel
    from ddil_ray.report import write_page
    from ddil_ray.results import (
        SCORES,
        export_students,
        new_benchmark,
        samplers_of,
        score_parts,
        score_rows,
        scores,
    )
    from ddil_ray.runtime.cluster import connected
    from ddil_ray.runtime.run import distill
    from ddil_ray.tracking import View
    from ddil_ray.training.inline import distill_inline
    from ddil_ray.training.recipe import Recipe

    folder = Path(output, time.strftime("demo-%Y%m%d-%H%M%S"))
    view, started = View(), time.monotonic()

    def recipe_of(method: str, arm: str, *more: str) -> Recipe:
        return Recipe(_config(method, f"{method}-{arm}", folder, scale, more))

    made = recipe_of("pd", "ddil").ingredients()
    view.say(f"Measuring the teacher (builtin:digits, guidance w = {recipe_of('pd', 'ddil').student_guidance:g}).")
    benchmark = new_benchmark(recipe_of("pd", "ddil"), made)
    measured: dict[str, Any] = {}
    grids = folder / "samples"

    def measure(method: str, arm: str, recipe: Recipe, rounds: dict[int, DiffusionModel]) -> None:
        samplers = samplers_of(recipe, recipe.ingredients(teacher=made.teacher, data=made.data), rounds)
        if "teacher" not in measured:
            measured.update(scores(benchmark, {"teacher": samplers["teacher"]}, grids))
        name = f"{method} {arm}"
        measured.update(scores(benchmark, {name: samplers["student"]}, grids))

    for method in _PRESETS:
        view.say(f"{method}, forward-only: in this process.")
        recipe = recipe_of(method, "forward-only", *_FORWARD_ONLY)
        rounds = distill_inline(recipe, teacher=made.teacher.copy(), data=made.data).rounds
        ingredients = recipe.ingredients(teacher=made.teacher, data=made.data)
        export_students(recipe, ingredients, rounds, folder / f"{method}-forward-only")
        measure(method, "forward-only", recipe, rounds)
    look = ""
    with connected(recipe_of("pd", "ddil").config):
        for method in _PRESETS:
            view.say(f"{method}, DDIL: on Ray.")
            recipe = recipe_of(method, "ddil", "evaluation.enabled=false")
            result = distill(recipe.config, view=View())
            measure(method, "ddil", recipe, result.rounds)
            look = result.look

    about = benchmark.describe()
    write_page(
        folder / "report.html",
        title="Digits: forward-only distillation and DDIL",
        summary=[
            "One seed each, equal updates. Frechet distances and the paired error are better lower, the rest higher.",
            "The paired error compares a sample with the teacher's from the same noise.",
        ],
        sections=score_parts(measured, about, grids),
    )
    if as_json:
        print_json({"folder": str(folder), "scores": measured, "about": about})
        return
    title = f"{about['num_samples']} samples; {about['features']}; {time.monotonic() - started:.0f} s"
    print_table(title, ["model", "steps", *SCORES.values()], score_rows(measured))
    print_lines(
        f"report   {folder}/report.html",
        f"grids    {grids}",
        f"student  {folder}/pd-ddil/student",
        "next     " + f"ddil-ray sample {folder}/pd-ddil/student --steps 1 --out samples.png",
        "         " + f"ddil-ray sample {folder}/lcm-ddil/student --steps 4 --class-label 3 --out threes.png",
        "         " + look,
        "         ddil-ray distill digits-pd trainer.steps=1000 name=longer",
    )


def _config(method: str, name: str, folder: Path, scale: float, more: tuple[str, ...]) -> Any:
    from ddil_ray.config import RunConfig, load_config

    preset = load_config(_PRESETS[method], kind=RunConfig)
    settings = [
        f"name={name}",
        f"output={folder}",
        f"trainer.steps={max(2, round(preset.trainer.steps * scale))}",
        f"evaluation.num_samples={max(32, round(500 * scale))}",
        "evaluation.teacher_steps=32",
        *more,
    ]
    return load_config(_PRESETS[method], settings, kind=RunConfig)
