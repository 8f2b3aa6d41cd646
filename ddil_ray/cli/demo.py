"""`ddil-ray demo`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ddil_ray.cli.options import AsJson, print_json, print_lines, print_table, writable

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
        add_scores,
        export_students,
        new_benchmark,
        samplers_of,
        score_parts,
        score_table,
        scores,
        teacher_samplers,
    )
    from ddil_ray.runtime.cluster import connected
    from ddil_ray.runtime.run import distill
    from ddil_ray.tracking import View
    from ddil_ray.training.inline import distill_inline
    from ddil_ray.training.recipe import Ingredients, Recipe

    folder = writable(Path(output, time.strftime("demo-%Y%m%d-%H%M%S")), "--output")
    view, started, grids = View(), time.monotonic(), folder / "samples"

    def recipe_of(method: str, arm: str, *more: str) -> Recipe:
        return Recipe(_config(method, f"{method}-{arm}", folder, scale, more))

    usual = recipe_of("pd", "ddil")
    made = usual.ingredients()
    view.say(f"Measuring the teacher (builtin:digits, guidance w = {usual.student_guidance:g}).")
    benchmark = new_benchmark(usual, made)
    measured = scores(benchmark, {"teacher": teacher_samplers(usual, made)}, grids)

    def measure(name: str, recipe: Recipe, parts: Ingredients, rounds: dict[int, DiffusionModel]) -> None:
        measured.update(scores(benchmark, {name: samplers_of(recipe, parts, rounds)["student"]}, grids))
        own = {"student": measured[name], "teacher": measured["teacher"]}
        add_scores(recipe, parts, rounds, own, benchmark.describe(), folder / recipe.config.name)

    for method in _PRESETS:
        view.say(f"{method}, forward-only: in this process.")
        recipe = recipe_of(method, "forward-only", *_FORWARD_ONLY)
        parts = recipe.ingredients(teacher=made.teacher, data=made.data)
        rounds = distill_inline(recipe, teacher=made.teacher.copy(), data=made.data).rounds
        export_students(recipe, parts, rounds, folder / f"{method}-forward-only")
        measure(f"{method} forward-only", recipe, parts, rounds)
    look = ""
    with connected(usual.config):
        for method in _PRESETS:
            view.say(f"{method}, DDIL: on Ray.")
            recipe = recipe_of(method, "ddil", "evaluation.enabled=false")
            parts = recipe.ingredients(teacher=made.teacher, data=made.data)
            result = distill(recipe.config, view=View())
            measure(f"{method} ddil", recipe, parts, result.rounds)
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
    table = score_table(measured, title)
    print_table(table.caption, table.header, table.rows)
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
