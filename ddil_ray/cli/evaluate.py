"""`ddil-ray evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from ddil_ray.config import RunConfig

__all__ = ["evaluate", "measure"]


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
    from ddil_ray.results import score_table

    found = measure(model, load_config(config, overrides or [], kind=RunConfig), out, verbose=verbose)
    if as_json:
        print_json(found)
        return
    table = score_table(found["scores"], "Scores")
    print_table(table.caption, table.header, table.rows)
    print_lines(f"report   {out / 'report.html'}")


def measure(model: str, config: RunConfig, out: Path, *, verbose: bool = False) -> dict[str, Any]:
    """Measure `model` on Ray as `config` says, and write metrics.json, report.html and samples into the folder `out`.

    Returns:
        What is in metrics.json: `scores`, `classes`, `groups`, and what they are `about`.
    """
    from ddil_ray.evaluation import exported_sampler
    from ddil_ray.folder import write_json
    from ddil_ray.models.match import load_measured
    from ddil_ray.report import write_page
    from ddil_ray.results import measured_parts, new_benchmark, save_grids, score_parts, teacher_samplers
    from ddil_ray.runtime.cluster import connected, evaluation_role
    from ddil_ray.training.recipe import Recipe

    recipe = Recipe(config)
    made, out = recipe.ingredients(), writable(out, "--out")
    student = load_measured(model, made.teacher)
    steps, told = config.evaluation.steps, recipe.student_guidance if student.reads_guidance else 0.0
    samplers = {
        "model": {n: exported_sampler(student, n, w=told) for n in steps},
        "teacher": teacher_samplers(recipe, made),
    }
    benchmark = new_benchmark(recipe, made)
    with connected(config, verbose=verbose):
        from ddil_ray.runtime.evaluation import measure_on_ray

        measured = measure_on_ray(benchmark, samplers, evaluation_role(config))
    found = {**measured_parts(measured), "about": benchmark.describe()}
    save_grids(measured, out / "samples")
    write_json(out / "metrics.json", {"model": model, **found})
    write_page(
        out / "report.html",
        title=f"Evaluation of {model}",
        summary=[f"Against {config.teacher.model} and {made.data.name}."],
        sections=score_parts(found["scores"], found["about"], out / "samples", found["classes"]),
    )
    return found
