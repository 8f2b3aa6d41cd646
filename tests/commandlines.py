"""Commands as text, parsed by the command lines that they are for: `ddil-ray`'s and `ray`'s; nothing is run."""

from __future__ import annotations

from collections.abc import Sequence

import click
import typer
from ray.scripts.scripts import cli as ray_cli

from ddil_ray.cli import app

__all__ = ["meant", "parsed"]

PROGRAMS = {"ddil-ray": typer.main.get_command(app), "ray": ray_cli}


def meant(words: Sequence[str]) -> list[str]:
    """What a command comes to: scripts of cluster/ and pipelines/ hand their arguments on."""
    match list(words):
        case ["cluster/submit.sh", *command]:
            return meant(command)
        case ["cluster/background.sh", script, *rest]:
            return meant([f"cluster/{script}", *rest])
        case ["cluster/start-head.sh", *options]:
            return ["ray", "start", "--head", *options]
        case ["cluster/start-worker.sh", address, *options]:
            return ["ray", "start", f"--address={address}", *options]
        case ["sbatch", "cluster/slurm/ddil.sbatch", *arguments]:
            return ["ddil-ray", "distill", *arguments]
        case ["python", script, *arguments] if script.startswith("pipelines/"):
            name = script.removeprefix("pipelines/").removesuffix(".py").replace("_", "-")
            return ["ddil-ray", name, *arguments]
        case others:
            return others


def parsed(words: Sequence[str]) -> click.Context:
    """The context of the innermost command.

    Raises:
        click.UsageError: it does not parse.
    """
    command, name, rest = PROGRAMS[words[0]], words[0], list(words[1:])
    context = command.make_context(name, rest)
    while isinstance(command, click.Group):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    return context
