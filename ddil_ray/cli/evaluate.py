"""`ddil-ray evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddil_ray.cli.options import (
    AllowCode,
    AsJson,
    Config,
    Overrides,
    Verbose,
    print_json,
    print_lines,
    print_table,
    writable,
)

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[str, typer.Argument(help="Student or teacher: pipeline folder, URL, hub id or builtin:NAME.")],
    config: Config,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder for metrics.json, report.html and samples.")] = Path("evaluation"),
    verbose: Verbose = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model against the data and the teacher of a config, at the config's evaluation steps.

    Example:

    `ddil-ray evaluate runs/digits-pd/student digits-pd evaluation.steps=[1] --out evaluation`
    """
    from ddil_ray.config import RunConfig, load_config
    from ddil_ray.evaluation import exported_sampler
    from ddil_ray.folder import write_json
    from ddil_ray.models.match import load_measured
    from ddil_ray.report import write_page
    from ddil_ray.results import (
        classes_of,
        groups_of,
        new_benchmark,
        save_grids,
        score_parts,
        score_table,
        scores_of,
        teacher_samplers,
    )
    from ddil_ray.runtime.cluster import connected, evaluation_role
    from ddil_ray.training.recipe import Recipe

    recipe = Recipe(load_config(config, overrides or [], kind=RunConfig))
    made, out = recipe.ingredients(), writable(out, "--out")
    student = load_measured(model, made.teacher)
    steps, told = recipe.config.evaluation.steps, recipe.student_guidance if student.reads_guidance else 0.0
    samplers = {
        "model": {n: exported_sampler(student, n, w=told) for n in steps},
        "teacher": teacher_samplers(recipe, made),
    }
    benchmark = new_benchmark(recipe, made)
    with connected(recipe.config, verbose=verbose):
        from ddil_ray.runtime.evaluation import measure_on_ray

        found = measure_on_ray(benchmark, samplers, evaluation_role(recipe.config))
    measured, classes, about = scores_of(found), classes_of(found), benchmark.describe()
    save_grids(found, out / "samples")
    content = {"scores": measured, "classes": classes, "groups": groups_of(found), "about": about}
    write_json(out / "metrics.json", {"model": model, **content})
    write_page(
        out / "report.html",
        title=f"Evaluation of {model}",
        summary=[f"Against {recipe.config.teacher.model} and {made.data.name}."],
        sections=score_parts(measured, about, out / "samples", classes),
    )
    if as_json:
        print_json(content)
        return
    table = score_table(measured, "Scores")
    print_table(table.caption, table.header, table.rows)
    print_lines(f"report   {out / 'report.html'}")
