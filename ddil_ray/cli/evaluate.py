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
from ddil_ray.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ddil_ray.config import RunConfig
    from ddil_ray.models import DiffusionModel

__all__ = ["evaluate", "measure"]


def evaluate(
    model: Annotated[str, typer.Argument(help="Student or teacher: pipeline folder, URL, hub id or builtin:NAME.")],
    config: Config,
    overrides: Overrides = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="w (guidance_scale - 1) of MODEL; default: the config's student's if its network is told w, else 0.",
        ),
    ] = None,
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

    run = load_config(config, overrides or [], kind=RunConfig)
    found = measure(model, run, out, guidance=guidance, verbose=verbose)
    if as_json:
        print_json(found)
        return
    table = score_table(found["scores"], "Scores")
    print_table(table.caption, table.header, table.rows)
    print_lines(f"report   {out / 'report.html'}")


def measure(
    model: str, config: RunConfig, out: Path, *, guidance: float | None = None, verbose: bool = False
) -> dict[str, Any]:
    """Measure `model` on Ray as `config` says, and write metrics.json, report.html and samples into the folder `out`.

    Of `evaluation.steps` a consistency student is measured at those that its scheduler has.

    Args:
        model: what `ddil-ray evaluate` takes.
        config: data, teacher and how to measure.
        out: gets the files.
        guidance: w of `model`; None: the config's student's where its network is told it, else 0.
        verbose: let Ray speak.

    Returns:
        What is in metrics.json: `scores`, `classes`, `groups`, and what they are `about`.

    Raises:
        ConfigError: the model has none of the steps, or no such guidance.
    """
    from ddil_ray.evaluation import exported_sampler
    from ddil_ray.folder import write_json
    from ddil_ray.models.match import load_measured
    from ddil_ray.report import write_page
    from ddil_ray.results import measured_parts, new_benchmark, save_grids, score_parts, teacher_samplers
    from ddil_ray.runtime.cluster import connected
    from ddil_ray.runtime.fits import evaluation_role
    from ddil_ray.training.recipe import Recipe

    recipe = Recipe(config)
    made, out = recipe.ingredients(), writable(out, "--out")
    student = load_measured(model, made.teacher)
    if guidance is None:
        guidance = recipe.student_guidance if student.reads_guidance else 0.0
    samplers = {
        "model": {n: exported_sampler(student, n, w=guidance) for n in _steps(student, config.evaluation.steps)},
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


def _steps(model: DiffusionModel, chosen: Sequence[int]) -> list[int]:
    """Those of `chosen` that `model` can be sampled in."""
    from ddil_ray.evaluation import most_steps

    most = most_steps(model) or max(chosen)
    steps = [n for n in chosen if n <= most]
    if not steps:
        raise ConfigError(
            f"`evaluation.steps` must hold a number of at most {most}, the steps of this consistency student, but is "
            f"{list(chosen)} instead."
        )
    return steps
