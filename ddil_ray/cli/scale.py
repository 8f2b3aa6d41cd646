"""`ddil-ray scale`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ddil_ray.cli.options import AsJson, print_json, print_lines
from ddil_ray.errors import ConfigError

__all__ = ["scale"]


def scale(
    run: Annotated[str, typer.Argument(help="Folder of a run that is training, a path or URL.")],
    sizes: Annotated[list[str], typer.Argument(metavar="ROLE=N", help="Actors of a role, or [min,max].")],
    as_json: AsJson = False,
) -> None:
    """Change how many actors make and label the states of a running job.

    Training goes on meanwhile, and no state is lost or made twice. It lasts until the job ends.

    Examples:

    `ddil-ray scale runs/digits-pd student_rollouts=4`

    `ddil-ray scale s3://bucket/runs/sdxl student_rollouts=[2,32] labels=8`
    """
    from ddil_ray.runtime.scaling import scale as scale_run

    answer = scale_run(run, _parsed(sizes))
    if as_json:
        print_json(answer)
        return
    for role, size in answer["after"].items():
        before = answer["before"][role]
        print_lines(f"{role}  {before} actors" if size == before else f"{role}  {before} -> {size} actors")


def _parsed(sizes: list[str]) -> dict[str, Any]:
    import yaml

    found = {}
    for part in sizes:
        role, equals, size = part.partition("=")
        if not equals:
            raise ConfigError(f"ROLE=N must name a role and its actors, as in student_rollouts=4, but is {part!r}.")
        try:
            found[role] = yaml.safe_load(size)
        except yaml.YAMLError:
            found[role] = size
    return found
