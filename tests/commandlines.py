"""Commands as text, parsed by the command lines that they are for: `ddil-ray`'s and `ray`'s; nothing is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

import click
import typer
from ray.scripts.scripts import cli as ray_cli
from typer._click.exceptions import UsageError as TyperUsageError

from ddil_ray.cli import app

__all__ = ["PROGRAMS", "meant", "parsed", "words_of"]

PROGRAMS = {"ddil-ray": typer.main.get_command(app), "ray": ray_cli}


def words_of(line: str) -> list[str]:
    """The words of a line of a shell, without its comment and the assignments before its command."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    return words


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


def parsed(words: Sequence[str]) -> Any:
    """The context of the innermost command, once its options and arguments are parsed.

    Raises:
        ValueError: they do not parse.
    """
    command: Any = PROGRAMS[words[0]]
    try:
        context = command.make_context(words[0], list(words[1:]))
        while hasattr(command, "resolve_command"):
            name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            context = command.make_context(name, rest, parent=context)
    except (click.UsageError, TyperUsageError) as error:
        raise ValueError(f"{' '.join(words)}: {error.format_message()}") from error
    return context
