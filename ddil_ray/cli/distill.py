"""`ddil-ray distill`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddil_ray.cli.memory import memory_of, print_memory
from ddil_ray.cli.options import AllowCode, AsJson, Overrides, Verbose, print_json, print_lines, print_table
from ddil_ray.errors import ConfigError

if TYPE_CHECKING:
    from ddil_ray.config import RunConfig
    from ddil_ray.runtime.run import RunResult

__all__ = ["distill"]

_ENDING_S = 300.0
"""What a process that was told to end may need for it: the time of a pod, and that in which a dead one is found out."""


def distill(
    config: Annotated[
        str | None, typer.Argument(help="YAML file (path or fsspec URL) or the name of a preset.")
    ] = None,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, start nothing.")
    ] = False,
    resume: Annotated[str | None, typer.Option(help="Run folder to go on with, in place of CONFIG.")] = None,
    resume_if_begun: Annotated[
        bool, typer.Option("--resume-if-begun", help="Go on where CONFIG's run folder holds checkpoints.")
    ] = False,
    verbose: Verbose = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Distil a teacher into a few-step student.

    Examples:

    `ddil-ray distill digits-pd`

    `ddil-ray distill my.yaml trainer.lr=1e-4 student_rollouts.num_actors=8`

    `ddil-ray distill my.yaml --dry-run`

    `ddil-ray distill --resume runs/digits-pd`

    `ddil-ray distill my.yaml --resume-if-begun`, for what starts a command again by itself
    """
    from ddil_ray.config import RunConfig, load_config
    from ddil_ray.training.recipe import Recipe

    settings = [*([config] if config and resume else []), *(overrides or [])]
    if resume is not None:
        from ddil_ray.runtime.run import resumed_config

        run = resumed_config(resume, settings)
    elif config is None:
        raise ConfigError("CONFIG must be given, but is missing. Name a YAML file, or a preset such as digits-pd.")
    else:
        run = load_config(config, settings, kind=RunConfig)
    goes_on = resume is not None or (resume_if_begun and _goes_on(run, wait=not dry_run))
    if dry_run:
        _print_plan({**plan_of(Recipe(run)), "goes_on": goes_on}, as_json=as_json)
        return

    from ddil_ray.results import score_table
    from ddil_ray.runtime.run import distill as distill_on_ray

    result = distill_on_ray(run, resume=goes_on, verbose=verbose)
    if as_json:
        print_json({"folder": result.folder, "scores": result.scores})
        return
    if result.scores:
        table = score_table(result.scores, "Scores")
        print_table(table.caption, table.header, table.rows)
    print_lines(
        f"student  {result.folder}/student",
        f"report   {result.folder}/report.html",
        *([f"tracked  {result.look}"] if result.look else []),
        *_next(result, Recipe(run).student_guidance),
    )


def _next(result: RunResult, w: float) -> list[str]:
    """What to type to see the student; a factory's is weights alone, which nothing loads."""
    steps, student = list(result.rounds.items())[-1]
    if student.family is None:
        return []
    prompt = ' --prompt "a photo"' if student.prompted else ""
    told = student.reads_guidance and student.family.guidance_scale(student, w) is not None
    guidance = f" --guidance {w:g}" if told else ""
    return [f"next     ddil-ray sample {result.folder}/student --steps {steps}{prompt}{guidance} --out samples.png"]


def _goes_on(run: RunConfig, *, wait: bool) -> bool:
    """Whether the run has begun in its folder, as what it is; `wait` for another process that ends there."""
    from ddil_ray.config import RunConfig, load_config
    from ddil_ray.folder import RunFolder, run_url
    from ddil_ray.runtime.lock import RunLock
    from ddil_ray.runtime.resume import begun, check_same_run
    from ddil_ray.tracking import View

    if wait:
        RunLock(RunFolder(run.output, run.name), View().say).wait(_ENDING_S)
    if not begun(run):
        return False
    check_same_run(load_config(f"{run_url(run.output, run.name)}/config.yaml", kind=RunConfig), run)
    return True


def plan_of(recipe: Any) -> dict[str, Any]:
    """What the run would do, after all its checks."""
    from ddil_ray.evaluation import check_instruments
    from ddil_ray.runtime.demands import demands

    made = recipe.ingredients()
    if recipe.config.evaluation.enabled:
        check_instruments(recipe.config.evaluation, made.data, made.teacher)
    trainer = recipe.config.trainer
    return {
        "run": f"{recipe.config.output}/{recipe.config.name}",
        "teacher": {"model": recipe.config.teacher.model, "sample_shape": list(made.teacher.sample_shape)},
        "data": {"name": made.data.name, "images": len(made.data)},
        "phases": [
            {
                "student_steps": phase.student_steps,
                "training_steps": trainer.steps,
                "rows": {o.label: int(plan.fresh(o)[-1]) * trainer.workers[1] for o in plan.origins},
            }
            for phase, plan in zip(made.objective.phases, made.plans, strict=True)
        ],
        "max_staleness": made.max_staleness,
        "actors": [
            {"role": d.role, "count": d.count, "num_cpus": d.cpus, "num_gpus": d.gpus} for d in demands(recipe.config)
        ],
        "memory": memory_of(recipe, made),
    }


def _print_plan(plan: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(plan)
        return
    print_lines(
        f"run       {plan['run']}{', which goes on' if plan['goes_on'] else ''}",
        f"teacher   {plan['teacher']['model']}, samples of shape {tuple(plan['teacher']['sample_shape'])}",
        f"data      {plan['data']['name']}, {plan['data']['images']} images",
        f"staleness at most {plan['max_staleness']} steps",
    )
    for i, phase in enumerate(plan["phases"]):
        rows = ", ".join(f"{name} {count}" for name, count in phase["rows"].items())
        print_lines(
            f"phase {i + 1}   student of {phase['student_steps']} steps, {phase['training_steps']} updates on {rows}"
        )
    print_table(
        "Actors at least",
        ["role", "actors", "CPUs each", "GPUs each"],
        [[a["role"], str(a["count"]), f"{a['num_cpus']:g}", str(a["num_gpus"])] for a in plan["actors"]],
    )
    print_memory(plan["memory"])
    print_lines("Nothing was started.")
