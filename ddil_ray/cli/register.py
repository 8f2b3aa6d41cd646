"""`ddil-ray register`."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from ddil_ray.cli.options import AsJson, print_json, print_lines, quiet_libraries
from ddil_ray.errors import ConfigError

if TYPE_CHECKING:
    from ddil_ray.publish.gate import Evidence
    from ddil_ray.publish.registry import Student

__all__ = ["register"]


class Metric(str, Enum):
    """Scores that may decide on a champion."""

    KID_TEACHER = "kid_teacher"
    KID_DATA = "kid_data"
    PAIRED_ERROR = "paired_error"
    CLIP_SCORE = "clip_score"


def register(
    run: Annotated[str, typer.Argument(help="Folder or fsspec URL of a finished run, whose student is taken.")],
    name: Annotated[str, typer.Option(help="Registered model; a version is added where it exists.")],
    champion: Annotated[bool, typer.Option("--champion", help="Make it champion if it is better.")] = False,
    metric: Annotated[Metric | None, typer.Option(help="Score that decides; default: kid_teacher.")] = None,
    uri: Annotated[
        str | None,
        typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow server; default: where the run is tracked."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put a run's student into MLflow's model registry, with its signature and scores.

    With `--champion` the alias `champion` moves to it if both were measured alike and it is better by more than chance.
    Who asks is told by MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.

    Examples:

    `ddil-ray register runs/digits-pd --name digits-1-step --champion`

    `ddil-ray register s3://bucket/runs/sd15-lcm --name sd15-4-steps --uri https://mlflow.example.org`
    """
    if metric is not None and not champion:
        raise ConfigError("`--metric` must come with `--champion`, but does not. Add it.")

    from ddil_ray.publish.registry import CHAMPION, Registry, registry_of, student_of_run

    quiet_libraries()
    student = student_of_run(run.rstrip("/"))
    evidence = _measured(student) if champion else None
    registry = Registry(registry_of(student.run, uri))
    registered = registry.register(student, name)
    verdict = registry.crown(registered, evidence, (metric or Metric.KID_TEACHER).value) if evidence else None
    if as_json:
        decided = {CHAMPION: verdict.passes, "reason": verdict.reason} if verdict else {}
        print_json({"name": name, "version": registered.version, "new": registered.new, **decided})
        return
    print_lines(f"version  {registered.uri}" + ("" if registered.new else ", registered before"))
    if verdict is not None:
        print_lines(f"champion {'yes' if verdict.passes else 'no'}, {verdict.reason}")


def _measured(student: Student) -> Evidence:
    if student.evidence is None:
        raise ConfigError(
            f"`--champion` must be given for a student that was measured at its {student.steps} steps, but "
            f"{student.run.url} has no such scores. Set `evaluation.enabled=true` and `evaluation.steps` to hold "
            f"{student.steps}, and let `ddil-ray distill --resume` measure it."
        )
    return student.evidence
